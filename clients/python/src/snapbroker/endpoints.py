"""Where the broker is and whose snapshots are meant: arguments first, then the environment, then the defaults."""

from __future__ import annotations

import os
from typing import Final

from snapbroker.contract import check_namespace
from snapbroker.errors import FailedPrecondition, InvalidArgument, NotFound
from snapbroker.keyfiles import Curve
from snapbroker.protocol import TARGET_BYTES_MAX, StatusAnswer

ENDPOINT_VARIABLE: Final = "SNAPBROKER_ENDPOINT"
EVENTS_ENDPOINT_VARIABLE: Final = "SNAPBROKER_EVENTS_ENDPOINT"
NAMESPACE_VARIABLE: Final = "SNAPBROKER_NAMESPACE"
SNAPSHOTTER_VARIABLE: Final = "SNAPBROKER_SNAPSHOTTER"
NAMESPACE: Final = "default"
"""The namespace where none is named."""

_IPC: Final = "ipc://"
_ANY_HOST: Final = ("*", "0.0.0.0", "[::]")  # noqa: S104 - recognised in an answer, never bound


def runtime_directory() -> str:
    """Where a broker of this user keeps its sockets: `/run/snapbroker` for root, else in the runtime directory."""
    if os.geteuid() == 0:
        return "/run/snapbroker"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}", "snapbroker")


def router_endpoint(given: str | None = None) -> str:
    """The ROUTER's endpoint: `given`, else SNAPBROKER_ENDPOINT, else the default socket; a path becomes `ipc://`."""
    chosen = given or os.environ.get(ENDPOINT_VARIABLE) or os.path.join(runtime_directory(), "router.sock")
    return _as_endpoint(chosen)


def events_endpoint(given: str | None, router: str) -> str | None:
    """The publisher's endpoint, None where only the broker's status can tell it.

    `given`, else SNAPBROKER_EVENTS_ENDPOINT, else `events.sock` beside an ipc router's socket.
    """
    chosen = given or os.environ.get(EVENTS_ENDPOINT_VARIABLE)
    if chosen:
        return _as_endpoint(chosen)
    path = router.removeprefix(_IPC)
    if path == router or path.startswith("@"):
        return None
    return _IPC + os.path.join(os.path.dirname(path), "events.sock")


def reachable_events_endpoint(status: StatusAnswer, router: str) -> str:
    """The publisher's endpoint as the status tells it; on the router's host where it is bound to every host."""
    sent = status.events_endpoint
    if not sent:
        raise FailedPrecondition(
            f"the broker at {router} names no endpoint of events; "
            f"pass events_endpoint or set {EVENTS_ENDPOINT_VARIABLE}"
        )
    for host in _ANY_HOST:
        if sent.startswith(f"tcp://{host}:") and router.startswith("tcp://"):
            return f"{router.rpartition(':')[0]}:{sent.rpartition(':')[2]}"
    return sent


def curve_for(
    given: Curve | str | os.PathLike[str] | None, router: str, publisher: str | None, server_key: str | None = None
) -> Curve | None:
    """The keys for these endpoints; None on a machine's own sockets, where the file system decides."""
    if not any(endpoint.startswith("tcp://") for endpoint in (router, publisher or "")):
        return None
    return given if isinstance(given, Curve) else Curve.load(given, server_key)


def namespace_or_default(given: str | None = None) -> str:
    """`given`, else SNAPBROKER_NAMESPACE, else `default`; InvalidArgument where it is malformed (C70)."""
    chosen = given or os.environ.get(NAMESPACE_VARIABLE) or NAMESPACE
    check_namespace(chosen)
    return chosen


def snapshotter_or_none(given: str | None = None) -> str | None:
    """`given`, else SNAPBROKER_SNAPSHOTTER, else None: the broker is asked for its only one."""
    chosen = given or os.environ.get(SNAPSHOTTER_VARIABLE) or None
    if chosen is not None:
        target_frame(chosen)
    return chosen


def target_frame(snapshotter: str) -> bytes:
    """The target frame that names `snapshotter`; InvalidArgument where no snapshotter can have that name."""
    try:
        target = snapshotter.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"snapshotter {snapshotter!r} is not text") from None
    if not 0 < len(target) <= TARGET_BYTES_MAX or "/" in snapshotter:
        raise InvalidArgument(f"snapshotter {snapshotter[:80]!r} must be 1 to {TARGET_BYTES_MAX} bytes without a '/'")
    return target


def only_snapshotter(status: StatusAnswer, router: str) -> str:
    """The broker's one snapshotter; InvalidArgument naming them where there are several, NotFound where none is."""
    names = [snapshotter.name for snapshotter in status.snapshotters]
    if not names:
        raise NotFound(f"the broker at {router} has no snapshotter; `snapbrokerd doctor` says why")
    if len(names) > 1:
        raise InvalidArgument(
            f"which snapshotter? pass one of {', '.join(names)}, or set {SNAPSHOTTER_VARIABLE}",
            {"snapshotters": names},
        )
    return names[0]


def _as_endpoint(text: str) -> str:
    """A bare path is a socket of this machine."""
    if "://" in text:
        return text
    return _IPC + os.path.abspath(os.path.expanduser(text))
