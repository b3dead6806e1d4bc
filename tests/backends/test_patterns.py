import os
import time

import pytest

from backends import patterns
from backends.api import Task
from backends.patterns import BYTES_MAX, ENTRIES_MAX, PATTERNS_MAX, REST_S, Patterns
from snapbroker.errors import Cancelled
from tests.backends.test_copying import ACL, CancelledAfter, picture

pytestmark = pytest.mark.root


@pytest.fixture
def clock(monkeypatch):
    """The two clocks that patterns look at: `passed` seconds after the test began, the wall's `behind` that."""
    clock = Clock()
    monkeypatch.setattr(patterns.time, "monotonic", lambda: clock.passed)
    real = time.time_ns
    monkeypatch.setattr(patterns.time, "time_ns", lambda: real() + int((clock.passed - clock.behind) * 1e9))
    return clock


class Clock:
    passed = 0.0
    behind = 0.0


@pytest.fixture
def source(scratch):
    source = scratch / "source"
    (source / "directory/inner").mkdir(parents=True)
    for number in range(5):
        (source / f"directory/file-{number}").write_bytes(os.urandom(1000 * number))
    (source / "directory/read-only").write_text("text")
    (source / "directory/read-only").chmod(0o444)
    (source / "special").write_text("text")
    os.chown(source / "special", 12, 34)
    (source / "special").chmod(0o6755)
    (source / "link").symlink_to("somewhere")
    os.utime(source / "link", ns=(5, 6), follow_symlinks=False)
    os.chown(source / "directory/inner", 56, 78)
    (source / "directory/inner").chmod(0o1777)
    os.utime(source / "directory/inner", ns=(1, 2))
    os.chown(source, 9, 10)
    source.chmod(0o2750)
    return source


def remembered(clock, id_=1):
    """Patterns that take one of a tree when it is copied next."""
    known = Patterns()
    known.copied(id_, 10, 15_000)
    clock.passed += 10
    return known


def copied(known, source, target, task=None, id_=1):
    target.mkdir()
    return known.copy(id_, str(source), str(target), task or Task())


class TestCopy:
    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
    def test_it_cannot_be_told_from_its_original(self, source, scratch, clock, umask):
        known = remembered(clock)
        before = os.umask(umask)
        try:
            for number in range(2):
                assert copied(known, source, scratch / f"copy-{number}")
                assert picture(scratch / f"copy-{number}") == picture(source)
        finally:
            os.umask(before)

    def test_files_are_not_opened_again(self, source, scratch, clock, monkeypatch):
        known = remembered(clock)
        assert copied(known, source, scratch / "copy")
        opened = []
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, *rest, **names: opened.append(path) or real(path, *rest, **names))
        assert copied(known, source, scratch / "other")
        assert opened
        assert not [path for path in opened if str(path).startswith(str(source))]

    def test_what_is_made_inherits_nothing_from_where_it_is_made(self, source, scratch, clock):
        place = scratch / "place"
        place.mkdir()
        os.chown(place, 0, 4321)
        os.setxattr(place, "system.posix_acl_default", ACL)
        place.chmod(0o2777)
        assert copied(remembered(clock), source, place / "copy")
        assert picture(place / "copy") == picture(source)

    def test_progress_counts_as_in_any_copy(self, source, scratch, clock):
        task = Task()
        assert copied(remembered(clock), source, scratch / "copy", task)
        assert (task.entries, task.bytes) == (11, 10_000 + 4 + 4)

    def test_it_is_taken_back_in_the_middle(self, source, scratch, clock):
        known = remembered(clock)
        with pytest.raises(Cancelled):
            copied(known, source, scratch / "copy", CancelledAfter(3))
        assert copied(known, source, scratch / "other")


class TestChanges:
    """Nothing is copied that is not in the tree at the moment."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda source: (source / "directory/file-2").write_bytes(bytes(2000)),
            lambda source: (source / "directory/file-2").chmod(0o600),
            lambda source: (source / "directory/file-2").unlink(),
            lambda source: (source / "directory/one-more").touch(),
            lambda source: os.setxattr(source / "directory/file-1", "user.note", b"text"),
            lambda source: os.rename(source / "directory/file-1", source / "directory/file-2"),
            lambda source: os.link(source / "directory/file-1", source.parent / "second-name"),
            lambda source: os.utime(source, ns=(1, 2)),
        ],
    )
    def test_a_tree_that_changed_is_copied_the_long_way(self, source, scratch, clock, change):
        known = remembered(clock)
        assert copied(known, source, scratch / "copy")
        change(source)
        assert not copied(known, source, scratch / "other")
        assert os.listdir(scratch / "other") == []
        assert not copied(known, source, scratch / "third"), "the pattern is dropped"

    def test_access_times_are_those_of_the_moment(self, source, scratch, clock):
        known = remembered(clock)
        assert copied(known, source, scratch / "copy")
        before = os.stat(source / "directory/file-3").st_atime_ns
        (source / "directory/file-3").read_bytes()
        assert os.stat(source / "directory/file-3").st_atime_ns > before
        assert copied(known, source, scratch / "other")
        assert picture(scratch / "other") == picture(source)

    def test_what_changed_a_moment_ago_is_not_remembered(self, source, scratch, clock):
        known = Patterns()
        known.copied(1, 10, 15_000)
        clock.passed = REST_S
        (source / "special").touch()
        clock.behind = REST_S
        assert not copied(known, source, scratch / "copy")


class TestFitness:
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda source: os.setxattr(source / "special", "user.note", b"text"),
            lambda source: os.setxattr(source / "directory", "system.posix_acl_default", ACL),
            lambda source: os.link(source / "special", source / "second-name"),
            lambda source: os.mkfifo(source / "fifo"),
            lambda source: os.truncate(source / "special", 1 << 16),
            lambda source: (source / "large").write_bytes(os.urandom(BYTES_MAX)),
            lambda source: [(source / f"more-{number}").touch() for number in range(ENTRIES_MAX)],
        ],
    )
    def test_only_small_plain_trees_have_patterns(self, source, scratch, clock, spoil):
        spoil(source)
        os.sync()
        known = remembered(clock)
        assert not copied(known, source, scratch / "copy")
        assert not copied(known, source, scratch / "other")

    def test_a_tree_that_is_large_is_not_looked_at(self, source, scratch, clock):
        known = Patterns()
        known.copied(1, ENTRIES_MAX + 1, 0)
        known.copied(2, 1, BYTES_MAX + 1)
        clock.passed += 10
        for id_ in (1, 2):
            assert not copied(known, source, scratch / f"copy-{id_}", id_=id_)

    def test_a_first_copy_is_no_reason_to_remember(self, source, scratch, clock):
        known = Patterns()
        assert not copied(known, source, scratch / "copy")
        known.copied(1, 10, 15_000)
        assert not copied(known, source, scratch / "soon")
        clock.passed += 10
        assert copied(known, source, scratch / "later")

    def test_only_so_many_are_remembered(self, source, scratch, clock):
        known = Patterns()
        for id_ in range(PATTERNS_MAX + 1):
            known.copied(id_, 10, 15_000)
        clock.passed += 10
        assert not copied(known, source, scratch / "first", id_=0)
        assert copied(known, source, scratch / "last", id_=PATTERNS_MAX)
