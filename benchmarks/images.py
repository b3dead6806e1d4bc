"""Container images made of this machine's own files: an OCI archive that `ctr images import` takes, from no registry.

    image = Image("example.test/hello:1")
    with image.layer() as layer:
        layer.programs("sh", "cat")
        layer.file("/hello", b"hello", mode=0o640, user=7)
    with image.layer() as layer:
        layer.whiteout("/hello")
    image.write(Path("hello.tar"))

From the shell, `python -m benchmarks.images hello.tar` writes such an image, called `example.test/hello:1`, of a shell
and a few programs.

Every layer names the parent directories of what it holds with their attributes, as the usual tools do, so that a
directory's modification time does not depend on how a layer is applied.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import posixpath
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EPOCH = 1_500_000_000.0
"""The modification time of everything that is given none, in seconds."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
COMPRESSION_LEVEL = 1
"""Unpacking takes as long whatever the level is, and making an image should not take longer than using it."""
SHELL = ("sh", "cat", "chmod", "id", "ln", "ls", "mkdir", "mv", "rm", "sleep", "stat", "touch")
"""The programs of a small image: enough for a script that looks at files and changes them."""

_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


@dataclass(frozen=True)
class Blob:
    """Content that is addressed by its digest."""

    kind: str
    content: bytes

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return digest(self.content)

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """How another blob or the index refers to it."""
        return {"mediaType": self.kind, "digest": self.digest, "size": len(self.content), **more}


@dataclass(frozen=True)
class _Directory:
    mode: int = 0o755
    user: int = 0
    group: int = 0
    changed: float = EPOCH
    xattrs: Mapping[str, str] = field(default_factory=dict)


class Layer:
    """The entries of one layer, in the order in which they are added; paths start at the image's root."""

    def __init__(self, directories: dict[str, _Directory]) -> None:
        self._directories = directories
        self._listed: set[str] = set()
        self._output = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._output, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def directory(
        self,
        path: str,
        mode: int = 0o755,
        user: int = 0,
        group: int = 0,
        changed: float = EPOCH,
        xattrs: Mapping[str, str] | None = None,
    ) -> None:
        """A directory; what is given here holds in later layers too."""
        self._directories[path] = _Directory(mode, user, group, changed, dict(xattrs or {}))
        self._listed.discard(path)
        self._list(path)

    def file(
        self,
        path: str,
        content: bytes,
        mode: int = 0o644,
        user: int = 0,
        group: int = 0,
        changed: float = EPOCH,
        xattrs: Mapping[str, str] | None = None,
    ) -> None:
        """A regular file. Values of `xattrs` are text; a binary one is written as characters below 128."""
        self._add(path, tarfile.REGTYPE, mode, user, group, changed, xattrs, content=content)

    def copy(self, source: Path, path: str) -> None:
        """A file of this machine with its content, permissions and modification time."""
        status = source.stat()
        self.file(path, source.read_bytes(), stat.S_IMODE(status.st_mode), changed=int(status.st_mtime))

    def programs(self, *names: str) -> None:
        """Programs of this machine in /bin, and the shared libraries that they need where they look for them."""
        self._add_missing_directory("/bin")
        for name in names:
            found = shutil.which(name)
            if found is None:
                raise RuntimeError(f"not installed: {name}")
            real = Path(os.path.realpath(found))
            self.copy(real, f"/bin/{name}")
            for library in libraries(real):
                if library not in self._listed:
                    self.copy(Path(os.path.realpath(library)), library)
                    self._listed.add(library)

    def symlink(self, path: str, target: str, user: int = 0, group: int = 0) -> None:
        """A symbolic link."""
        self._add(path, tarfile.SYMTYPE, 0o777, user, group, link=target)

    def hardlink(self, path: str, target: str) -> None:
        """One more name of a file of this layer."""
        self._add(path, tarfile.LNKTYPE, 0o644, link=target.lstrip("/"))

    def device(self, path: str, major: int, minor: int, *, block: bool = False, mode: int = 0o600) -> None:
        """A device node."""
        kind = tarfile.BLKTYPE if block else tarfile.CHRTYPE
        self._add(path, kind, mode, device=(major, minor))

    def fifo(self, path: str, mode: int = 0o600) -> None:
        """A named pipe."""
        self._add(path, tarfile.FIFOTYPE, mode)

    def whiteout(self, path: str) -> None:
        """Take away what lower layers have at this path."""
        parent, name = posixpath.split(path)
        for known in [known for known in self._directories if known == path or known.startswith(f"{path}/")]:
            del self._directories[known]
        self._add(posixpath.join(parent, f".wh.{name}"), tarfile.REGTYPE, 0o600)

    def opaque(self, path: str) -> None:
        """Take away everything that lower layers have in this directory."""
        for known in [known for known in self._directories if known.startswith(f"{path}/")]:
            del self._directories[known]
        self._add(f"{path}/.wh..wh..opq", tarfile.REGTYPE, 0o600)

    def finish(self) -> bytes:
        """The layer as an uncompressed tar archive."""
        self._tar.close()
        return self._output.getvalue()

    def _add(
        self,
        path: str,
        kind: bytes,
        mode: int,
        user: int = 0,
        group: int = 0,
        changed: float = EPOCH,
        xattrs: Mapping[str, str] | None = None,
        *,
        content: bytes = b"",
        link: str = "",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._list(posixpath.dirname(path))
        entry = tarfile.TarInfo(path.lstrip("/"))
        entry.type, entry.mode, entry.uid, entry.gid, entry.mtime = kind, mode, user, group, changed
        entry.size, entry.linkname = len(content), link
        entry.devmajor, entry.devminor = device
        entry.pax_headers = {f"SCHILY.xattr.{name}": value for name, value in (xattrs or {}).items()}
        self._tar.addfile(entry, io.BytesIO(content))

    def _list(self, path: str) -> None:
        if path in ("", "/") or path in self._listed:
            return
        self._add_missing_directory(path)
        known = self._directories[path]
        self._listed.add(path)
        self._add(path, tarfile.DIRTYPE, known.mode, known.user, known.group, known.changed, known.xattrs)

    def _add_missing_directory(self, path: str) -> None:
        self._directories.setdefault(path, _Directory())


class Image:
    """An image in the making: layers from the lowest to the highest, and what a container of it runs."""

    def __init__(self, name: str, command: Sequence[str] = ("/bin/sh",)) -> None:
        self.name = name
        self._command = tuple(command)
        self._directories: dict[str, _Directory] = {}
        self._layers: list[Blob] = []
        self._differences: list[str] = []

    @contextlib.contextmanager
    def layer(self) -> Iterator[Layer]:
        """A layer on top of those that are there."""
        layer = Layer(self._directories)
        yield layer
        content = layer.finish()
        self._differences.append(digest(content))
        self._layers.append(Blob(_LAYER, gzip.compress(content, COMPRESSION_LEVEL, mtime=0)))

    def add_packed_layer(self, packed: bytes) -> None:
        """A finished layer, a tar archive under gzip, as `ctr snapshots diff` writes it."""
        self._differences.append(digest(gzip.decompress(packed)))
        self._layers.append(Blob(_LAYER, packed))

    def derived(self, name: str) -> Image:
        """An image of another name that starts with the layers of this one."""
        image = Image(name, self._command)
        image._directories = dict(self._directories)
        image._layers = list(self._layers)
        image._differences = list(self._differences)
        return image

    @property
    def chain(self) -> list[str]:
        """The names of the snapshots that containerd makes of the layers, lowest first: their chain ids."""
        names: list[str] = []
        for difference in self._differences:
            names.append(digest(f"{names[-1]} {difference}".encode()) if names else difference)
        return names

    @property
    def manifest(self) -> Blob:
        """The manifest, which is the digest by which `ctr snapshots unpack` knows the image."""
        config, layers = self._config().descriptor(), [layer.descriptor() for layer in self._layers]
        return _json_blob(_MANIFEST, {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers})

    @property
    def packed_bytes(self) -> int:
        """The size of all its layers as they travel."""
        return sum(len(layer.content) for layer in self._layers)

    def write(self, archive: Path) -> Path:
        """Write the image as an archive of an OCI layout; answers the path."""
        manifest = self.manifest
        naming = {"io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": self.name.split(":")[-1]}
        described = manifest.descriptor(
            platform={"os": "linux", "architecture": _architecture()}, annotations=naming
        )  # fmt: skip
        with tarfile.open(archive, "w") as tar:
            _add_file(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
            _add_file(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": [described]}).encode())
            for name, content in {
                blob.digest: blob.content for blob in (*self._layers, self._config(), manifest)
            }.items():
                _add_file(tar, f"blobs/{name.replace(':', '/')}", content)
        return archive

    def _config(self) -> Blob:
        return _json_blob(
            _CONFIG,
            {
                "architecture": _architecture(),
                "os": "linux",
                "config": {"Env": ["PATH=/bin"], "Cmd": list(self._command), "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": self._differences},
            },
        )


def of_a_shell(name: str) -> Image:
    """A shell with a few programs, and a second layer with a greeting in /etc/greeting."""
    image = Image(name)
    with image.layer() as layer:
        layer.programs(*SHELL)
        layer.directory("/tmp", mode=0o1777)
    with image.layer() as layer:
        layer.file("/etc/greeting", b"hello from a snapshot\n")
    return image


def of_tiny_layers(name: str, layers: int) -> Image:
    """A shell, and on top of it layers that hold one small file each: `/layers/<number>`, from 2 on."""
    image = Image(name)
    with image.layer() as layer:
        layer.programs("sh", "cat", "ls")
    for number in range(2, layers + 1):
        with image.layer() as layer:
            layer.file(f"/layers/{number}", f"layer {number}\n".encode())
    return image


def of_this_machine(name: str, layers: int = 12, size_bytes: int = 96 << 20) -> Image:
    """An image like those that are in use: programs, then libraries and thousands of small files, from this machine.

    A layer in the middle replaces files of the one below, and takes some away.
    """
    image = Image(name)
    with image.layer() as layer:
        layer.programs(*SHELL)
    share = size_bytes // (layers - 1)
    files = _material()
    last: list[str] = []
    for number in range(2, layers + 1):
        with image.layer() as layer:
            for path in last[1::20]:
                layer.whiteout(path)
            for path in last[2::20]:
                layer.file(path, b"replaced\n")
            last, size = [], 0
            for source in files:
                path = f"/usr/share/part-{number}/{source.relative_to('/')}"
                layer.copy(source, path)
                last.append(path)
                size += source.stat().st_size
                if size >= share:
                    break
            else:
                raise RuntimeError(f"this machine has too few files for an image of {size_bytes} bytes")
    return image


def digest(content: bytes) -> str:
    """The name of this content."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def libraries(program: Path) -> list[str]:
    """The shared libraries that a program loads, its loader among them; none for a static one."""
    answer = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return _LIBRARY.findall(answer.stdout)


def _material() -> Iterator[Path]:
    """Files of this machine, small and large ones, always in the same order: Python's own, then programs."""
    for top in (Path(sysconfig.get_path("stdlib")), Path("/usr/share"), Path("/usr/lib"), Path("/usr/bin")):
        for where, directories, names in os.walk(top):
            directories[:] = sorted(set(directories) - {"site-packages", "__pycache__"})
            for name in sorted(names):
                path = Path(where, name)
                status = path.lstat()
                # A few very large ones would make the rest of a layer of no weight.
                if stat.S_ISREG(status.st_mode) and status.st_size < 4 << 20:
                    yield path


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _json_blob(kind: str, content: Mapping[str, Any]) -> Blob:
    return Blob(kind, json.dumps(content, sort_keys=True).encode())


def _architecture() -> str:
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)


if __name__ == "__main__":
    of_a_shell("example.test/hello:1").write(Path(sys.argv[1]))
