"""The composition root: gRPC server on one side, the broker's client on the other, signals, service manager."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import structlog

from snapbroker import aio
from snapbroker.errors import FailedPrecondition
from snapbroker_containerd import sockets
from snapbroker_containerd.config import Config
from snapbroker_containerd.patience import Patience
from snapbroker_containerd.service import Service
from snapbroker_containerd.targets import Targets

log = structlog.get_logger()

CONNECT_S: Final = 0.5
"""How long one attempt waits for a connection to the broker, before it counts as failed and is repeated."""


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
        async with self._serving() as (service, patience, client):

            def tell(event: str) -> None:
                log.info(event, **statistics(service, patience, client))

            loop.add_signal_handler(signal.SIGUSR1, tell, "statistics")
            log.info("serving", socket=config.socket, broker=config.broker_endpoint, namespace=config.namespace)
            sockets.notify("READY=1")
            await stop.wait()
            sockets.notify("STOPPING=1")
            log.info("stopping")
        tell("stopped")

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[tuple[Service, Patience, aio.Broker]]:
        """A server that answers; at the end what is under way is finished, within bounds."""
        config = self._config
        async with aio.connect(
            config.broker_endpoint,
            namespace=config.namespace,
            timeout=config.calls.call_timeout_ms / 1000,
            connect_timeout=CONNECT_S,
            # What is away is waited for here, where a lost answer is looked for.
            patience=0,
        ) as client:
            patience = Patience(config.patience)
            targets = Targets(client, config.snapshotters)
            service = Service(targets, patience, config.calls, commit_sync=config.commit_sync)
            server = grpc.aio.server(options=options(config), maximum_concurrent_rpcs=config.server.calls_max)
            server.add_generic_rpc_handlers((service.handler,))
            with sockets.place(config.socket, config.socket_mode):
                try:
                    server.add_insecure_port(f"unix:{config.socket}")
                except RuntimeError as error:
                    raise FailedPrecondition(f"{config.socket} cannot be listened on: {error}") from None
                await server.start()
            try:
                yield service, patience, client
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


def statistics(service: Service, patience: Patience, client: aio.Broker) -> dict[str, Any]:
    """The figures of every method that was called, of repetitions, and of the connection to the broker."""
    sent = client.statistics()
    return {
        "methods": {name: method.statistics() for name, method in service.methods.items() if method.calls},
        "patience": patience.statistics(),
        "broker": {"requests": sent.requests, "calls": sent.calls, "under_way": sent.under_way, "stray": sent.stray},
    }
