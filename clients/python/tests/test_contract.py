"""The words of the contract and the limits of its fields, against tables (D3, C20, C62, C70)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapbroker import contract, protocol
from snapbroker.contract import (
    LABEL_BYTES_MAX,
    LABELS_MAX,
    NAME_BYTES_MAX,
    NAMESPACE_BYTES_MAX,
    Event,
    Info,
    Kind,
    Mount,
    Usage,
    check_labels,
    check_name,
    check_namespace,
)
from snapbroker.errors import ERRORS, BrokerError, FailedPrecondition, InvalidArgument

LEGAL_NAMES = [
    "a",
    " ",
    "job 42",
    "sha256:0123",
    "extract-1-abc sha256:0123",
    "a/b/../c",
    "/",
    ".",
    "-",
    "\n",
    "\x01\x7f",
    "牛",
    "😀",
    "e\u0301",
    "\ufeff",
    "\ufffd",
    "x" * NAME_BYTES_MAX,
    "é" * (NAME_BYTES_MAX // 2),
    "牛" * (NAME_BYTES_MAX // 3),
    "😀" * (NAME_BYTES_MAX // 4),
]
ILLEGAL_NAMES = [
    "",
    "\0",
    "a\0b",
    "x" * (NAME_BYTES_MAX + 1),
    "é" * (NAME_BYTES_MAX // 2) + "x",
    "牛" * (NAME_BYTES_MAX // 3) + "é",
    "😀" * (NAME_BYTES_MAX // 4) + "x",
    "x" * 1_000_000,
]
LEGAL_NAMESPACES = [
    "default", "containerd", "k8s.io", "moby", "buildkit", "a", "A", "0", "a-b", "a_b", "a.b", "a.b-c_d", "1.2.3",
    "Version", "versions", "version1", "x" * NAMESPACE_BYTES_MAX,
]  # fmt: skip
MALFORMED_NAMESPACES = [
    "version", ".", "-", "_", "a.", ".a", "a-", "-a", "_a", "a_", "a..b", "a--b", "a.-b", "a b", " a", "a ", "a/b",
    "a\n", "a\0", "é", "\u0661", "a:b", "*", "x" * (NAMESPACE_BYTES_MAX + 1),
]  # fmt: skip
LEGAL_LABELS = [
    {},
    {"k": "v"},
    {"k": ""},
    {"containerd.io/gc.root": "2026-01-01T00:00:00Z"},
    {"é": "😀"},
    {" ": " "},
    {"k" * LABEL_BYTES_MAX: ""},
    {"k": "v" * (LABEL_BYTES_MAX - 1)},
    {"k" * 2048: "v" * 2048},
    {"é" * 1024: "é" * 1024},
    {"😀" * 512: "😀" * 512},
    {str(number): "x" for number in range(LABELS_MAX)},
]
ILLEGAL_LABELS = [
    {"": "v"},
    {"": ""},
    {"k" * LABEL_BYTES_MAX: "v"},
    {"k": "v" * LABEL_BYTES_MAX},
    {"k" * 2048: "v" * 2049},
    {"é" * 1024: "é" * 1024 + "x"},
    {"a": "b", "k" * 4000: "v" * 97},
    {str(number): "x" for number in range(LABELS_MAX + 1)},
]


@pytest.mark.parametrize("name", LEGAL_NAMES, ids=lambda name: ascii(name)[:30])
def test_legal_names(name):
    check_name(name)


@pytest.mark.parametrize("name", ILLEGAL_NAMES, ids=lambda name: ascii(name)[:30])
@pytest.mark.parametrize("what", ["key", "parent"])
def test_illegal_names(name, what):
    with pytest.raises(InvalidArgument, match=rf"^{what} ") as caught:
        check_name(name, what)
    assert len(caught.value.message) < 200


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=2000) | st.integers(1, 5000).map(lambda n: "é" * n))
def test_a_name_is_legal_by_its_bytes_alone(name):
    legal = 0 < len(name.encode()) <= NAME_BYTES_MAX and "\0" not in name
    try:
        check_name(name)
    except InvalidArgument:
        assert not legal
    else:
        assert legal


@pytest.mark.parametrize("namespace", LEGAL_NAMESPACES)
def test_legal_namespaces(namespace):
    check_namespace(namespace)


@pytest.mark.parametrize("namespace", MALFORMED_NAMESPACES, ids=ascii)
def test_malformed_namespaces(namespace):
    with pytest.raises(InvalidArgument, match=r"^namespace "):
        check_namespace(namespace)


def test_a_missing_namespace_is_another_error_than_a_malformed_one():
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        check_namespace("")


@pytest.mark.parametrize("labels", LEGAL_LABELS, ids=range(len(LEGAL_LABELS)))
def test_legal_labels(labels):
    check_labels(labels)


@pytest.mark.parametrize("labels", ILLEGAL_LABELS, ids=range(len(ILLEGAL_LABELS)))
def test_illegal_labels(labels):
    with pytest.raises(InvalidArgument) as caught:
        check_labels(labels)
    assert len(caught.value.message) < 300


@given(st.text("aé牛😀", min_size=1, max_size=4200), st.text("aé牛😀", max_size=4200))
def test_a_label_is_legal_by_its_bytes_alone(key, value):
    legal = len(key.encode()) + len(value.encode()) <= LABEL_BYTES_MAX
    try:
        check_labels({key: value})
    except InvalidArgument:
        assert not legal
    else:
        assert legal


def test_labels_without_a_value_are_not_stored():
    given_labels = {"a": "1", "b": "", "c": " "}
    assert contract.without_empty(given_labels) == {"a": "1", "c": " "}
    assert given_labels["b"] == ""


def test_a_record_of_the_most_and_longest_labels_fits_a_body():
    labels = {f"{number:04}" + "k" * 2044: "v" * 2048 for number in range(LABELS_MAX)}
    check_labels(labels)
    info = Info("x" * NAME_BYTES_MAX, Kind.COMMITTED, "y" * NAME_BYTES_MAX, labels)
    assert len(protocol.encode(protocol.WalkPage(infos=(info,)))) < protocol.BODY_BYTES_MAX


def test_kinds_are_their_lower_case_words():
    assert [str(kind) for kind in Kind] == ["view", "active", "committed"]
    assert protocol.encode(Kind.ACTIVE) == b"\xa6active"


def test_usage_adds_up():
    assert Usage(1, 4096) + Usage(2, 8192) == Usage(3, 12288)


def test_what_is_absent_on_the_wire():
    assert protocol.encode(Info("a", Kind.ACTIVE)) == protocol.encode({"name": "a", "kind": "active"})
    assert protocol.encode(Usage()) == protocol.encode({"inodes": 0, "size": 0})
    bind = protocol.encode(Mount("bind", "/a"))
    assert bind == protocol.encode({"type": "bind", "source": "/a"})


def test_the_topic_of_an_event():
    event = Event(1, 0, 0, "overlayfs", "default", "commit", "a")
    assert event.topic == "overlayfs/default/snapshot/commit"
    assert contract.topic("native", "k8s.io", "view") == "native/k8s.io/snapshot/view"


def test_every_event_verb_is_a_verb():
    assert set(contract.EVENT_VERBS) <= set(protocol.VERBS)


def test_errors_have_a_code_and_an_exit_status_of_their_own():
    assert {error.code for error in ERRORS.values()} == set(ERRORS)
    assert len({error.exit_status for error in ERRORS.values()}) == len(ERRORS)
    assert all(issubclass(error, BrokerError) and error.exit_status > 0 for error in ERRORS.values())
    own = {error for error in BrokerError.__subclasses__() if error.__module__ == BrokerError.__module__}
    assert set(ERRORS.values()) == own


def test_an_error_carries_its_message_and_details():
    error = InvalidArgument("say what to do", {"position": 3})
    assert (str(error), error.message, error.details) == ("say what to do", "say what to do", {"position": 3})
    assert InvalidArgument("x").details == {}
