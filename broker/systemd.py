"""What systemd is told (sd_notify(3)): that the daemon serves, that it stops, and that its loop turns."""

from __future__ import annotations

import os
import socket

import anyio

from broker.logs import get_logger

log = get_logger()


def notify(message: str) -> None:
    """Tell systemd, when it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
        try:
            channel.sendto(message.encode(), address)
        except OSError as error:
            log.warning("the service manager cannot be told", message=message, error=str(error))


async def keep_watchdog() -> None:
    """With `WatchdogSec=` in the unit: say that the loop turns, twice in the time after which systemd would kill it.

    It is said from the loop itself, so that a loop that hangs says nothing.
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await anyio.sleep(int(microseconds) / 2_000_000)
