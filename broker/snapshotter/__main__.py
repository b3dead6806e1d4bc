"""The process of one snapshotter: reads its Setup from standard input, then serves its mailbox."""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys

import anyio
import msgspec

from backends import failpoints
from broker import logs, loop, privileges
from broker.actor.lineage import die_with_parent
from broker.actor.link import Link
from broker.actor.mailbox import Mailbox
from broker.snapshotter.actor import Setup, SnapshotterActor, kept_by
from snapbroker.errors import BrokerError

REPORT_INTERVAL_S = 1.0
LAST_WORDS_S = 1.0
"""How long what is still to be sent may take when all is done."""

log = logs.get_logger()


def main() -> int:
    """Run until the router says stop; the exit status tells the supervisor."""
    die_with_parent(int(sys.argv[1]))
    failpoints.arm(failpoints.ACTOR)
    line = socket.socket(fileno=int(sys.argv[2]))
    line.set_inheritable(False)
    setup = msgspec.json.decode(sys.stdin.buffer.read(), type=Setup)
    # The broker handles the terminal's signals and tells its actors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What the supervisor asks for before it kills an actor whose loop does not answer.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logs.configure(setup.log_level, setup.log_format)
    logs.bind(snapshotter=setup.name)
    failed = False
    try:
        loop.run(serve, setup, line, sys.argv[3] != "0")
    except* (BrokerError, OSError) as group:
        log.error("the snapshotter cannot run", errors=[str(error) for error in group.exceptions])
        failed = True
    return int(failed)


async def serve(setup: Setup, line: socket.socket, again: bool) -> None:
    """Connect the mailbox to the snapshotter; `again` when an earlier process has served."""
    actor: SnapshotterActor

    def receive(client: bytes, request_id: bytes, arrival: int, grant: bytes, body: bytes) -> None:
        if actor.service is not None:
            actor.service.receive(client, request_id, arrival, body, grant)

    def regrant(key: bytes, grant: bytes) -> None:
        if actor.service is not None:
            actor.service.regrant(key, grant)

    link = Link(line)
    mailbox = Mailbox(link, receive, lambda: actor.stop(), regrant)
    # Before the first thread and the first child: both have what their starter has.
    actor = SnapshotterActor(
        setup,
        mailbox.reply,
        mailbox.events,
        mailbox.aside,
        mailbox.together,
        lambda backend: privileges.keep(kept_by(type(backend))),
        again=again,
    )

    def ready() -> None:
        loop.settle()
        mailbox.ready(actor.report())

    async def report() -> None:
        while True:
            await anyio.sleep(REPORT_INTERVAL_S)
            mailbox.report(actor.report(), actor.vital)

    async with anyio.create_task_group() as tasks:
        mailbox.open()
        tasks.start_soon(report)
        await actor.run(ready)
        tasks.cancel_scope.cancel()
    await link.finish(LAST_WORDS_S)


if __name__ == "__main__":
    sys.exit(main())
