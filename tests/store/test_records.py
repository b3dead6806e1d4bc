"""Records and index keys: what goes in comes out, damage is told, order is kept."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.store.records import BROKEN, PLAIN_BYTES_MAX, Record, decode_record, encode_info, index_key
from snapbroker.contract import NAME_BYTES_MAX, NAMESPACE_BYTES_MAX, Info, Kind, Usage
from snapbroker.errors import Internal

U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=600)
LABELS = st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=50), max_size=5)
INFOS = st.builds(Info, NAMES, st.sampled_from(Kind), st.just("") | NAMES, LABELS, U64, U64)


def record_of(info: Info, flags: int, depth: int, numbers: tuple[int, int, int, int, int]) -> Record:
    return Record(info.kind, flags, depth, *numbers, encode_info(info))


RECORDS = st.builds(
    record_of, INFOS, st.sampled_from([0, BROKEN]), st.integers(0, 2**16 - 1), st.tuples(U64, U64, U64, U64, U64)
)
LMDB_KEY_BYTES_MAX = 511


@given(RECORDS)
def test_records_round_trip(record: Record) -> None:
    again = decode_record(record.encode())
    assert again == record
    assert decode_record(memoryview(record.encode())) == record
    assert again.decoded().kind is record.kind
    assert again.broken == (record.flags == BROKEN)
    assert again.usage == Usage(record.inodes, record.size)


@given(INFOS)
def test_an_info_is_stored_as_it_is_sent(info: Info) -> None:
    assert msgspec.msgpack.decode(encode_info(info), type=Info) == info
    assert encode_info(info) == msgspec.msgpack.encode(info)


@given(st.binary(max_size=100))
def test_damage_is_told_by_one_of_two_errors(value: bytes) -> None:
    with contextlib.suppress(ValueError, struct.error):
        assert isinstance(decode_record(value), Record)


@given(RECORDS, st.data())
def test_a_changed_bit_is_told(record: Record, data: st.DataObject) -> None:
    """Wherever it is, in the header or in the Info."""
    value = bytearray(record.encode())
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((ValueError, struct.error)):
        decode_record(bytes(value))


@given(RECORDS, st.data())
def test_a_value_cut_short_is_told(record: Record, data: st.DataObject) -> None:
    value = record.encode()
    with pytest.raises((ValueError, struct.error)):
        decode_record(value[: data.draw(st.integers(0, len(value) - 1))])


def test_an_info_that_is_none_is_told_as_damage() -> None:
    """Its checksum is right: it was written so."""
    record = Record(Kind.ACTIVE, 0, 0, 7, 0, 0, 0, 1, b"\x82\xa4name")
    with pytest.raises(Internal, match="snapshot 7 is damaged"):
        decode_record(record.encode()).decoded()


@given(NAMES, NAMES)
def test_index_keys_differ_as_names_do(one: str, other: str) -> None:
    assert (index_key("ns", one) == index_key("ns", other)) == (one == other)


@given(NAMES, NAMES)
def test_index_keys_are_in_the_order_of_names(one: str, other: str) -> None:
    """As far as the first 400 bytes tell it."""
    first, second = one.encode()[:PLAIN_BYTES_MAX], other.encode()[:PLAIN_BYTES_MAX]
    if first != second:
        assert (index_key("ns", one) < index_key("ns", other)) == (first < second)


@given(NAMES)
def test_namespaces_do_not_overlap(name: str) -> None:
    assert index_key("a", name).startswith(b"a\0")
    assert not index_key("a.b", name).startswith(b"a\0")


@pytest.mark.parametrize("size", [1, PLAIN_BYTES_MAX, PLAIN_BYTES_MAX + 1, NAME_BYTES_MAX])
def test_every_legal_name_fits_into_a_key(size: int) -> None:
    assert len(index_key("n" * NAMESPACE_BYTES_MAX, "x" * size)) <= LMDB_KEY_BYTES_MAX


def test_a_name_of_400_bytes_is_no_prefix_of_a_longer_one() -> None:
    plain, longer = index_key("ns", "n" * 400), index_key("ns", "n" * 401)
    assert len(plain) != len(longer)
    assert plain < longer
