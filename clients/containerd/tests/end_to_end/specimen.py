"""An image with one of everything that a layer can hold, to be found again in what was made of it.

`FACTS` says what a container of it must see, apart from any comparison with another snapshotter: a mistake that all of
them shared would show there.
"""

from __future__ import annotations

from benchmarks import images

NAME = "example.test/specimen:1"
LONG = "long-" + "n" * 250
DEEP = "/deep/" + "/".join(f"directory-{number:02}-{'d' * 60}" for number in range(12))
"""A path of more than 800 bytes: one that needs the extended headers of tar."""
UNICODE = "/names/grüße-żółć-文件-😀 with spaces, commas: and \\ backslashes"
CAPABILITY = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
"""security.capability, version 2: CAP_NET_RAW, permitted and effective at once."""
ODD_TIME = 987_654_321.5
FIRST_SECOND = 1.0


def build() -> images.Image:
    """The image; its layers build upon each other as those of a Dockerfile do."""
    image = images.Image(NAME)
    with image.layer() as layer:
        _base(layer)
    with image.layer() as layer:
        _kinds(layer)
    with image.layer() as layer:
        _changes(layer)
    with image.layer() as layer:
        _removals(layer)
    with image.layer() as layer:
        _returns(layer)
    return image


def _base(layer: images.Layer) -> None:
    layer.programs(*images.SHELL)
    layer.directory("/tmp", mode=0o1777)
    layer.directory("/etc", changed=ODD_TIME)
    layer.file("/etc/greeting", b"hello from the image\n")
    layer.file("/etc/emptied", b"something\n")
    layer.file("/etc/chmodded", b"the same content\n", mode=0o644)
    layer.file("/etc/gone", b"removed by a later layer\n")
    layer.file("/opaque/old", b"hidden\n")
    layer.directory("/opaque/old-directory/below")
    layer.file("/opaque/old-directory/below/file", b"hidden\n")
    layer.directory("/gone-directory")
    layer.file("/gone-directory/file", b"hidden\n")
    layer.file("/was-file", b"a file\n")
    layer.file("/was-directory/file", b"in a directory\n")


def _kinds(layer: images.Layer) -> None:
    layer.file("/kinds/setuid", b"#!/bin/sh\n", mode=0o6755, user=0, group=42)
    layer.file("/kinds/sticky", b"", mode=0o1644)
    layer.file("/kinds/nobody's", b"mine\n", mode=0o400, user=65534, group=65534)
    layer.file("/kinds/far-owner", b"mine\n", user=2_000_000_000, group=1_999_999_999)
    layer.file("/kinds/no-permissions", b"secret\n", mode=0)
    layer.file("/kinds/old", b"old\n", changed=FIRST_SECOND)
    layer.file("/kinds/xattrs", b"marked\n", xattrs={"user.note": "a note, żółć", "user.empty-looking": " "})
    layer.file("/kinds/capable", b"#!/bin/sh\n", mode=0o755, xattrs={"security.capability": CAPABILITY})
    layer.directory("/kinds/odd", mode=0o2751, user=12, group=34, changed=ODD_TIME, xattrs={"user.on": "a directory"})
    layer.device("/kinds/null", 1, 3, mode=0o666)
    layer.device("/kinds/far-device", 250, 70_000, mode=0o600)
    layer.device("/kinds/disk", 7, 200, block=True, mode=0o660)
    layer.fifo("/kinds/fifo", mode=0o622)
    layer.symlink("/kinds/dangling", "../no/such/file", user=5, group=6)
    layer.symlink("/kinds/greeting", "/etc/greeting")
    layer.file("/kinds/one", b"many names\n")
    layer.hardlink("/kinds/two", "/kinds/one")
    layer.hardlink("/elsewhere/three", "/kinds/one")
    layer.file("/kinds/large", bytes(range(256)) * 8192)
    layer.file(f"/names/{LONG}", b"long\n")
    layer.file(f"{DEEP}/file", b"deep\n")
    layer.file(UNICODE, b"unicode\n")
    layer.file("/names/new\nline", b"a line break in a name\n")


def _changes(layer: images.Layer) -> None:
    layer.file("/etc/emptied", b"")
    layer.file("/etc/chmodded", b"the same content\n", mode=0o600, user=1)
    layer.file("/kinds/two", b"a file of its own\n")
    layer.whiteout("/was-file")
    layer.directory("/was-file", mode=0o700)
    layer.file("/was-file/inside", b"a directory took its place\n")
    layer.whiteout("/was-directory")
    layer.file("/was-directory", b"a file took its place\n")


def _removals(layer: images.Layer) -> None:
    layer.whiteout("/etc/gone")
    layer.whiteout("/gone-directory")
    layer.whiteout("/elsewhere/three")
    layer.whiteout(f"/names/{LONG[:200]}")
    layer.directory("/opaque", mode=0o711)
    layer.opaque("/opaque")
    layer.file("/opaque/kept", b"beside the mark\n")


def _returns(layer: images.Layer) -> None:
    layer.file("/gone-directory/back", b"there again, alone\n")
    layer.file("/opaque/old", b"another file of that name\n")


FACTS: dict[str, tuple[str, str] | None] = {
    "bin/sh": ("-", "0o755"),
    "tmp": ("d", "0o1777"),
    "etc/greeting": ("-", "0o644"),
    "etc/chmodded": ("-", "0o600"),
    "etc/gone": None,
    "gone-directory": ("d", "0o755"),
    "gone-directory/file": None,
    "gone-directory/back": ("-", "0o644"),
    "was-file/inside": ("-", "0o644"),
    "was-directory": ("-", "0o644"),
    "opaque": ("d", "0o711"),
    "opaque/old": ("-", "0o644"),
    "opaque/old-directory": None,
    "opaque/kept": ("-", "0o644"),
    "elsewhere/three": None,
    "kinds/setuid": ("-", "0o6755"),
    "kinds/odd": ("d", "0o2751"),
    "kinds/null": ("c", "0o666"),
    "kinds/disk": ("b", "0o660"),
    "kinds/fifo": ("p", "0o622"),
    "kinds/dangling": ("l", "0o777"),
    f"names/{LONG}": ("-", "0o644"),
    f"{DEEP[1:]}/file": ("-", "0o644"),
    UNICODE[1:]: ("-", "0o644"),
}
"""Path to kind and mode; None for what must not be there."""
