"""The fork server's process, and the actors that it becomes: each learns its Setup, then serves its mailbox."""

from __future__ import annotations

import faulthandler
import signal
import socket
import sys

import anyio
import msgspec
from setproctitle import setproctitle

from backends import failpoints
from broker import logs, loop, privileges
from broker.actor.forks import Forks, ForkServer
from broker.actor.lineage import die_with_parent
from broker.actor.link import Link, first_message
from broker.actor.mailbox import Mailbox
from broker.snapshotter import hands
from broker.snapshotter.actor import ACTOR, Setup, SnapshotterActor
from broker.snapshotter.hands import HAND
from snapbroker.errors import BrokerError

REPORT_INTERVAL_S = 1.0
LAST_WORDS_S = 1.0
"""How long what is still to be sent may take when all is done."""

log = logs.get_logger()


def main() -> None:
    """Be the fork server of a broker, whose process id and end of a connection are the arguments."""
    die_with_parent(int(sys.argv[1]))
    owner = socket.socket(fileno=int(sys.argv[2]))
    owner.set_inheritable(False)
    # The broker handles the terminal's signals and tells its actors.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setproctitle("snapbrokerd: fork server")
    privileges.rest()
    loop.settle()
    ForkServer(owner, {ACTOR: run, HAND: hands.run}).run()


def run(again: int, forks: Forks, given: list[int]) -> int:
    """Be an actor until the router says stop; `again` when an earlier process has served. Given: the mailbox's line."""
    privileges.rise()
    failpoints.arm(failpoints.ACTOR)
    line = socket.socket(fileno=given[0])
    _, body = first_message(line)
    setup = msgspec.json.decode(body, type=Setup)
    setproctitle(f"snapbrokerd: {setup.name}")
    # What the supervisor asks for before it kills an actor whose loop does not answer.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logs.configure(setup.log_level, setup.log_format)
    logs.bind(snapshotter=setup.name)
    failed = False
    try:
        loop.run(serve, setup, line, forks, bool(again))
    except* (BrokerError, OSError) as group:
        log.error("the snapshotter cannot run", errors=[str(error) for error in group.exceptions])
        failed = True
    return int(failed)


async def serve(setup: Setup, line: socket.socket, forks: Forks, again: bool) -> None:
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
        forks,
        mailbox.reply,
        mailbox.events,
        mailbox.aside,
        mailbox.together,
        lambda backend: privileges.keep(privileges.kept_by(type(backend))),
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
    main()
