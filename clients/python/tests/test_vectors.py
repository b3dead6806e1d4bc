"""The golden vectors, the schemas and the examples of the specification say the same as the types."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest
from referencing import Registry, Resource

from snapbroker import contract, protocol
from snapbroker.errors import ERRORS, BrokerError
from snapbroker.session import Answer, Exchange

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ROOT / "clients" / "python" / "tools"
SCHEMAS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "schemas").glob("*.json"))}
VECTORS = json.loads((ROOT / "clients" / "vectors" / "vectors.json").read_text())
REGISTRY = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items())

DECODERS = {
    "Request": protocol.decode_request,
    "Reply": protocol.decode_reply,
    "Event": protocol.decode_event,
    "Heartbeat": protocol.decode_heartbeat,
    **{answer.__name__: protocol.decoder(answer).decode for answer in protocol.answer_types().values()},
}
ANSWERS = {answer.__name__ for answer in protocol.answer_types().values()}
BY_NAME = {vector["name"]: vector for section in ("messages", "tolerated", "refused") for vector in VECTORS[section]}


def named(section):
    return pytest.mark.parametrize("vector", VECTORS[section], ids=[vector["name"] for vector in VECTORS[section]])


def schema_of(type_name):
    return re.sub(r"(?<!^)([A-Z])", r"-\1", type_name).lower() + ".json"


def validate(file, instance):
    jsonschema.Draft202012Validator(SCHEMAS[file], registry=REGISTRY).validate(instance)


def decoded(vector):
    return DECODERS[vector["type"]](bytes.fromhex(vector["hex"]))


@pytest.mark.parametrize("tool", ["generate_vectors.py", "generate_schemas.py"])
def test_what_is_checked_in_is_what_is_generated(tool):
    done = subprocess.run([sys.executable, TOOLS / tool, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@named("messages")
def test_a_message_is_decoded_and_encoded_byte_for_byte(vector):
    assert protocol.encode(decoded(vector)).hex() == vector["hex"]


@named("messages")
def test_the_json_view_is_the_message(vector):
    assert msgspec.to_builtins(msgspec.msgpack.decode(bytes.fromhex(vector["hex"]))) == vector["json"]


@named("messages")
def test_a_message_fits_its_schema(vector):
    if "json" in vector:
        validate(schema_of(vector["type"]), vector["json"])


@named("messages")
def test_maps_with_free_keys_are_in_the_order_of_their_bytes(vector):
    """So that writers in languages whose maps have no order can be compared byte for byte."""
    for keys in free_maps(vector["json"]):
        assert keys == sorted(keys, key=str.encode)


def free_maps(value):
    if isinstance(value, list):
        for each in value:
            yield from free_maps(each)
    if isinstance(value, dict):
        for name, field in value.items():
            if name in ("labels", "details", "topics", "queues", "backlog") and isinstance(field, dict):
                yield list(field)
                yield from (list(inner) for inner in field.values() if isinstance(inner, dict))
            yield from free_maps(field)


@named("tolerated")
def test_what_is_tolerated_means_the_same_as_what_is_written(vector):
    assert vector["hex"] != BY_NAME[vector["same_as"]]["hex"]
    assert protocol.encode(decoded(vector)).hex() == BY_NAME[vector["same_as"]]["hex"]
    if "json" in vector:
        validate(schema_of(vector["type"]), vector["json"])


@named("malformed")
def test_what_is_malformed_is_refused_with_its_code(vector):
    read = answered if vector["type"] in ANSWERS else decoded
    with pytest.raises(BrokerError) as caught:
        read(vector)
    assert caught.value.code == vector["error"]
    assert type(caught.value) is ERRORS[vector["error"]]


def answered(vector):
    """What a caller gets whose call has the vector as its answer."""
    exchange, answer = Exchange(b"overlayfs", "default", 1.0), Answer()
    exchange.add(protocol.Status(), DECODERS[vector["type"]], answer)
    outcome = protocol.Outcome(call=0, ok=msgspec.Raw(bytes.fromhex(vector["hex"])))
    exchange.receive(protocol.encode(protocol.Reply(outcomes=(outcome,))), last=True)
    return answer.result()


@named("refused")
def test_what_breaks_the_contract_is_well_formed(vector):
    assert protocol.encode(decoded(vector)).hex() == vector["hex"]
    assert vector["error"] in ERRORS
    assert vector["refuses"] in ("request", "call")


@named("refused")
def test_the_contract_refuses_names_labels_and_namespaces(vector):
    request = decoded(vector)
    (call,) = request.calls

    def check():
        contract.check_namespace(request.namespace)
        for field in ("key", "name", "parent"):
            if hasattr(call, field) and (field != "parent" or call.parent):
                contract.check_name(getattr(call, field), field)
        contract.check_labels(getattr(call, "labels", {}))

    if re.search("-(namespace|key|name|parent|label|stat)-", vector["name"]):
        with pytest.raises(BrokerError) as caught:
            check()
        assert caught.value.code == vector["error"]
    else:
        check()


def test_every_verb_answer_kind_and_code_has_a_vector():
    messages = VECTORS["messages"]
    requests = [vector["json"] for vector in messages if vector["type"] == "Request"]
    assert {call["verb"] for request in requests for call in request["calls"]} == set(protocol.VERBS)
    assert {vector["type"] for vector in messages} == set(DECODERS)
    codes = {vector["name"].removeprefix("reply-error-") for vector in messages}
    assert set(ERRORS) <= codes
    events = [vector["json"] for vector in messages if vector["type"] == "Event"]
    assert {event["verb"] for event in events} == {*contract.EVENT_VERBS, "lease"}
    kinds = {vector["json"]["kind"] for vector in messages if vector["type"] == "Info"}
    assert kinds == {str(kind) for kind in contract.Kind}
    names = [vector["name"] for section in VECTORS.values() if isinstance(section, list) for vector in section]
    assert len(names) == len(set(names))


def test_the_answer_of_every_verb_has_a_schema():
    assert set(SCHEMAS["answers.json"]["properties"]) == set(protocol.VERBS)
    answers = {vector["type"]: vector for vector in VECTORS["messages"]}
    for verb, answer in protocol.answer_types().items():
        validate("answers.json", {verb: answers[answer.__name__]["json"]})


@pytest.mark.parametrize("file", SCHEMAS)
def test_a_schema_is_one(file):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[file])


def test_a_schema_refuses_what_is_out_of_its_limits():
    refused = {vector["name"]: vector["json"] for vector in VECTORS["refused"]}
    for name in ("key-empty", "key-nul", "page-zero", "page-too-large", "credit-too-large", "filters-too-many"):
        with pytest.raises(jsonschema.ValidationError):
            validate("request.json", refused[f"refused-{name}"])
    for instance in ({"calls": []}, {"calls": [{"verb": "lease"}]}, {"calls": [{"verb": "stat"}]}, {}):
        with pytest.raises(jsonschema.ValidationError):
            validate("request.json", instance)
    for outcome in ({"call": 0}, {"call": 0, "ok": {}, "error": {"code": "internal", "message": ""}}, {"ok": {}}):
        with pytest.raises(jsonschema.ValidationError):
            validate("reply.json", {"outcomes": [outcome]})


@named("exchanges")
def test_the_frames_of_an_exchange(vector):
    open_requests = {}
    for step in vector["steps"]:
        frames = [bytes.fromhex(frame) for frame in step["frames"]]
        if vector.get("dropped"):
            assert step["direction"] == "client-to-broker"
            assert len(frames) != 4 or not 0 < len(frames[1]) <= protocol.REQUEST_ID_BYTES_MAX
        elif step["direction"] == "client-to-broker":
            version, request_id, target, body = frames
            assert version[:4] == protocol.REQUEST_VERSION[:4]
            assert 0 < len(request_id) <= protocol.REQUEST_ID_BYTES_MAX
            assert len(target) <= protocol.TARGET_BYTES_MAX
            assert request_id not in open_requests
            open_requests[request_id] = protocol.decode_request(body).calls
        elif step["direction"] == "broker-to-client":
            version, request_id, more, body = frames
            assert version == protocol.REQUEST_VERSION
            read_reply(protocol.decode_reply(body), open_requests[request_id])
            if more == protocol.DONE:
                del open_requests[request_id]
            else:
                assert more == protocol.MORE
        elif step["direction"] == "broker-to-subscriber":
            read_publication(*frames)
        else:
            assert (step["direction"], frames) == ("subscriber-to-broker", [b"\x01overlayfs/"])
    assert not open_requests


def read_reply(reply, calls):
    answers = protocol.answer_types()
    assert reply.outcomes or reply.error
    for outcome in reply.outcomes:
        verb = calls[outcome.call].__struct_config__.tag
        if outcome.error is None and outcome.progress is None:
            answer = protocol.decoder(answers[verb]).decode(outcome.ok)
            assert protocol.encode(answer) == bytes(outcome.ok)
        else:
            assert bytes(outcome.ok) == b""


def read_publication(topic, version, sequence, body):
    assert version == protocol.EVENT_VERSION
    if topic.endswith(b"/heartbeat"):
        heartbeat = protocol.decode_heartbeat(body)
        assert int.from_bytes(sequence, "big") == heartbeat.sequence
        assert topic.decode() == protocol.heartbeat_topic("overlayfs")
    else:
        event = protocol.decode_event(body)
        assert tuple(protocol.event_frames(event.topic, event.sequence, body)) == (topic, version, sequence, body)


EXAMPLES = [
    (path.name, *example)
    for path in sorted((ROOT / "docs" / "rfc").glob("[0-9]*.md"))
    for example in re.findall(r"^```hex ([\w-]+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("file", "name", "text"), EXAMPLES, ids=[example[1] for example in EXAMPLES])
def test_an_example_of_the_specification_is_a_vector(file, name, text):
    """A line of an example is hexadecimal, then perhaps a remark behind a semicolon."""
    lines = [re.sub(r"\s", "", line.partition(";")[0]) for line in text.splitlines()]
    exchange = next((vector for vector in VECTORS["exchanges"] if vector["name"] == name), None)
    if exchange is None:
        assert "".join(lines) == BY_NAME[name]["hex"]
    else:
        assert "".join(lines) == "".join(frame for step in exchange["steps"] for frame in step["frames"])


def test_both_specifications_have_examples():
    assert {file for file, _, _ in EXAMPLES} == {"1-request.md", "2-events.md"}


def test_the_limits_in_the_specification_are_those_of_the_code():
    for path in (ROOT / "docs" / "rfc").glob("[0-9]*.md"):
        for name, written in re.findall(r"^\| `([A-Z_]+_MAX)` \| ([\d,]+)", path.read_text(), re.MULTILINE):
            value = getattr(protocol, name, None) or getattr(contract, name, None)
            assert value == int(written.replace(",", "")), (path.name, name)
    text = (ROOT / "docs" / "rfc" / "1-request.md").read_text()
    for module in (protocol, contract):
        for name in vars(module):
            assert not name.endswith("_MAX") or f"| `{name}` |" in text, name


def test_the_codes_in_the_specification_are_those_of_the_code():
    text = (ROOT / "docs" / "rfc" / "1-request.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d+) \|", text, re.MULTILINE)
    assert {code: int(status) for code, status in rows} == {code: error.exit_status for code, error in ERRORS.items()}
