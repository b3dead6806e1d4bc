"""Mounts of an answer: the client plans what was asked for, or refuses before anything is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from snapbroker.contract import Mount
from snapbroker.errors import InvalidArgument, Unimplemented
from snapbroker.mount.plan import ID_MAX, escaped, plan, split_layers
from tests.fuzz import vectors
from tests.fuzz.draws import Draws

_TYPES: Final = ("overlay", "bind", "btrfs", "memory", "", "overlay\0")
_OPTIONS: Final = (
    "ro", "rw", "bind", "rbind", "nosuid", "suid", "nodev", "noexec", "noatime", "relatime", "strictatime", "atime",
    "defaults", "sync", "dirsync", "lazytime", "index=off", "metacopy=on", "userxattr", "volatile", "xino=auto",
    "subvol=/a", "subvolid=5", "compress=zstd", "loop", "X-containerd.a=b", "uidmap=0:1000:1", "gidmap=0:1000:1",
    "uidmap=0:0:4294967295,1:1:1", "lowerdir=/a", "lowerdir=/a:/b", "lowerdir=/a\\:b:/c\\\\", "upperdir=/u",
    "workdir=/w", "upperdir=u", "lowerdir=", "lowerdir=:", "lowerdir+=/a", "",
)  # fmt: skip
_PLACES: Final = ("/a", "overlay", "", "a", "/", "//a/../b", "/a\0b")
_TARGETS: Final = ("", "a", "/a/b", "..", "a/../b", "./a", "a\0")


def one(data: bytes) -> None:
    """One mount, and the layers of one text."""
    draws = Draws(data)
    options = tuple(_option(draws) for _ in range(draws.number(8)))
    mount = Mount(_one_of(draws, _TYPES), _one_of(draws, _PLACES), options, _one_of(draws, _TARGETS))
    _check_layers(draws.text())
    try:
        made = plan(mount)
    except (InvalidArgument, Unimplemented) as error:
        assert error.message
        return
    assert made.type == mount.type
    assert ".." not in made.target
    assert all("/" not in part for part in made.target)
    for path in (*made.lowers, *filter(None, (made.upper, made.work))):
        assert path.startswith("/")
    if made.type == "overlay":
        assert len(made.lowers) > 1 or made.upper
        assert bool(made.upper) == bool(made.work)
    else:
        assert made.source.startswith("/")
        assert not (made.lowers)
        assert not (made.upper)
        assert not (made.work)
    assert not any("\0" in text for text in (made.source, *made.lowers, made.upper, made.work, *made.target))
    asked = {option.partition("=")[0] for option in options}
    assert {key for key, _ in made.parameters} <= asked, "a parameter that nobody asked for"
    if made.attributes.read_only:
        assert "ro" in asked
    if made.mapping is not None:
        assert asked & {"uidmap", "gidmap"}
        for line in (made.mapping.users + "\n" + made.mapping.groups).split("\n"):
            assert all(0 <= int(number) <= ID_MAX for number in line.split())


def seeds() -> Iterator[bytes]:
    """Every option by itself in each type, and texts of many layers."""
    for kind in range(3):
        for number in range(len(_OPTIONS)):
            yield bytes((1, 0, number, 0, kind, 0, 0, 0, 0))
            yield bytes((3, 0, number, 0, _OPTIONS.index("lowerdir=/a:/b"), 0, 0, 0, kind, 0, 0, 0, 0))
    for text in (b"/a:/b", rb"/a\:b:/c", b"a:", b":", b"\\"):
        yield bytes((0, 0, 0, 0, 0, 0, 0, len(text))) + text
    yield from vectors.bodies("MountsAnswer")


def _one_of(draws: Draws, values: tuple[str, ...]) -> str:
    return draws.text() if draws.chance(8) else draws.choice(values)


def _option(draws: Draws) -> str:
    chosen = _one_of(draws, _OPTIONS)
    return f"{chosen.partition('=')[0]}={draws.text()}" if draws.chance(8) else chosen


def _check_layers(text: str) -> None:
    """Layers of a text, written again, are the same layers; and any path can be written as one."""
    layers = split_layers(text)
    assert split_layers(":".join(escaped(layer) for layer in layers)) == layers
    assert split_layers(escaped(text)) == [text]
