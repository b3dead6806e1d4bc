"""The composition root: gRPC server on one side, the broker's client on the other, signals, service manager."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import msgspec
import structlog

from snapbroker import aio
from snapbroker.errors import FailedPrecondition
from snapbroker_containerd import sockets
from snapbroker_containerd.config import Config
from snapbroker_containerd.service import Service
from snapbroker_containerd.targets import Targets

log = structlog.get_logger()

CONNECT_S_MIN: Final = 0.5
"""How long at least a connection to the broker is waited for."""


class Bridge:
    """One socket of containerd's, one connection to the broker."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGUSR1 logs the figures. FailedPrecondition where the socket is taken."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        config = self._config
        async with self._serving() as (service, client):

            def tell(event: str) -> None:
                log.info(event, **statistics(service, client))

            loop.add_signal_handler(signal.SIGUSR1, tell, "statistics")
            log.info("serving", socket=config.socket, broker=config.broker_endpoint, namespace=config.namespace)
            sockets.notify("READY=1")
            await stop.wait()
            sockets.notify("STOPPING=1")
            log.info("stopping")
        tell("stopped")

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[tuple[Service, aio.Broker]]:
        """A server that answers; at the end what is under way is finished, within bounds."""
        config = self._config
        wait = config.calls.wait_ms / 1000
        async with aio.connect(
            config.broker_endpoint,
            curve=config.curve,
            namespace=config.namespace,
            timeout=config.calls.call_timeout_ms / 1000,
            connect_timeout=max(wait, CONNECT_S_MIN),
            patience=wait,
        ) as client:
            targets = Targets(client, config.snapshotters)
            service = Service(targets, config.calls, commit_sync=config.commit_sync)
            server = grpc.aio.server(options=options(config), maximum_concurrent_rpcs=config.server.calls_max)
            server.add_generic_rpc_handlers((service.handler,))
            with sockets.place(config.socket, config.socket_mode):
                try:
                    server.add_insecure_port(f"unix:{config.socket}")
                except RuntimeError as error:
                    raise FailedPrecondition(f"{config.socket} cannot be listened on: {error}") from None
                await server.start()
            try:
                yield service, client
            finally:
                await server.stop(config.server.stop_grace_ms / 1000)
                # What was cut off is still to learn of it; then nobody needs the client any more.
                await ended(task for method in service.methods.values() for task in method.tasks)


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end."""
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
    # grpcio's own task looks after the call's once more.
    await asyncio.sleep(0)


def options(config: Config) -> list[tuple[str, Any]]:
    """The server's: messages as long as containerd's, and no socket shared with another process."""
    return [
        ("grpc.max_receive_message_length", config.server.message_bytes_max),
        ("grpc.max_send_message_length", config.server.message_bytes_max),
        ("grpc.so_reuseport", 0),
    ]


def statistics(service: Service, client: aio.Broker) -> dict[str, Any]:
    """The figures of every method that was called, and of the connection to the broker."""
    sent = client.statistics()
    return {
        "methods": {name: method.statistics() for name, method in service.methods.items() if method.calls},
        "broker": {**msgspec.structs.asdict(sent), "returned": service.returned},
    }
