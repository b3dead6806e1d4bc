from importlib.metadata import EntryPoint, EntryPoints

import pytest

from backends import registry
from backends.memory import Memory, MemoryOptions
from backends.overlayfs import Overlayfs
from snapbroker.errors import FailedPrecondition, NotFound


class Incomplete:
    """Not a backend: nearly everything is missing."""

    Options = MemoryOptions

    def create(self):
        raise NotImplementedError


class WrongOptions(Memory):
    Options = dict


THIS = "tests.backends.test_registry"


@pytest.fixture
def installed(monkeypatch):
    """Called with pairs of name and value, makes them the installed entry points."""

    def install(*pairs):
        points = EntryPoints(EntryPoint(name, value, registry.GROUP) for name, value in pairs)
        monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))

    return install


def test_our_own_are_installed():
    assert registry.load("overlayfs") is Overlayfs
    assert registry.load("memory") is Memory
    found = registry.available()
    assert found.backends["overlayfs"] is Overlayfs
    assert {"overlayfs", "native", "btrfs", "memory"} <= {*found.backends, *found.errors}


def test_an_unknown_name_says_what_is_installed(installed):
    installed(("zfs", "backends.memory:Memory"), ("memory", "backends.memory:Memory"))
    with pytest.raises(NotFound, match="no backend 'overlay' is installed; installed: memory, zfs"):
        registry.load("overlay")
    installed()
    with pytest.raises(NotFound, match="installed: none"):
        registry.load("overlay")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:Backend", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("backends.memory:NoSuchClass", "AttributeError"),
        ("backends.memory", "is not a class"),
        (f"{THIS}:Incomplete", "lacks close, commit, delete"),
        (f"{THIS}:WrongOptions", "Options that are not a subclass"),
    ],
)
def test_a_broken_one_is_named_and_keeps_nobody_else_out(installed, value, reason):
    installed(("memory", "backends.memory:Memory"), ("broken", value))
    found = registry.available()
    assert found.backends == {"memory": Memory}
    assert list(found.errors) == ["broken"]
    assert reason in found.errors["broken"]
    with pytest.raises(FailedPrecondition, match="'broken'"):
        registry.load("broken")
    assert registry.load("memory") is Memory


def test_two_of_one_name_are_neither(installed):
    installed(*[("memory", "backends.memory:Memory")] * 3)
    found = registry.available()
    assert found.backends == {}
    assert "more than one" in found.errors["memory"]
    with pytest.raises(FailedPrecondition, match="more than one"):
        registry.load("memory")
