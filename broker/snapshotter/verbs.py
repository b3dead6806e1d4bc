"""The verbs that change something, decided against one transaction.

Each method checks first and writes last, so that a call that fails leaves nothing behind. A call whose backend has
to work first returns a Need instead and has written nothing; when that is done it is decided again, from the
beginning, with what was Made. Deciding twice costs microseconds and leaves one description of every verb.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backends.api import REBASE, Backend, Glancing, Pooled, Snapshot
from backends.failpoints import reach
from broker.snapshotter.lifecycle import PARENT, REBASE_PARENT, refusal
from broker.snapshotter.operations import After, Labour, Made, Need, Operation
from broker.store.records import Record, encode_info, index_key
from snapbroker.contract import (
    SNAPSHOT_REF_LABEL,
    Info,
    Kind,
    Mount,
    check_labels,
    check_name,
    without_empty,
)
from snapbroker.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from snapbroker.protocol import (
    Commit,
    Empty,
    Mounts,
    MountsAnswer,
    Prepare,
    Remove,
    Stat,
    Update,
    UsageOf,
    View,
    encode,
)

if TYPE_CHECKING:
    from lmdb import Transaction

    from broker.snapshotter.ids import Ids
    from broker.snapshotter.pool import Pool
    from broker.snapshotter.space import Space
    from broker.snapshotter.trash import Trash
    from broker.store import Snapshots
    from broker.store.journal import Turn

EMPTY = encode(Empty())


class Holds:
    """What operations in the hands of a backend keep others from touching; used by the writer alone."""

    def __init__(self) -> None:
        self.creates: dict[bytes, Operation] = {}
        self.tokens: dict[tuple[bytes, int], Operation] = {}
        self.consumes: dict[bytes, Operation] = {}
        self.pins: Counter[int] = Counter()

    def add(self, operation: Operation, need: Need) -> None:
        """Hold what `need` touches."""
        operation.needs.append(need)
        if operation.token is not None:
            self.tokens[operation.token.key, operation.first] = operation
        if need.creates is not None:
            self.creates[need.creates] = operation
        if need.consumes is not None:
            self.consumes[need.consumes] = operation
        if need.pins:
            self.pins[need.pins] += 1

    def pinned(self, id_: int, operation: Operation) -> bool:
        """Whether an operation other than this one needs the snapshot as a parent."""
        return self.pins[id_] > sum(need.pins == id_ for need in operation.needs)

    def drop(self, operation: Operation, need: Need) -> None:
        """Let go of what `need` touches."""
        operation.needs.remove(need)
        if operation.token is not None:
            self.tokens.pop((operation.token.key, operation.first), None)
        if need.creates is not None:
            self.creates.pop(need.creates, None)
        if need.consumes is not None:
            self.consumes.pop(need.consumes, None)
        if need.pins:
            self.pins[need.pins] -= 1
            if not self.pins[need.pins]:
                del self.pins[need.pins]

    def release(self, operation: Operation) -> None:
        """Let go of all that the operation holds."""
        for need in list(operation.needs):
            self.drop(operation, need)


class Scene:
    """One call being decided: its transaction, its turn's journal, its operation and the actions for afterwards."""

    __slots__ = ("after", "index", "journal", "namespace", "now", "operation", "txn")

    def __init__(self, txn: Transaction, journal: Turn, operation: Operation, now: int) -> None:
        self.txn = txn
        self.journal = journal
        self.operation = operation
        self.namespace = operation.namespace
        self.now = now
        self.index = 0
        self.after: list[After] = []

    @property
    def made(self) -> Made | None:
        """What the backend did for the call at hand."""
        return self.operation.made.get(self.index)


class Verbs:
    """The mutating verbs of one snapshotter, and the reads an atomic request mixes with them."""

    def __init__(
        self,
        backend: Backend,
        snapshots: Snapshots,
        ids: Ids,
        pool: Pool | None,
        trash: Trash,
        space: Space,
        layers_max: int,
    ) -> None:
        self._backend = backend
        self._pooled = backend if isinstance(backend, Pooled) and pool is not None else None
        self._glancing = backend if isinstance(backend, Glancing) else None
        self._snapshots = snapshots
        self._ids = ids
        self._pool = pool
        self._trash = trash
        self._space = space
        self._layers_max = layers_max
        self.holds = Holds()
        self.touched: Callable[[int], None] = lambda _id: None
        """Told of every id that is being committed: recovery must neither miss its record nor look at its files."""
        self.handlers: Mapping[type[Any], Callable[[Scene, Any], bytes | Need]] = {
            Prepare: self.prepare,
            View: self.view,
            Commit: self.commit,
            Remove: self.remove,
            Update: self.update,
            Stat: self.stat,
            Mounts: self.mounts,
            UsageOf: self.usage,
        }

    def decide(self, scene: Scene, call: Any) -> bytes | Need:
        """The encoded answer of `call`, its changes written; or what it needs, nothing written."""
        handler = self.handlers.get(type(call))
        if handler is None:
            raise Unimplemented(f"{type(call).__struct_config__.tag} cannot be part of an atomic request")
        return handler(scene, call)

    def discard(self, id_: int) -> None:
        """The directory of a snapshot that never came to be."""
        self._trash.discard(id_, None)

    # Prepare and view.

    def prepare(self, scene: Scene, call: Prepare) -> bytes | Need:
        """C15-C23, and C93 for a label `containerd.io/snapshot.ref`."""
        return self._create(scene, Kind.ACTIVE, call.key, call.parent, call.labels)

    def view(self, scene: Scene, call: View) -> bytes | Need:
        """C15-C23."""
        return self._create(scene, Kind.VIEW, call.key, call.parent, call.labels)

    def _create(self, scene: Scene, kind: Kind, key: str, parent: str, labels: dict[str, str]) -> bytes | Need:
        check_name(key)
        if labels:
            check_labels(labels)
            labels = without_empty(labels)
        chain, parent_id = self._parent_chain(scene, parent) if parent else ((), 0)
        if labels and SNAPSHOT_REF_LABEL in labels and kind is Kind.ACTIVE:
            self._check_reference(scene, labels[SNAPSHOT_REF_LABEL], parent)
        index = self._free(scene, key, "prepare")
        made = scene.made
        if made is None:
            self._space.check()
            taken = self._take(Snapshot(0, kind, chain, labels), scene.operation.line)
            if isinstance(taken, tuple):
                return Need(*taken, creates=index, pins=parent_id)
            scene.operation.made[scene.index] = made = taken
        # An atomic request is decided again after its work, and what it was to stand on may be another by then.
        snapshot = replace(made.snapshot, parents=chain)
        fence = scene.journal.next
        answer = encode(MountsAnswer(mounts=tuple(self._backend.mounts(snapshot)), fence=fence))
        info = encode_info(Info(key, kind, parent, labels, scene.now, scene.now))
        record = Record(kind, 0, len(chain), snapshot.id, parent_id, 0, 0, fence, info)
        self._snapshots.insert(scene.txn, index, record)
        reach("verbs.created")
        scene.journal.append(scene.txn, scene.now, scene.namespace, kind_verb(kind), key, info)
        return answer

    def _parent_chain(self, scene: Scene, parent: str) -> tuple[tuple[int, ...], int]:
        check_name(parent, "parent")
        record = self._snapshots.get(scene.txn, index_key(scene.namespace, parent))
        error = PARENT[record.kind if record else None]
        if record is None or error is not None:
            raise (error or NotFound)(
                f"parent {parent!r} is {record.kind}, not committed" if record else f"parent {parent!r} does not exist"
            )
        check_whole(record, parent)
        chain = self._snapshots.chain(scene.txn, scene.namespace, parent, record)
        if len(chain) > self._layers_max:
            raise InvalidArgument(
                f"parent {parent!r} has {len(chain)} layers and layers_max is {self._layers_max}: no kernel mounts more"
            )
        return chain, record.id

    def _check_reference(self, scene: Scene, target: str, parent: str) -> None:
        """AlreadyExists when the layer asked for is there, under its name or under its label; nothing is created.

        C93 asks for the name alone, C94 for the label and the parent.
        """
        if self._snapshots.get(scene.txn, index_key(scene.namespace, target)) is not None:
            raise AlreadyExists(f"target snapshot {target!r} already exists", {"name": target})
        for name in self._snapshots.referred(scene.txn, scene.namespace, target):
            record = self._snapshots.get(scene.txn, index_key(scene.namespace, name))
            if record and record.kind is Kind.COMMITTED and record.decoded().parent == parent:
                raise AlreadyExists(f"target snapshot {target!r} exists as {name!r}", {"name": name})

    def _free(self, scene: Scene, name: str, verb: str) -> bytes:
        """The index key of a name that nobody has and nobody is about to have."""
        index = index_key(scene.namespace, name)
        record = self._snapshots.get(scene.txn, index)
        if record is not None:
            raise refusal(record.kind, "prepare", name) or AlreadyExists(name)
        if self.holds.creates.get(index, scene.operation) is not scene.operation:
            raise AlreadyExists(f"snapshot {name!r} is being created by another call")
        return index

    def _take(self, wanted: Snapshot, line: bytes) -> Made | tuple[Labour, Snapshot]:
        """A directory from the pool, or the labour of getting one."""
        if self._pooled is None or self._pool is None or not self._pooled.fits(wanted):
            return Labour.CREATE, replace(wanted, id=self._ids.take())
        id_ = self._pool.take(line)
        return (Labour.STOCK, wanted) if id_ is None else Made(Labour.CREATE, replace(wanted, id=id_))

    # Commit.

    def commit(self, scene: Scene, call: Commit) -> bytes | Need:
        """C28-C38 with D5 (no cycle), D9 (rebase only where the backend can) and D12 (sync)."""
        check_name(call.name, "name")
        check_name(call.key)
        if call.parent:
            check_name(call.parent, "parent")
        check_labels(call.labels)
        source = index_key(scene.namespace, call.key)
        record = self._snapshots.get(scene.txn, source)
        if record is None:
            raise NotFound(f"snapshot {call.key!r} does not exist")
        check_fence(record, call.key, call.fence)
        target = self._free(scene, call.name, "commit")
        error = refusal(record.kind, "commit", call.key)
        if error is not None:
            raise error
        check_whole(record, call.key)
        if self.holds.consumes.get(source, scene.operation) is not scene.operation:
            raise FailedPrecondition(f"snapshot {call.key!r} is being committed by another call")
        info = record.decoded()
        parent, record = self._rebased(scene, call, info, record)
        snapshot = self._snapshot(scene, info, record)
        self.touched(record.id)
        made = scene.made
        if made is None and not call.sync and self._glancing is not None:
            usage = self._glancing.glance(snapshot)
            made = None if usage is None else Made(Labour.COMMIT, snapshot, usage)
        if made is None:
            return Need(
                Labour.COMMIT,
                snapshot,
                creates=target,
                consumes=source,
                pins=record.parent_id,
                sync=call.sync,
            )
        labels = without_empty(call.labels)
        committed = Info(call.name, Kind.COMMITTED, parent, labels, scene.now, scene.now)
        encoded = encode_info(committed)
        self._snapshots.delete(scene.txn, source, record)
        reach("verbs.consumed")
        self._snapshots.insert(
            scene.txn,
            target,
            record._replace(
                kind=Kind.COMMITTED,
                inodes=made.usage.inodes,
                size=made.usage.size,
                fence=scene.journal.next,
                info=encoded,
            ),
        )
        self._snapshots.refer(scene.txn, scene.namespace, committed, record.id)
        reach("verbs.committed")
        scene.journal.append(scene.txn, scene.now, scene.namespace, "commit", call.key, encoded)
        scene.after.append(lambda: self._backend.settle(snapshot))
        return EMPTY

    def _rebased(self, scene: Scene, call: Commit, info: Info, record: Record) -> tuple[str, Record]:
        """The parent of the committed snapshot, and the record with it (C33)."""
        if not call.parent or call.parent == info.parent:
            return info.parent, record
        if call.parent == call.name:
            raise InvalidArgument(f"{call.name!r} cannot be its own parent")
        if info.parent:
            raise InvalidArgument(
                f"{call.key!r} has the parent {info.parent!r}, it cannot be committed on {call.parent!r}"
            )
        if REBASE not in self._backend.capabilities:
            raise InvalidArgument("this snapshotter cannot rebase at commit: prepare the key on its parent")
        parent = self._snapshots.get(scene.txn, index_key(scene.namespace, call.parent))
        error = REBASE_PARENT[parent.kind if parent else None]
        if parent is None or error is not None:
            raise (error or NotFound)(
                f"parent {call.parent!r} is {parent.kind}, not committed"
                if parent
                else f"parent {call.parent!r} does not exist"
            )
        check_whole(parent, call.parent)
        chain = self._snapshots.chain(scene.txn, scene.namespace, call.parent, parent)
        if len(chain) > self._layers_max:
            raise InvalidArgument(
                f"parent {call.parent!r} has {len(chain)} layers and layers_max is {self._layers_max}"
            )
        return call.parent, record._replace(parent_id=parent.id, depth=len(chain))

    # Remove and update.

    def remove(self, scene: Scene, call: Remove) -> bytes:
        """C39-C42; constant time (D13): the files are put aside after the commit and deleted in the background."""
        check_name(call.key)
        index = index_key(scene.namespace, call.key)
        record = self._snapshots.get(scene.txn, index)
        if record is None:
            raise NotFound(f"snapshot {call.key!r} does not exist")
        check_fence(record, call.key, call.fence)
        if self.holds.consumes.get(index, scene.operation) is not scene.operation:
            raise FailedPrecondition(f"cannot remove snapshot {call.key!r} while it is being committed")
        if self._snapshots.has_children(scene.txn, record.id):
            raise FailedPrecondition(f"cannot remove snapshot with child: {call.key!r}")
        if self.holds.pinned(record.id, scene.operation):
            raise FailedPrecondition(f"cannot remove snapshot with child: one is being made of {call.key!r}")
        self._snapshots.delete(scene.txn, index, record)
        if record.kind is Kind.COMMITTED:
            self._snapshots.unrefer(scene.txn, scene.namespace, record.decoded(), record.id)
        reach("verbs.removed")
        scene.journal.append(scene.txn, scene.now, scene.namespace, "remove", call.key)
        usage = record.usage if record.kind is Kind.COMMITTED else None
        scene.after.append(lambda: self._trash.discard(record.id, usage))
        return EMPTY

    def update(self, scene: Scene, call: Update) -> bytes:
        """C56-C62."""
        check_name(call.name, "name")
        check_labels(call.labels)
        index = index_key(scene.namespace, call.name)
        record = self._snapshots.get(scene.txn, index)
        if record is None:
            raise NotFound(f"snapshot {call.name!r} does not exist")
        info = record.decoded()
        labels = merged(info.labels, call.labels, call.fieldpaths)
        check_labels(labels)
        changed = Info(info.name, info.kind, info.parent, labels, info.created, max(scene.now, info.created))
        encoded = encode_info(changed)
        extra = self._backend.labels(self._snapshot(scene, changed, record))
        answer = encode_info(with_labels(changed, extra)) if extra else encoded
        if info.kind is Kind.COMMITTED:
            self._snapshots.unrefer(scene.txn, scene.namespace, info, record.id)
            self._snapshots.refer(scene.txn, scene.namespace, changed, record.id)
        self._snapshots.put(scene.txn, index, record._replace(info=encoded))
        reach("verbs.updated")
        scene.journal.append(scene.txn, scene.now, scene.namespace, "update", call.name, encoded)
        return answer

    # Reads, inside an atomic request.

    def stat(self, scene: Scene, call: Stat) -> bytes:
        """C55."""
        record = self._existing(scene, call.key)
        extra = self._backend.labels(self._snapshot(scene, record.decoded(), record))
        return encode_info(with_labels(record.decoded(), extra)) if extra else record.info

    def mounts(self, scene: Scene, call: Mounts) -> bytes:
        """C24-C27."""
        record = self._existing(scene, call.key)
        check_fence(record, call.key, call.fence)
        error = refusal(record.kind, "mounts", call.key)
        if error is not None:
            raise error
        check_whole(record, call.key)
        mounts: tuple[Mount, ...] = tuple(self._backend.mounts(self._snapshot(scene, record.decoded(), record)))
        return encode(MountsAnswer(mounts=mounts, fence=record.fence))

    def usage(self, scene: Scene, call: UsageOf) -> bytes | Need:
        """C49, C50."""
        record = self._existing(scene, call.key)
        if record.kind is not Kind.ACTIVE:
            return encode(record.usage)
        check_whole(record, call.key)
        if scene.made is None:
            return Need(Labour.MEASURE, self._snapshot(scene, record.decoded(), record))
        return encode(scene.made.usage)

    def _existing(self, scene: Scene, key: str) -> Record:
        check_name(key)
        record = self._snapshots.get(scene.txn, index_key(scene.namespace, key))
        if record is None:
            raise NotFound(f"snapshot {key!r} does not exist")
        return record

    def _snapshot(self, scene: Scene, info: Info, record: Record) -> Snapshot:
        return snapshot_of(self._snapshots, scene.txn, scene.namespace, info, record)


def check_fence(record: Record, key: str, fence: int) -> None:
    """Raise FailedPrecondition when `fence` is of another snapshot that had this key; 0 is of any."""
    if fence and fence != record.fence:
        raise FailedPrecondition(
            f"fence {fence} is not that of {key!r}: it was made by event {record.fence}, somebody else works on it",
            {"fence": record.fence},
        )


def check_whole(record: Record, key: str) -> None:
    """Raise FailedPrecondition for a snapshot whose files are missing."""
    if record.broken:
        raise FailedPrecondition(f"snapshot {key!r} is broken: its files are missing, remove it")


def snapshot_of(snapshots: Snapshots, txn: Transaction, namespace: str, info: Info, record: Record) -> Snapshot:
    """The backend's picture of a record, its chain resolved."""
    chain: tuple[int, ...] = ()
    if info.parent:
        parent = snapshots.get(txn, index_key(namespace, info.parent))
        if parent is None:
            raise NotFound(f"parent {info.parent!r} of {info.name!r} does not exist")
        chain = snapshots.chain(txn, namespace, info.parent, parent)
    return Snapshot(record.id, info.kind, chain, info.labels)


def merged(labels: Mapping[str, str], given: Mapping[str, str], fieldpaths: tuple[str, ...]) -> dict[str, str]:
    """The labels after an update: all replaced without field paths, else those named (C56-C58)."""
    if not fieldpaths:
        return without_empty(given)
    result = dict(labels)
    for path in fieldpaths:
        if path == "labels":
            result = dict(given)
        elif path.startswith("labels.") and len(path) > len("labels."):
            key = path[len("labels.") :]
            result[key] = given.get(key, "")
        else:
            raise InvalidArgument(f"cannot update field {path!r}: only 'labels' and 'labels.<key>' can be")
    return without_empty(result)


def with_labels(info: Info, extra: Mapping[str, str]) -> Info:
    """The Info with the backend's own labels over it (C115)."""
    return Info(info.name, info.kind, info.parent, {**info.labels, **extra}, info.created, info.updated)


def kind_verb(kind: Kind) -> str:
    """The verb that makes a snapshot of this kind."""
    return "view" if kind is Kind.VIEW else "prepare"
