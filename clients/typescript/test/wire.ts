/** What a broker writes: the other half of `src/protocol.ts`, for the vectors and for brokers that tests play. */

import type {
  Finding,
  Info,
  Mount,
  MountUse,
  Mounts,
  Progress,
  SnapshotEvent,
  SnapshotterStatus,
  Status,
  Usage,
  Why,
} from "../src/contract.js";
import { Float, integer } from "../src/msgpack.js";
import type { AuditPage, EventsPage, Fault, Heartbeat, Outcome, Reply, Request, WalkPage } from "../src/protocol.js";

type Map = Record<string, unknown>;

/** The fields that do not have their default value, in their order. */
function without(defaults: Map, fields: Map): Map {
  const kept = Object.entries(fields).filter(
    ([name, value]) => !(name in defaults) || !isDefault(value, defaults[name]),
  );
  return Object.fromEntries(kept);
}

function isDefault(value: unknown, absent: unknown): boolean {
  if (Array.isArray(value)) return value.length === 0;
  if (typeof value === "object" && value !== null && typeof absent === "object") return Object.keys(value).length === 0;
  return value === absent;
}

export function request({ calls, namespace, atomic, timeoutMs, token }: Request): Map {
  return without(
    { namespace: "", atomic: false, timeout_ms: 0, token: "" },
    { calls, namespace, atomic, timeout_ms: integer(timeoutMs), ...(token.length > 0 && { token }) },
  );
}

export function info({ name, kind, parent, labels, created, updated }: Info): Map {
  const defaults = { parent: "", labels: {}, created: 0, updated: 0 };
  return without(defaults, { name, kind, parent, labels, created: integer(created), updated: integer(updated) });
}

function mount({ type, source, options, target }: Mount): Map {
  return without({ options: [], target: "" }, { type, source, options, target });
}

export function mounts(answer: Mounts): Map {
  return without({ fence: 0 }, { mounts: answer.mounts.map(mount), fence: integer(answer.fence) });
}

export function usage({ inodes, size }: Usage): Map {
  return { inodes: integer(inodes), size: integer(size) };
}

export function walkPage({ infos, sequence, next }: WalkPage): Map {
  const defaults = { infos: [], sequence: 0, next: "" };
  return without(defaults, { infos: infos.map(info), sequence: integer(sequence), next });
}

export function event(of: SnapshotEvent): Map {
  const { sequence, previous, time, snapshotter, namespace, verb, key } = of;
  const numbers = { sequence: integer(sequence), previous: integer(previous), time: integer(time) };
  const after = of.info && { info: info(of.info) };
  return { ...numbers, snapshotter, namespace, verb, ...(key && { key }), ...after };
}

export function eventsPage({ events, next, newest }: EventsPage): Map {
  const defaults = { events: [], next: 0, newest: 0 };
  return without(defaults, { events: events.map(event), next: integer(next), newest: integer(newest) });
}

function finding(of: Finding): Map {
  const places = { namespace: "", key: "", id: 0, path: "", sequence: 0, time: 0, inodes: 0, size: 0 };
  const numbers = { id: integer(of.id), sequence: integer(of.sequence), time: integer(of.time) };
  return without(
    { ...places, repair: "", mended: false, failure: "" },
    { ...of, ...numbers, inodes: integer(of.inodes), size: integer(of.size) },
  );
}

export function auditPage({ findings, next, looked }: AuditPage): Map {
  return without({ findings: [], next: "", looked: 0 }, { findings: findings.map(finding), next, looked });
}

function mountUse({ point, type, pid, process }: MountUse): Map {
  return without({ pid: 0, process: "" }, { point, type, pid, process });
}

export function why(of: Why): Map {
  const lists = { children: [], holds: [], mounts: [], references: [], events: [] };
  return without(
    { ...lists, id: 0, fence: 0, broken: false, children_count: 0, oldest: 0 },
    {
      ...(of.info && { info: info(of.info) }),
      id: integer(of.id),
      fence: integer(of.fence),
      broken: of.broken,
      children: of.children,
      children_count: of.childrenCount,
      holds: of.holds,
      mounts: of.mounts.map(mountUse),
      references: of.references,
      events: of.events.map(event),
      oldest: integer(of.oldest),
    },
  );
}

export function heartbeat({ sequence, previous, time, topics }: Heartbeat): Map {
  const changed = topics && {
    topics: Object.fromEntries([...topics].map(([topic, newest]) => [topic, integer(newest)])),
  };
  return { sequence: integer(sequence), previous: integer(previous), time: integer(time), ...changed };
}

export function fault({ code, message, details }: Fault): Map {
  return without({ details: {} }, { code, message, details });
}

function progress({ entries, bytes }: Progress): Map {
  return without({ entries: 0, bytes: 0 }, { entries: integer(entries), bytes: integer(bytes) });
}

/** An answer that was not read yet, as it is written again. */
function unwrapped(value: unknown): unknown {
  if (value instanceof Float) return value.value;
  if (Array.isArray(value)) return value.map(unwrapped);
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  return Object.fromEntries(Object.entries(value).map(([name, member]) => [name, unwrapped(member)]));
}

export function outcome(of: Pick<Outcome, "call"> & Partial<Outcome>): Map {
  return {
    call: of.call,
    ...(of.ok !== undefined && { ok: unwrapped(of.ok) }),
    ...(of.error && { error: fault(of.error) }),
    ...(of.progress && { progress: progress(of.progress) }),
  };
}

export function reply({ outcomes, error }: Reply): Map {
  return { ...(outcomes.length > 0 && { outcomes: outcomes.map(outcome) }), ...(error && { error: fault(error) }) };
}

function actor(of: SnapshotterStatus): Map {
  const numbers = { pid: 0, restarts: 0, resident_bytes: 0, cpu_seconds: 0, open_files: 0, sequence: 0, snapshots: 0 };
  return without(
    { ...numbers, capabilities: [], root: "", queues: {}, backlog: {} },
    {
      name: of.name,
      backend: of.backend,
      state: of.state,
      pid: of.pid,
      restarts: of.restarts,
      resident_bytes: of.residentBytes,
      cpu_seconds: of.cpuSeconds,
      open_files: of.openFiles,
      sequence: integer(of.sequence),
      snapshots: of.snapshots,
      capabilities: of.capabilities,
      root: of.root,
      queues: of.queues,
      backlog: of.backlog,
    },
  );
}

export function status(of: Status): Map {
  return without(
    { queues: {}, snapshotters: [] },
    {
      version: of.version,
      pid: of.pid,
      uptime_seconds: of.uptimeSeconds,
      resident_bytes: of.residentBytes,
      endpoint: of.endpoint,
      events_endpoint: of.eventsEndpoint,
      queues: of.queues,
      snapshotters: of.snapshotters.map(actor),
    },
  );
}
