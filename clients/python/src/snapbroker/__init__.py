"""The client of snapbrokerd: snapshots, their mounts and their events, for blocking and for asyncio programs.

    import snapbroker

    with snapbroker.connect() as broker:
        with broker.workspace(parent="base", commit_as="base-and-tools") as path:
            ...

`snapbroker.aio.connect` is the same for asyncio, `snapbroker.mount` makes the mounts, `snapbroker.errors` has
what can go wrong, `snapbroker.contract` what the words mean. What a program does not use is not imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from snapbroker import errors
from snapbroker.contract import Event, Info, Kind, Mount, Mounts, Usage
from snapbroker.errors import BrokerError
from snapbroker.protocol import Progress, StatusAnswer

if TYPE_CHECKING:
    from types import ModuleType

    from snapbroker import aio, mount
    from snapbroker.blocking import Broker, connect
    from snapbroker.keyfiles import Curve

__all__ = [
    "Broker",
    "BrokerError",
    "Curve",
    "Event",
    "Info",
    "Kind",
    "Mount",
    "Mounts",
    "Progress",
    "StatusAnswer",
    "Usage",
    "aio",
    "connect",
    "errors",
    "mount",
]

_ROOMS = {"Broker": "blocking", "Curve": "keyfiles", "connect": "blocking", "aio": "", "mount": ""}


def __getattr__(name: str) -> object:
    """What is loaded at its first use: a daemon needs the words and no client, a blocking program no loop."""
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module: ModuleType = importlib.import_module(f"{__name__}.{room or name}")
    found: object = getattr(module, name) if room else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
