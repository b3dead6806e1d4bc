"""The walk filters against a table of the peer's behaviour (C64-C69), and against text nobody planned for."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.filters import (
    EXPRESSION_MEMORY_BYTES,
    EXPRESSIONS_MAX,
    SELECTORS_MAX,
    Selector,
    compile_filters,
    parse_filter,
)
from snapbroker.contract import Info, Kind
from snapbroker.errors import InvalidArgument
from snapbroker.protocol import FILTER_BYTES_MAX, FILTERS_MAX

# One letter for each snapshot, so that a row of the table shows at a glance which of them match.
SNAPSHOTS = {
    "b": Info("base", Kind.COMMITTED),
    "l": Info("layer-1", Kind.COMMITTED, "base", {"foo": "true", "containerd.io/gc.root": "2026"}),
    "j": Info("job/42", Kind.ACTIVE, "layer-1", {"foo": "omg_asdf.asdf-qwer", "a.b": "c", "more so": "x y"}),
    "v": Info("look at, this", Kind.VIEW, "base", {"é": "ü", 'q"\\': "tab\tline\n", "n": "10"}),
    "u": Info("牛😀", Kind.ACTIVE, "", {"moo": "牛", "word": "ab=c", "lost": "\ufffd"}),
}
EVERYTHING = "bljvu"

# filter -> the letters of what matches; every row was held against containerd's pkg/filters.
MATCHING = [
    # Nothing to hold against (C64).
    ("", EVERYTHING),
    # Presence: the fixed fields are always there, an unknown one never (C65).
    ("name", EVERYTHING),
    ("parent", EVERYTHING),
    ("kind", EVERYTHING),
    ("bogus", ""),
    ("created", ""),
    ("Name", ""),
    ("labels", ""),
    ("labels.foo", "lj"),
    ("labels.bar", ""),
    ("labels.foo.bar", ""),
    ('labels."foo"', "lj"),
    ('"labels"."foo"', "lj"),
    ('"labels".foo', "lj"),
    ('"labels.foo"', ""),
    ("labels.a.b", "j"),
    ('labels."a.b"', "j"),
    ('labels."a".b', "j"),
    ('labels.a."b"', "j"),
    ('labels.""', ""),
    ('labels."more so"', "j"),
    ('labels."é"', "v"),
    (r'labels."\u00e9"', "v"),
    (r'labels."\xc3\xa9"', "v"),
    (r'labels."\303\251"', "v"),
    (r'labels."q\"\\"', "v"),
    (r'labels."\u0071\"\\"', "v"),
    ("labels.n", "v"),
    # Equality.
    ("name==base", "b"),
    ("name==Base", ""),
    ("name==layer-1", "l"),
    ("name==job/42", "j"),
    ('name=="job/42"', "j"),
    ('name=="look at, this"', "v"),
    ("name==牛😀", "u"),
    (r'name=="\u725b\U0001F600"', "u"),
    (r'name=="\u725B\U0001f600"', "u"),
    ('name==""', ""),
    ('parent==""', "bu"),
    ("parent==base", "lv"),
    ("kind==active", "ju"),
    ("kind==view", "v"),
    ("kind==committed", "bl"),
    ("kind==Active", ""),
    ("kind==ACTIVE", ""),
    ('kind=="active"', "ju"),
    ("bogus==z", ""),
    ('bogus==""', ""),
    ('labels.bar==""', ""),
    ("labels.foo==true", "l"),
    ("labels.foo==omg_asdf.asdf-qwer", "j"),
    ('labels."containerd.io/gc.root"==2026', "l"),
    (r'labels."é"=="ü"', "v"),
    (r'labels."é"==ü', "v"),
    (r'labels."q\"\\"=="tab\tline\n"', "v"),
    (r'labels."q\"\\"=="tab\x09line\012"', "v"),
    ("labels.word==ab=c", "u"),
    # Half a surrogate pair stands for U+FFFD; bytes that are no UTF-8 equal nothing.
    (r'labels.lost=="\ud800"', "u"),
    (r'labels.lost=="\uDFFF"', "u"),
    (r'labels.lost=="\xef\xbf\xbd"', "u"),
    (r'labels.lost=="\xff"', ""),
    (r'labels.lost!="\xff"', EVERYTHING),
    # A path may go on behind the fixed fields; nobody looks.
    ("name.foo==base", "b"),
    ('"name"==base', "b"),
    ("kind.x.y==view", "v"),
    # Inequality sees "" where a field is absent (C68).
    ("name!=base", "ljvu"),
    ("kind!=active", "blv"),
    ("bogus!=z", EVERYTHING),
    ('bogus!=""', ""),
    ('parent!=""', "ljv"),
    ("labels.foo!=true", "bjvu"),
    ('labels.foo!=""', "lj"),
    ('labels!=""', ""),
    # Expressions: an unanchored search (C68), quoted in one of three ways or not at all (C67).
    ("name~=a", "blv"),
    ("name~=^l", "lv"),
    ("name~=[0-9]+", "lj"),
    ("name~=[0-9]+$", "lj"),
    ("name~=/[0-9]+$/", "lj"),
    ("name~=|[0-9]+$|", "lj"),
    ('name~="[0-9]+$"', "lj"),
    (r"name~=\d", "lj"),
    (r"name~=/\\d/", "lj"),
    (r"name~=|\\d|", "lj"),
    (r'name~="\\d"', "lj"),
    (r"name~=/job\/4/", "j"),
    ("name~=|job/4|", "j"),
    (r"name~=/^(base|layer-1)$/", "bl"),
    (r"name~=|^(base\|layer-1)$|", "bl"),
    ("name~=/, /", "v"),
    ("name~=/a{1,2}s/", "b"),
    ("name~=/(?i)BASE/", "b"),
    ("name~=/./", EVERYTHING),
    ("name~=牛", "u"),
    ("name~=|牛|", "u"),
    (r"name~=/^\\p{Han}/", "u"),
    ("name~=/^..$/", "u"),
    ("kind~=^act", "ju"),
    ("parent~=^$", "bu"),
    ("bogus~=^$", EVERYTHING),
    ("bogus~=/./", ""),
    ("labels.foo~=^$", "bvu"),
    ("labels.foo~=/./", "lj"),
    ("labels~=^$", EVERYTHING),
    ('labels."é"~=ü', "v"),
    (r'labels."q\"\\"~=/b\\s/', "v"),
    ("name~=/e$/,kind~=/^c/", "b"),
    ("name~=?", ""),
    # An expression nobody can read matches nothing, not even by an absent field (C68).
    ("name~=(", ""),
    ("name~=/[a-/", ""),
    ("name~=/a**/", ""),
    ("name~=/a{1001}/", ""),
    ("name~=/(?=a)/", ""),
    (r"name~=/(a)\\1/", ""),
    (r"name~=/\xff/", ""),
    ("bogus~=(", ""),
    ('name~=""', EVERYTHING),
    ("name~=//", EVERYTHING),
    # Commas are and.
    ("kind==active,labels.foo", "j"),
    ("kind==active,labels.foo,parent==layer-1", "j"),
    ("kind==active,kind==view", ""),
    ("labels.foo,name", "lj"),
    ('name=="look at, this",kind==view', "v"),
    ("name~=/[0-9]+/,name!=layer-1", "j"),
    # White space stands before a field, an operator and a value.
    (" name==base", "b"),
    ("name ==base", "b"),
    ("name== base", "b"),
    ("\tname \n== \r\v\fbase", "b"),
    ("name==base, kind==committed", "b"),
    ("labels. foo", "lj"),
    ('labels. "foo"', "lj"),
    ("\u00a0name\u2003==\u3000base", "b"),
    ("name~= /^b/", "b"),
    # What an unquoted value may hold.
    ("name==a|b", ""),
    ('name==a"b', ""),
    ("name==a==b", ""),
    ("name==a!b~c", ""),
    ("name==-", ""),
    ("name==(", ""),
    ("name==\\", ""),
    ("name=='base'", ""),
    ("name==`base`", ""),
    ("name==\x01", ""),
    ("name==\u200bx", ""),
    ("name==*", ""),
]

# filter -> where the error is, counted in characters from 0, and what was expected there.
MALFORMED = [
    (" ", 1, "a field"),
    (",", 0, "a field"),
    (".", 0, "a field"),
    ("==", 0, "a field"),
    ("name==base,", 11, "a field"),
    ("name==base,,kind", 11, "a field"),
    ("name==base, ", 12, "a field"),
    ("labels.", 7, "a field"),
    ("labels..foo", 7, "a field"),
    ("labels.,name", 7, "a field"),
    (".foo", 0, "a field"),
    ("?name", 0, "a field"),
    ('labels.?"a"', 7, "a field"),
    ("é==x", 0, "a field"),
    ("牛", 0, "a field"),
    ("-name", 0, "a field"),
    ("\0name", 0, "a field"),
    ("\ufffd", 0, "a field"),
    ("\x1cname", 0, "a field"),
    ("labels./foo/", 7, "a field"),
    ("labels.|foo|==x", 7, "a field"),
    ("'name'==x", 0, "a field"),
    ("name ", 5, "an operator"),
    ("name ,kind", 5, "an operator"),
    ("name .foo", 5, "an operator"),
    ("name kind", 5, "an operator"),
    ("name=base", 4, "an operator"),
    ("name!base", 4, "an operator"),
    ("name~base", 4, "an operator"),
    ("name===base", 4, "an operator"),
    ("name!==base", 4, "an operator"),
    ("name=~base", 4, "an operator"),
    ("name=", 4, "an operator"),
    ("name<base", 4, "an operator"),
    ("name-x==base", 4, "an operator"),
    ("namé==base", 3, "an operator"),
    ('"name"x==base', 6, "an operator"),
    ('name"x"', 4, "an operator"),
    ("name\0", 4, "an operator"),
    ("labels.containerd.io/gc.root==x", 20, "an operator"),
    ("name==", 6, "a value"),
    ("name!=", 6, "a value"),
    ("name~=", 6, "a value"),
    ("name== ", 7, "a value"),
    ("name==,kind", 6, "a value"),
    ("name~=,id?=?x", 6, "a value"),
    ("name==.foo", 6, "a value"),
    ("name~=.", 6, "a value"),
    ("name== =base", 7, "a value"),
    ("name==/base/", 6, "a value"),
    ("name==|base|", 6, "a value"),
    ("name!=/base/", 6, "a value"),
    ("name==/base", 6, "a value"),
    ("name==\0", 6, "a value"),
    ("name==\ufffd", 6, "a value"),
    ("name==base ", 10, "a comma or the end"),
    ("name==base ,kind", 10, "a comma or the end"),
    ("name==base kind", 10, "a comma or the end"),
    ('name=="base" ,kind', 12, "a comma or the end"),
    ('name=="base"x', 12, "a comma or the end"),
    ('name=="ba""se"', 10, "a comma or the end"),
    ("name~=/a/b/", 9, "a comma or the end"),
    ("name==a\x01", 7, "a comma or the end"),
    ("name==a\0b", 7, "a comma or the end"),
    ("name==a\ufffdb", 7, "a comma or the end"),
    ("name==a\u200b", 7, "a comma or the end"),
    ("name==a\ue000", 7, "a comma or the end"),
    ("name==a\u2028b", 7, "a comma or the end"),
    ('name=="base', 6, 'a closing "'),
    ('name=="', 6, 'a closing "'),
    ("name~=/base", 6, "a closing /"),
    ("name~=|base/", 6, "a closing |"),
    ('labels."foo', 7, 'a closing "'),
    ('name=="ba\nse"', 6, 'a closing "'),
    ('name=="ba\0se"', 6, 'a closing "'),
    ('name=="ba\ufffdse"', 6, 'a closing "'),
    (r'name=="\g"', 7, "one of the escapes"),
    (r'name=="\xaz"', 7, "one of the escapes"),
    (r'name=="\x4"', 7, "one of the escapes"),
    (r'name=="\8"', 7, "one of the escapes"),
    (r'name=="\18"', 7, "one of the escapes"),
    (r'name=="\400"', 7, "one of the escapes"),
    (r'name=="\u12"', 7, "one of the escapes"),
    (r'name=="\U0011000g"', 7, "one of the escapes"),
    (r'name=="\U00110000"', 7, "one of the escapes"),
    (r'name=="\/"', 7, "one of the escapes"),
    (r'name=="\|"', 7, "one of the escapes"),
    (r"""name=="\'" """, 7, "one of the escapes"),
    ('name=="\\\n"', 7, "one of the escapes"),
    ('name=="\\', 7, "one of the escapes"),
    (r'name=="a\"', 6, 'a closing "'),
    (r"name~=/\d/", 7, "one of the escapes"),
    (r"name~=/a\"/", 8, "one of the escapes"),
    (r"name~=/a\|b/", 8, "one of the escapes"),
    (r"name~=|a\/b|", 8, "one of the escapes"),
    # Here we part from the peer, in which the digits overflow into one byte.
    (r'name=="\UFFFFFF41"', 7, "one of the escapes"),
]


def matching(*filters: str) -> str:
    match = compile_filters(filters)
    return "".join(letter for letter, info in SNAPSHOTS.items() if match is None or match(info))


@pytest.mark.parametrize(("text", "letters"), MATCHING, ids=ascii)
def test_what_a_filter_matches(text, letters):
    assert matching(text) == letters


@pytest.mark.parametrize(("text", "position", "expected"), MALFORMED, ids=[ascii(row[0]) for row in MALFORMED])
def test_where_a_filter_is_malformed(text, position, expected):
    with pytest.raises(InvalidArgument) as caught:
        compile_filters(["name", text])
    details = caught.value.details
    assert (details["filter"], details["position"]) == (1, position)
    assert details["expected"].startswith(expected)
    assert f"filter 2, character {position + 1}: expected {expected}" in caught.value.message


def test_no_filter_and_an_empty_one_match_everything():
    assert compile_filters([]) is None
    assert compile_filters([""]) is None
    assert compile_filters(["name==base", ""]) is None


def test_an_empty_filter_does_not_hide_a_malformed_one():
    with pytest.raises(InvalidArgument):
        compile_filters(["", "name=x"])


def test_several_filters_are_or():
    assert matching("name==base", "kind==view") == "bv"
    assert matching("name==base,kind==view", "labels.foo,kind==active", "labels.moo") == "ju"
    assert matching("name==nobody", "name==nothing") == ""
    assert matching("name~=(", "name==base") == "b"


def test_no_more_filters_than_allowed():
    assert matching(*["name==base"] * FILTERS_MAX) == "b"
    with pytest.raises(InvalidArgument, match=f"{FILTERS_MAX + 1} filters"):
        compile_filters(["name"] * (FILTERS_MAX + 1))


def test_no_longer_filter_than_allowed():
    longest = 'name!="' + "é" * ((FILTER_BYTES_MAX - 8) // 2) + '"'
    assert len(longest.encode()) == FILTER_BYTES_MAX
    assert matching(longest) == EVERYTHING
    with pytest.raises(InvalidArgument, match=f"{FILTER_BYTES_MAX + 1} bytes"):
        compile_filters([longest + " "])


def test_no_more_selectors_than_allowed():
    assert matching(",".join(["name"] * SELECTORS_MAX)) == EVERYTHING
    with pytest.raises(InvalidArgument, match=f"{SELECTORS_MAX + 1} selectors"):
        compile_filters([",".join(["name"] * SELECTORS_MAX), "kind"])


def test_no_more_expressions_than_allowed():
    assert matching(*["name~=^b"] * EXPRESSIONS_MAX) == "b"
    with pytest.raises(InvalidArgument, match=f"{EXPRESSIONS_MAX + 1} expressions"):
        compile_filters([*["name~=b"] * (EXPRESSIONS_MAX - 1), "name~=b,kind~=b"])


def test_an_expression_over_its_memory_is_refused_and_not_taken_for_a_bad_one():
    with pytest.raises(InvalidArgument, match="bytes of memory"):
        compile_filters([r"name~=\pL{1000}"])


def test_an_expression_that_stalls_a_backtracking_engine_does_not_stall_this_one():
    match = compile_filters(["name~=(a+)+$"])
    assert match is not None
    began = time.process_time()
    assert not match(Info("a" * 4000 + "!", Kind.ACTIVE))
    assert time.process_time() - began < 1


def test_the_selectors_of_a_filter():
    assert parse_filter("") == ()
    assert parse_filter('labels."a b".c ~= |x\\|y|,kind') == (
        Selector(("labels", "a b", "c"), "~=", "x|y"),
        Selector(("kind",)),
    )


def go_quoted(value: str, quote: str = '"') -> str:
    """`value` as a Go program would quote it with %q, for any of the three quotes."""
    escaped = []
    for character in value:
        if character in ("\\", quote):
            escaped.append("\\" + character)
        elif character.isprintable() and character != "\ufffd":
            escaped.append(character)
        elif ord(character) < 0x80:
            escaped.append(f"\\x{ord(character):02x}")
        elif ord(character) < 0x10000:
            escaped.append(f"\\u{ord(character):04x}")
        else:
            escaped.append(f"\\U{ord(character):08X}")
    return quote + "".join(escaped) + quote


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(any_text)
def test_every_text_can_be_quoted(value):
    assert parse_filter(f"name=={go_quoted(value)}") == (Selector(("name",), "==", value),)
    match = compile_filters([f"labels.{go_quoted(value)}=={go_quoted(value)}"])
    assert match is not None
    assert match(Info("x", Kind.ACTIVE, labels={value: value}))
    assert not match(Info("x", Kind.ACTIVE, labels={value + "x": value}))


@given(any_text, st.sampled_from('"/|'))
def test_every_expression_can_be_quoted(value, quote):
    assert parse_filter(f"name~={go_quoted(value, quote)}") == (Selector(("name",), "~=", value),)


@given(st.binary(max_size=60))
def test_every_string_of_bytes_can_be_quoted(value):
    for form in ("\\x{:02x}", "\\{:03o}"):
        quoted = "".join(form.format(byte) for byte in value)
        (selector,) = parse_filter(f'name=="{quoted}"')
        assert selector.value.encode("utf-8", "surrogateescape") == value


@given(st.lists(st.text(st.sampled_from('nam.,=!~"/|\\x41u0 é\0\n()[]*labels'), max_size=40), max_size=4))
@example(["name==\ud800"])
@example(["name~=\udcff"])
@example(['name=="\ud800"'])
@example(["\ud800" * FILTER_BYTES_MAX])
def test_nothing_but_invalid_argument_comes_out(filters):
    try:
        match = compile_filters(filters)
    except InvalidArgument as error:
        json.dumps([error.message, dict(error.details)]).encode()
        error.message.encode()
    else:
        assert match is None or all(match(info) in (True, False) for info in SNAPSHOTS.values())


@given(st.text(st.characters(), max_size=80))
def test_nothing_but_invalid_argument_comes_out_of_any_text(text):
    try:
        match = compile_filters([text])
    except InvalidArgument as error:
        error.message.encode()
    else:
        assert match is None or all(match(info) in (True, False) for info in SNAPSHOTS.values())


def test_the_limits_are_those_of_the_specification():
    text = (Path(__file__).resolve().parents[1] / "docs" / "rfc" / "1-request.md").read_text()
    assert f"at most {SELECTORS_MAX} selectors and {EXPRESSIONS_MAX} expressions" in " ".join(text.split())
    assert f"more than {EXPRESSION_MEMORY_BYTES // 2**20} MiB of memory" in " ".join(text.split())
