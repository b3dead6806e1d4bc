"""A cache with a limit of memory: least used goes first, and it never has more than it counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.cache import ENTRY_BYTES, SizedCache

Step = tuple[str, int, bytes]
STEPS = st.lists(st.tuples(st.sampled_from(("get", "put", "drop")), st.integers(0, 5), st.binary(max_size=200)))


@given(STEPS)
def test_it_is_what_a_list_in_the_order_of_use_would_be(steps: list[Step]) -> None:
    cache: SizedCache[int, bytes] = SizedCache(1000, lambda _, value: len(value))
    kept: list[tuple[int, bytes]] = []

    def size() -> int:
        return sum(ENTRY_BYTES + len(value) for _, value in kept)

    def without(key: int) -> list[tuple[int, bytes]]:
        return [entry for entry in kept if entry[0] != key]

    for step, key, value in steps:
        known = dict(kept).get(key)
        if step == "get":
            assert cache.get(key) == known
            kept = without(key) + ([] if known is None else [(key, known)])
        elif step == "put":
            cache.put(key, value)
            kept = [*without(key), (key, value)]
            while size() > 1000:
                del kept[0]
        else:
            cache.drop(key)
            kept = without(key)
        assert (len(cache), cache.bytes) == (len(kept), size())
    assert [cache.get(key) for key, _ in kept] == [value for _, value in kept]


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:

    cache: SizedCache[str, bytes] = SizedCache(1000, lambda _, value: len(value))
    cache.put("large", bytes(1001))
    assert (cache.get("large"), len(cache), cache.bytes) == (None, 0, 0)
