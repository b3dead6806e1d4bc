"""The process of one snapshotter: reads its Setup from standard input, then serves its mailbox."""

from __future__ import annotations

import signal
import sys

import anyio
import msgspec
import structlog
import zmq

from broker import logs
from broker.actor.lineage import die_with_parent
from broker.actor.mailbox import Mailbox
from broker.snapshotter.actor import Setup, SnapshotterActor
from snapbroker.errors import BrokerError

REPORT_INTERVAL_S = 1.0

log = structlog.get_logger()


def main() -> int:
    """Run until the router says stop; the exit status tells the supervisor."""
    die_with_parent(int(sys.argv[1]))
    setup = msgspec.json.decode(sys.stdin.buffer.read(), type=Setup)
    # The broker handles the terminal's signals and tells its actors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(setup.log_level, setup.log_format)
    structlog.contextvars.bind_contextvars(snapshotter=setup.name)
    failed = False
    try:
        anyio.run(serve, setup)
    except* (BrokerError, OSError) as group:
        log.error("the snapshotter cannot run", errors=[str(error) for error in group.exceptions])
        failed = True
    return int(failed)


async def serve(setup: Setup) -> None:
    """Connect the mailbox to the snapshotter."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    actor: SnapshotterActor

    def receive(client: bytes, request_id: bytes, arrival: int, body: bytes) -> None:
        if actor.service is not None:
            actor.service.receive(client, request_id, arrival, body)

    mailbox = Mailbox(context, setup.endpoint, setup.identity.encode(), receive, lambda: actor.stop())
    actor = SnapshotterActor(setup, mailbox.reply, mailbox.events)

    async def report() -> None:
        while True:
            await anyio.sleep(REPORT_INTERVAL_S)
            mailbox.report(actor.report())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mailbox.port.run)
        tasks.start_soon(report)
        await actor.run(lambda: mailbox.ready(actor.report()))
        tasks.cancel_scope.cancel()
    mailbox.port.close()
    context.term()


if __name__ == "__main__":
    sys.exit(main())
