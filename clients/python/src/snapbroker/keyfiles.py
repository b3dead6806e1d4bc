"""Keys for a broker behind tcp: files of docs/rfc/3-access.md 3, arguments and variables, and nothing printed.

A key file has one `field = "value"` a line. A secret key only ever comes from a file that nobody else can read.
"""

from __future__ import annotations

import os
import stat
import struct
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from snapbroker.errors import AlreadyExists, FailedPrecondition, InvalidArgument

CLIENT_KEY_VARIABLE: Final = "SNAPBROKER_CLIENT_KEY"
SERVER_KEY_VARIABLE: Final = "SNAPBROKER_SERVER_KEY"
KEY_CHARACTERS: Final = 40
"""A key of 32 bytes in Z85."""
FILE_BYTES_MAX: Final = 64 * 1024
"""Longest key file: four short lines, and room for comments."""

_Z85: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")


@dataclass(frozen=True)
class Pair:
    """A public key and its secret one, which no `repr` shows."""

    public: str
    secret: str = field(repr=False)
    server: str = ""


@dataclass(frozen=True)
class Curve:
    """What a client needs to be let in, and to know its broker: its own pair, and the broker's public key."""

    public: str
    secret: str = field(repr=False)
    server: str
    source: str = ""
    """The file of the client's key, for messages."""

    @classmethod
    def load(cls, client_key: str | os.PathLike[str] | None = None, server_key: str | None = None) -> Curve | None:
        """The keys that arguments, variables and files name; None where no client key is named.

        `client_key` is a path, `server_key` a key or a path. InvalidArgument says file and reason.
        """
        path = os.fspath(client_key or "") or os.environ.get(CLIENT_KEY_VARIABLE)
        if not path:
            return None
        pair = read_secret(Path(path).expanduser())
        told = server_key or os.environ.get(SERVER_KEY_VARIABLE)
        server = server_key_of(told) if told else pair.server
        if not server:
            raise InvalidArgument(
                f"{path}: has no server_key: set {SERVER_KEY_VARIABLE} to the broker's public key, or to its server.pub"
            )
        return cls(pair.public, pair.secret, server, path)


def is_key(text: str) -> bool:
    """Whether this is a key in Z85: five characters each stand for 32 bits, which not all five do."""
    if not _has_form(text):
        return False
    try:
        z85.decode(text.encode())
    except struct.error:
        return False
    return True


def _has_form(text: str) -> bool:
    return len(text) == KEY_CHARACTERS and set(text) <= _Z85


def check_key(text: str, what: str) -> None:
    """InvalidArgument where this is no key in Z85; the message does not repeat it."""
    if not is_key(text):
        raise InvalidArgument(f"{what}: is no key of {KEY_CHARACTERS} characters in Z85")


def server_key_of(told: str) -> str:
    """The broker's public key: itself, or that in the file named."""
    if _has_form(told):
        check_key(told, "server key")
        return told
    path = Path(told).expanduser()
    fields = _fields(_read(path, secret=False), path)
    return _key(fields, "public_key", path)


def read_secret(path: Path) -> Pair:
    """The pair in a key file; InvalidArgument says file and reason."""
    fields = _fields(_read(path, secret=True), path)
    pair = Pair(
        _key(fields, "public_key", path),
        _key(fields, "secret_key", path),
        _key(fields, "server_key", path) if "server_key" in fields else "",
    )
    if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
        raise InvalidArgument(f"{path}: public_key is not that of secret_key")
    return pair


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        # Without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise InvalidArgument(f"{path}: is no regular file")
    with open(descriptor, "rb") as file:
        if secret and found.st_mode & 0o077:
            raise InvalidArgument(
                f"{path}: others can use this secret key (mode {stat.S_IMODE(found.st_mode):#o}): chmod 600 {path}"
            )
        text = file.read(FILE_BYTES_MAX + 1)
    if len(text) > FILE_BYTES_MAX:
        raise InvalidArgument(f"{path}: is longer than {FILE_BYTES_MAX} bytes")
    return text


def _fields(text: bytes, path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError):
        # The parser's own words may quote the line, and the secret with it.
        raise InvalidArgument(f'{path}: is no key file: lines are `field = "value"`, each field once') from None


def _key(fields: dict[str, object], name: str, path: Path) -> str:
    value = fields.get(name)
    if value is None:
        raise InvalidArgument(f"{path}: has no {name}")
    if not isinstance(value, str) or not is_key(value):
        raise InvalidArgument(f"{path}: {name} is no key of {KEY_CHARACTERS} characters in Z85")
    return value


# Making them.


def generate() -> tuple[str, str]:
    """A fresh pair: the public and the secret key."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def write(path: Path, fields: dict[str, str], about: str, mode: int) -> None:
    """A key file that did not exist, with `mode` from its first moment."""
    lines = [f"# {about}", *(f'{name} = "{value}"' for name, value in fields.items())]
    write_text(path, "\n".join(lines) + "\n", mode)


def write_text(path: Path, text: str, mode: int) -> None:
    """A file that did not exist, whole or not at all; AlreadyExists, FailedPrecondition."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "w") as file:
                file.write(text)
                os.fchmod(descriptor, mode)
                file.flush()
                os.fsync(descriptor)
            os.link(partial, path)
        finally:
            partial.unlink()
    except FileExistsError:
        raise AlreadyExists(f"{path} exists") from None
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be written: {error.strerror}") from None
