import pytest

from backends.api import Pooled, Snapshot, Task
from backends.memory import Memory
from backends.testsuite import Bookkeeping
from snapbroker.contract import Kind


class TestMemory(Bookkeeping):
    keeps_files = False

    @pytest.fixture
    def backend(self, tmp_path):
        return Memory.open(tmp_path / "root", Memory.Options())

    def test_it_touches_no_disk(self, backend):
        backend.stock([1, 2], Task())
        backend.discard(1)
        assert not backend.root.exists()

    def test_it_is_pooled(self, backend):
        assert isinstance(backend, Pooled)

    def test_mounts_tell_kind_and_chain(self, backend):
        (mount,) = backend.mounts(Snapshot(9, Kind.ACTIVE, (8, 3)))
        assert (mount.type, mount.source, mount.options) == ("memory", "9", ("rw", "parents=8:3"))
