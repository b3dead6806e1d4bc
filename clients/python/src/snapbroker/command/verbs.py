"""What each verb does: calls of the client, and their answers for people or as JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec

from snapbroker.command import words
from snapbroker.command.failures import complaint
from snapbroker.command.output import Output
from snapbroker.contract import Usage
from snapbroker.errors import BrokerError, NotFound, OutOfRange
from snapbroker.protocol import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from snapbroker.blocking import Broker
    from snapbroker.contract import Event, Info, Mounts
    from snapbroker.protocol import ActorStatus, StatusAnswer

_USAGES_AT_ONCE: Final = 64
"""Snapshots measured by one request: a measurement of an active one takes time, and a request has one deadline."""


def run(arguments: argparse.Namespace, connect: Callable[..., Broker] | None) -> int:
    """Do what the command line says; answers the exit status, or raises BrokerError."""
    output = Output(as_json=arguments.json)
    if arguments.verb == "unmount":
        return _unmount(arguments, output)
    with _connected(arguments, connect) as broker:
        return _VERBS[arguments.verb](broker, arguments, output)


def _connected(arguments: argparse.Namespace, connect: Callable[..., Broker] | None) -> Broker:
    if connect is None:
        import snapbroker

        connect = snapbroker.connect
    options: dict[str, Any] = {"namespace": arguments.namespace, "snapshotter": arguments.snapshotter}
    if arguments.client_key is not None or arguments.server_key is not None:
        from snapbroker.keyfiles import Curve

        options["curve"] = Curve.load(arguments.client_key, arguments.server_key)
    if arguments.timeout is not None:
        options["timeout"] = arguments.timeout
    return connect(arguments.endpoint, **options)


def _described(info: Info) -> dict[str, Any]:
    """An info with all its fields: scripts need not know which have defaults."""
    return msgspec.structs.asdict(info)


def _specified(mounts: Mounts) -> list[dict[str, Any]]:
    """Each mount with the fence of all: the document stays an array of mounts."""
    return [{**msgspec.structs.asdict(mount), "fence": mounts.fence} for mount in mounts]


# Snapshots come and go.


def _prepare(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    with output.progress(f"preparing {words.plain(arguments.key)}") as progress:
        mounts = broker.prepare(arguments.key, arguments.parent, dict(arguments.labels), progress=progress)
    return _show_mounts(mounts, output)


def _view(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    return _show_mounts(broker.view(arguments.key, arguments.parent, dict(arguments.labels)), output)


def _mounts(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    return _show_mounts(broker.mounts(arguments.key, arguments.fence), output)


def _show_mounts(mounts: Mounts, output: Output) -> int:
    if output.as_json:
        output.document(_specified(mounts))
        return 0
    for mount in mounts:
        target = f" on {words.plain(mount.target)}" if mount.target else ""
        output.line(f"{words.plain(mount.type)} of {words.plain(mount.source)}{target}")
        for option in mount.options:
            output.line(f"    {words.plain(option)}")
    return 0


def _commit(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    labels = dict(arguments.labels)
    broker.commit(arguments.name, arguments.key, arguments.parent, labels, arguments.sync, arguments.fence)
    if output.as_json:
        output.document({"name": arguments.name, "key": arguments.key})
    return 0


def _remove(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    """Remove what can be removed; the status is that of the first error."""
    removed: list[str] = []
    status = 0
    for key in arguments.keys:
        try:
            broker.remove(key, arguments.fence)
        except BrokerError as error:
            print(complaint(error), file=sys.stderr)
            status = status or error.exit_status
        else:
            removed.append(key)
    if output.as_json:
        output.document({"removed": removed})
    return status


# What is there.


def _stat(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    return _show_info(broker.stat(arguments.key), output)


def _label(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    labels = dict(arguments.labels)
    info = broker.update(arguments.key, labels, tuple(f"labels.{key}" for key in labels))
    if output.as_json:
        output.document(_described(info))
    return 0


def _show_info(info: Info, output: Output) -> int:
    if output.as_json:
        output.document(_described(info))
        return 0
    for name, value in (
        ("name", words.plain(info.name)),
        ("kind", info.kind.value),
        ("parent", words.plain(info.parent)),
        ("created", words.moment(info.created)),
        ("updated", words.moment(info.updated)),
    ):
        output.line(f"{name:8} {value}".rstrip())
    for key, value in sorted(info.labels.items()):
        output.line(f"{'label':8} {words.plain(key)}={words.plain(value)}")
    return 0


def _ls(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    infos = broker.walk(*arguments.filters)
    if output.as_json:
        output.document([_described(info) for info in infos])
        return 0
    rows = [
        (
            words.plain(info.name),
            info.kind.value,
            words.plain(info.parent),
            words.moment(info.created),
            words.labels(info.labels),
        )
        for info in infos
    ]
    output.table(("NAME", "KIND", "PARENT", "CREATED", "LABELS"), rows)
    return 0


def _tree(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    """As JSON a flat array in the tree's order, each with its `depth`: a chain may be deeper than JSON readers go."""
    del arguments
    found = list(_in_tree_order(list(broker.walk())))
    if output.as_json:
        output.document([{**_described(info), "depth": depth} for info, depth, _ in found])
        return 0
    for info, _, guide in found:
        output.branch(guide, words.plain(info.name), info.kind.value)
    return 0


def _in_tree_order(infos: list[Info]) -> Iterator[tuple[Info, int, str]]:
    """Each snapshot behind its parent, with its depth and the guide in front of it."""
    names = {info.name for info in infos}
    children: dict[str, list[Info]] = {}
    for info in infos:
        children.setdefault(info.parent if info.parent in names else "", []).append(info)
    waiting = [(root, 0, "", "") for root in reversed(children.get("", ()))]
    while waiting:
        info, depth, guide, below = waiting.pop()
        yield info, depth, guide
        offspring = children.get(info.name, ())
        for number, child in enumerate(reversed(offspring)):
            corner, line = ("└── ", "    ") if number == 0 else ("├── ", "│   ")
            waiting.append((child, depth + 1, below + corner, below + line))


def _usage(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    total = Usage()
    found: list[tuple[str, Usage]] = []
    for key, usage in _measured(broker, arguments.keys):
        found.append((key, usage))
        total += usage
    if output.as_json:
        snapshots = [{"key": key, **msgspec.structs.asdict(usage)} for key, usage in found]
        output.document({"snapshots": snapshots, "total": msgspec.structs.asdict(total)})
        return 0
    rows = [(words.plain(key), str(usage.inodes), words.size(usage.size)) for key, usage in found]
    rows.append(("total", str(total.inodes), words.size(total.size)))
    output.table(("KEY", "INODES", "SIZE"), rows, right=frozenset(("INODES", "SIZE")))
    return 0


def _measured(broker: Broker, keys: Sequence[str]) -> Iterator[tuple[str, Usage]]:
    """Keys and usages; without keys those of all snapshots, passing over one that goes meanwhile."""
    chosen = list(keys) or [info.name for info in broker.walk()]
    for start in range(0, len(chosen), _USAGES_AT_ONCE):
        part = chosen[start : start + _USAGES_AT_ONCE]
        batch = broker.batch()
        answers = [batch.usage(key) for key in part]
        try:
            with batch:
                pass
        except BrokerError:
            # Each answer has its own outcome, unless the request itself came to nothing.
            if not all(answer.done() for answer in answers):
                raise
        for key, answer in zip(part, answers, strict=True):
            try:
                yield key, answer.result()
            except NotFound:
                if keys:
                    raise


# Mounting.


def _mount(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    from snapbroker import mount

    mounts = broker.mounts(arguments.key)
    mount.all(mounts, arguments.target)
    if output.as_json:
        output.document({"key": arguments.key, "target": arguments.target, "mounts": _specified(mounts)})
    return 0


def _unmount(arguments: argparse.Namespace, output: Output) -> int:
    from snapbroker import mount

    mount.unmount(arguments.target, recursive=arguments.recursive, lazy=arguments.lazy)
    if output.as_json:
        output.document({"target": arguments.target})
    return 0


# Watching.


def _events(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    since = arguments.since
    if since is None and not arguments.follow:
        since = 0
    try:
        _show_events(broker, since, arguments, output)
    except OutOfRange as error:
        oldest = error.details.get("oldest")
        if arguments.since is not None or since != 0 or not isinstance(oldest, int):
            raise
        # Nobody asked for a sequence: what is kept is what there is to show.
        _show_events(broker, oldest - 1, arguments, output)
    return 0


def _show_events(broker: Broker, since: int | None, arguments: argparse.Namespace, output: Output) -> None:
    for event in broker.events(since=since, topics=tuple(arguments.topics), follow=arguments.follow):
        if output.as_json:
            about = None if event.info is None else _described(event.info)
            output.document({**msgspec.structs.asdict(event), "info": about, "topic": event.topic})
        else:
            output.line(_told(event))


def _told(event: Event) -> str:
    """Sequence, time, topic, and what it happened to: a commit's key and name."""
    text = f"{event.sequence:>8} {words.moment(event.time)} {words.plain(event.topic)}"
    name = event.info.name if event.info else ""
    subject = f"{event.key} -> {name}" if event.verb == "commit" else event.key or name
    parent = f" (parent {event.info.parent})" if event.info and event.info.parent else ""
    return f"{text} {words.plain(subject + parent)}".rstrip()


def _audit(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    from snapbroker.command.findings import FOUND_STATUS, Report

    report = Report(output, broker.snapshotter_name, repair=arguments.repair, execute=arguments.yes)
    options: dict[str, Any] = {} if arguments.timeout is None else {"timeout": arguments.timeout}
    with output.progress("looking") as show:
        options["progress"] = show
        findings = broker.repair(arguments.yes, **options) if arguments.repair else broker.audit(**options)
        with findings:
            for finding in findings:
                report.tell(finding)
    report.summary(findings.looked)
    return 0 if report.clean else FOUND_STATUS


def _why(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    from snapbroker.command import reasons

    answer = broker.why(arguments.key)
    if output.as_json:
        output.document(reasons.described(answer))
    else:
        for line in reasons.told(arguments.key, answer):
            output.line(line)
    return 0


def _cleanup(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    del arguments
    last = Progress()

    with output.progress("deleting") as show:

        def advance(progress: Progress) -> None:
            nonlocal last
            last = progress
            if show is not None:
                show(progress)

        broker.cleanup(progress=advance)
    if output.as_json:
        output.document({"entries": last.entries, "bytes": last.bytes})
    return 0


def _status(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    del arguments
    status = broker.status()
    if output.as_json:
        document = msgspec.structs.asdict(status)
        document["snapshotters"] = [msgspec.structs.asdict(each) for each in status.snapshotters]
        output.document(document)
        return 0
    output.line(
        f"broker {words.plain(status.version)}, pid {status.pid}, up {words.duration(status.uptime_seconds)}, "
        f"{words.size(status.resident_bytes)} resident"
    )
    output.line(f"requests at {words.plain(status.endpoint)}, events at {words.plain(status.events_endpoint)}")
    output.line("")
    columns = ("SNAPSHOTTER", "BACKEND", "STATE", "PID", "RESIDENT", "CPU", "RESTARTS", "SNAPSHOTS", "SEQUENCE")
    output.table(columns, [_actor_row(each) for each in status.snapshotters], right=frozenset(columns[3:]))
    queues = list(_queue_rows(status))
    if queues:
        output.line("")
        output.table(("OWNER", "QUEUE", "FIGURES"), queues)
    return 0


def _actor_row(actor: ActorStatus) -> tuple[str, ...]:
    return (
        words.plain(actor.name),
        words.plain(actor.backend),
        words.plain(actor.state),
        str(actor.pid or ""),
        words.size(actor.resident_bytes),
        f"{actor.cpu_seconds:.1f} s",
        str(actor.restarts),
        str(actor.snapshots),
        str(actor.sequence),
    )


def _queue_rows(status: StatusAnswer) -> Iterator[tuple[str, str, str]]:
    """Every queue's figures, and what waits for its deletion."""
    owners: list[tuple[str, Mapping[str, Mapping[str, int]]]] = [("broker", status.queues)]
    for actor in status.snapshotters:
        backlog = {"to delete": actor.backlog} if actor.backlog else {}
        owners.append((actor.name, {**actor.queues, **backlog}))
    for owner, queues in owners:
        for queue, found in queues.items():
            yield words.plain(owner), words.plain(queue), words.figures(found)


# A command in a workspace.


def _run(broker: Broker, arguments: argparse.Namespace, output: Output) -> int:
    from snapbroker.command.run import run_in_workspace

    status = run_in_workspace(broker, arguments)
    if output.as_json:
        committed = arguments.commit if status == 0 else None
        output.document({"parent": arguments.parent, "committed": committed, "status": status})
    return status


_VERBS: Final[Mapping[str, Callable[[Broker, argparse.Namespace, Output], int]]] = {
    "prepare": _prepare,
    "view": _view,
    "commit": _commit,
    "rm": _remove,
    "stat": _stat,
    "label": _label,
    "usage": _usage,
    "mounts": _mounts,
    "mount": _mount,
    "ls": _ls,
    "tree": _tree,
    "events": _events,
    "audit": _audit,
    "why": _why,
    "cleanup": _cleanup,
    "status": _status,
    "run": _run,
}
