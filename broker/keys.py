"""The key directory: one file a client says who may connect and what it may do; read again when something changes.

    NAME.toml    a client: public_key, role, namespaces, snapshotters
    NAME.key     its secret key, until it is taken to the client: never read here
    server.key   the broker's own pair
    server.pub   the public half of it, for clients

The names and forms are those of docs/rfc/3-access.md, 3.2 and 5. A file that is not in order lets nobody in, and
concerns no other.
"""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import msgspec

from broker.access import ENTRIES_MAX, ROLES, Grant, Role, encode_grant
from broker.logs import get_logger
from snapbroker import keyfiles
from snapbroker.contract import check_namespace
from snapbroker.errors import AlreadyExists, BrokerError, FailedPrecondition, InvalidArgument, NotFound

log = get_logger()

SERVER: Final = "server"
"""The name that no client can have."""
NAME_CHARACTERS_MAX: Final = 64
_FIRST: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_CHARACTERS: Final = _FIRST | frozenset("._-")
FILE_BYTES_MAX: Final = 64 * 1024
"""Longest file of a client: 64 namespaces of 76 bytes, and room for comments."""
ALL: Final = "*"

_MOMENTARY: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO))
"""Why a file cannot be read at the moment, which says nothing about who may come in."""

Signature = tuple[tuple[str, int, int, int, int, int, int], ...]


class ClientFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client's file, as it is written."""

    public_key: str
    role: str = "read"
    namespaces: tuple[str, ...] = ()
    snapshotters: tuple[str, ...] = (ALL,)


@dataclass(frozen=True)
class Entry:
    """One client that may connect."""

    name: str
    grant: Grant
    frame: bytes


@dataclass(frozen=True)
class Listing:
    """What a directory holds: clients by public key, and the files that are not in order, with the reason."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    bad: Mapping[str, str] = field(default_factory=dict)


def check_name(name: str) -> None:
    """InvalidArgument where no client can have this name: it becomes the name of a file."""
    if not 0 < len(name) <= NAME_CHARACTERS_MAX or name[0] not in _FIRST or not set(name) <= _CHARACTERS:
        raise InvalidArgument(
            f"{name[:80]!r} is no name for a key: 1 to {NAME_CHARACTERS_MAX} letters, digits, '.', '_' and '-', "
            "the first a letter or a digit"
        )
    if name == SERVER:
        raise InvalidArgument(f"{SERVER!r} is the broker's own key: choose another name")


def read_client(path: Path) -> Entry:
    """One client's file; InvalidArgument says file and reason."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _MOMENTARY:
            raise
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise InvalidArgument(f"{path}: is no regular file")
    with open(descriptor, "rb") as file:
        _check_kept(found, path)
        text = file.read(FILE_BYTES_MAX + 1)
    if len(text) > FILE_BYTES_MAX:
        raise InvalidArgument(f"{path}: is longer than {FILE_BYTES_MAX} bytes")
    try:
        written = msgspec.convert(tomllib.loads(text.decode()), ClientFile)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        # Beside its own error, tomllib lets out those of numbers too long and of tables too deep.
        raise InvalidArgument(f"{path}: not TOML: {error}") from None
    try:
        check_name(path.stem)
        return _entry(path.stem, written)
    except BrokerError as error:
        raise InvalidArgument(f"{path}: {error.message}") from None


def _entry(name: str, found: ClientFile) -> Entry:
    keyfiles.check_key(found.public_key, "public_key")
    if found.role not in ROLES:
        raise InvalidArgument(f"role: {found.role!r} is not {', '.join(ROLES)}")
    namespaces = _all_or(found.namespaces, "namespaces")
    for namespace in namespaces or ():
        check_namespace(namespace)
    grant = Grant(
        client=name,
        role=Role[found.role.upper()],
        key=found.public_key,
        namespaces=namespaces,
        snapshotters=_all_or(found.snapshotters, "snapshotters"),
    )
    return Entry(name, grant, encode_grant(grant))


def _all_or(names: tuple[str, ...], what: str) -> tuple[str, ...] | None:
    if len(names) > ENTRIES_MAX:
        raise InvalidArgument(f"{what}: {len(names)} are more than {ENTRIES_MAX}")
    if ALL in names and names != (ALL,):
        raise InvalidArgument(f'{what}: ["*"] is all of them, and stands alone')
    return None if names == (ALL,) else names


def _check_kept(found: os.stat_result, path: Path) -> None:
    """Whoever can write to a file of the directory says who may come in."""
    if found.st_uid not in (0, os.geteuid()):
        raise InvalidArgument(f"{path}: belongs to user {found.st_uid}: chown it to root or to the broker's user")
    if found.st_mode & 0o022:
        raise InvalidArgument(f"{path}: others can write to it: chmod go-w {path}")


def check_directory(directory: Path) -> None:
    """FailedPrecondition where there is no such directory, or others can write to it."""
    try:
        found = directory.stat()
    except OSError as error:
        if error.errno in _MOMENTARY:
            raise
        raise FailedPrecondition(
            f"{directory}: {error.strerror}: `snapbrokerd keys new NAME --directory {directory}` makes it"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise FailedPrecondition(f"{directory}: is no directory")
    if found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid()):
        raise FailedPrecondition(
            f"{directory}: others can write to it, and so let anybody in: chown it to the broker's user, and "
            f"chmod go-w {directory}"
        )


def read_directory(directory: Path) -> Listing:
    """All clients of a directory."""
    entries: dict[str, Entry] = {}
    bad: dict[str, str] = {}
    for path in sorted(directory.glob("*.toml")):
        try:
            entry = read_client(path)
            other = entries.setdefault(entry.grant.key, entry)
            if other is not entry:
                raise InvalidArgument(f"{path}: has the public key of {other.name!r}")
        except BrokerError as error:
            bad[path.name] = error.message
    return Listing(entries, bad)


def signature_of(directory: Path) -> Signature:
    """What differs when a file was changed, replaced, added or taken away."""
    found = []
    for path in directory.glob("*.toml"):
        try:
            one = path.stat()
        except OSError:
            found.append((path.name, 0, 0, 0, 0, 0, 0))
            continue
        found.append((path.name, one.st_ino, one.st_mtime_ns, one.st_ctime_ns, one.st_size, one.st_mode, one.st_uid))
    return tuple(sorted(found))


class Keyring:
    """The clients that may connect, as the directory has them."""

    def __init__(self, directory: Path, reread_ms: int) -> None:
        check_directory(directory)
        self.directory = directory
        self._reread_ms = reread_ms
        self.server = keyfiles.read_secret(directory / f"{SERVER}.key")
        self._seen = signature_of(directory)
        self.listing = read_directory(directory)
        self.changes = 0
        self._lenient = False
        self._tell_bad(Listing())
        if not self.listing.entries:
            log.warning("no client has a key: `snapbrokerd keys new NAME` makes one", directory=str(directory))

    def entry(self, key: str) -> Entry | None:
        """The client with this public key; None where none has it."""
        return self.listing.entries.get(key)

    def _tell_bad(self, before: Listing) -> None:
        for name, reason in self.listing.bad.items():
            if before.bad.get(name) != reason:
                log.error("a client's key file is not in order and lets nobody in", file=name, reason=reason)

    async def watch(self, changed: Callable[[Mapping[str, Entry], Mapping[str, Entry]], None]) -> None:
        """Read again what changes, until cancelled; `changed` gets the clients before and after."""
        while True:
            await anyio.sleep(self._reread_ms / 1000)
            try:
                found = await anyio.to_thread.run_sync(self._look)
            except OSError as error:
                log.error("the key directory cannot be read: the keys stay as they were", error=str(error))
                continue
            except BrokerError as error:
                found = (Listing(), ()) if self.listing.entries else None
                if found is not None:
                    log.error("the key directory is not in order: nobody is let in", reason=error.message)
            if found is None:
                continue
            before, (self.listing, self._seen) = self.listing, found
            self.changes += 1
            self._tell_bad(before)
            if before.entries != self.listing.entries:
                changed(before.entries, self.listing.entries)

    def _look(self) -> tuple[Listing, Signature] | None:
        check_directory(self.directory)
        # Before the files: what changes while they are read is seen the next time.
        signature = signature_of(self.directory)
        if signature == self._seen:
            return None
        listing = read_directory(self.directory)
        spoiled = listing.bad.keys() - self.listing.bad.keys()
        self._lenient = bool(spoiled) and not self._lenient
        if not self._lenient:
            return listing, signature
        # An editor may be in the middle of writing it: who was good stays so until the next look, and no longer.
        kept = {key: entry for key, entry in self.listing.entries.items() if f"{entry.name}.toml" in spoiled}
        bad = {name: reason for name, reason in listing.bad.items() if name not in spoiled}
        return Listing({**kept, **listing.entries}, bad), ()

    def statistics(self) -> dict[str, int]:
        """For `status`."""
        return {"keys": len(self.listing.entries), "keys_bad": len(self.listing.bad), "rereads": self.changes}


# What the command does.


def make(
    directory: Path, name: str, role: str, namespaces: tuple[str, ...], snapshotters: tuple[str, ...]
) -> tuple[Path, Path]:
    """A new client: its own secret file, and its file in the directory; the broker's pair too where it has none."""
    check_name(name)
    public, secret = keyfiles.generate()
    found = ClientFile(public_key=public, role=role, namespaces=namespaces, snapshotters=snapshotters or (ALL,))
    _entry(name, found)
    _make_directory(directory)
    server = _server(directory)
    ours, theirs = directory / f"{name}.toml", directory / f"{name}.key"
    for path in (ours, theirs):
        if path.exists() or path.is_symlink():
            raise AlreadyExists(f"{path} exists: revoke it first, or choose another name")
    fields = {"name": name, "public_key": public, "secret_key": secret, "server_key": server}
    keyfiles.write(theirs, fields, f"The secret key of {name}: whoever has it is {name}.", 0o600)
    keyfiles.write_text(ours, _client_text(name, found), 0o644)
    return ours, theirs


def _client_text(name: str, found: ClientFile) -> str:
    def array(names: tuple[str, ...]) -> str:
        return "[" + ", ".join(f'"{one}"' for one in names) + "]"

    return (
        f"# {name}, a client of the broker over tcp. It is read again when it changes; without it nobody is let in.\n"
        f'public_key = "{found.public_key}"\n'
        "# read, write or admin.\n"
        f'role = "{found.role}"\n'
        '# Whose snapshots and events; ["*"] is all.\n'
        f"namespaces = {array(found.namespaces)}\n"
        f"snapshotters = {array(found.snapshotters)}\n"
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{directory} cannot be made: {error.strerror}: name another --directory") from None
    check_directory(directory)


def _server(directory: Path) -> str:
    """The broker's public key, made with its secret one where there is none."""
    path = directory / f"{SERVER}.key"
    if path.exists():
        public = keyfiles.read_secret(path).public
    else:
        public, secret = keyfiles.generate()
        keyfiles.write(path, {"public_key": public, "secret_key": secret}, "The broker's own secret key.", 0o600)
    if not (directory / f"{SERVER}.pub").exists():
        about = "The broker's public key: what its clients need to know that it is their broker."
        keyfiles.write(directory / f"{SERVER}.pub", {"public_key": public}, about, 0o644)
    return public


def revoke(directory: Path, name: str) -> list[Path]:
    """Take a client's files away, its secret one too where it still lies here; answers which."""
    check_name(name)
    check_directory(directory)
    removed = []
    for path in (directory / f"{name}.toml", directory / f"{name}.key"):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be removed: {error.strerror}") from None
        removed.append(path)
    if not removed:
        raise NotFound(f"{directory} has no key of {name!r}; `snapbrokerd keys list` shows those it has")
    return removed
