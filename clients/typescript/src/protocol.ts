/**
 * Messages to bodies and back, without a socket: what docs/rfc/1-request.md and 2-events.md say, as types.
 *
 * A call is the map that is sent: its fields stand in their order, and those with their default value are left out. What
 * comes in is looked at field by field: either it is the message, or it is an error of the contract and nothing else.
 */

import {
  KINDS,
  SEQUENCE_MAX,
  topicOf,
  type Figures,
  type Finding,
  type Info,
  type Kind,
  type Labels,
  type Mount,
  type MountUse,
  type Mounts,
  type Progress,
  type SnapshotEvent,
  type SnapshotterStatus,
  type Status,
  type Usage,
  type Why,
} from "./contract.js";
import { errorOf, InvalidArgumentError, UnimplementedError, type Details, type SnapbrokerError } from "./errors.js";
import { checking, decode, encode, Float, integer, ODD, PROTO, reading, reason, type WireInteger } from "./msgpack.js";

/** First frame of every request and reply. */
export const REQUEST_VERSION = Buffer.from("SNBR\x01", "latin1");
/** Second frame of every event, after its topic. */
export const EVENT_VERSION = Buffer.from("SNBE\x01", "latin1");

/** Most calls in one request. */
export const CALLS_MAX = 1024;
/** Longest idempotency token, in bytes. */
export const TOKEN_BYTES_MAX = 64;
/** Longest name of a snapshotter, in bytes. */
export const TARGET_BYTES_MAX = 64;
/** Longest body, of a request and of one part of a reply. */
export const BODY_BYTES_MAX = 16 * 1024 * 1024;
/** Most infos or events in one page. */
export const PAGE_MAX = 10_000;
/** Most pages a request may ask for at once. */
export const CREDIT_MAX = 1024;
/** Most filters of one walk, and most topics of one events call. */
export const FILTERS_MAX = 64;

const PAGE = 1000;
const CREDIT = 16;

/** A call, as it is sent. A field that is absent has its default. */
export type Call =
  | { verb: "prepare" | "view"; key: string; parent?: string; labels?: Labels }
  | { verb: "commit"; name: string; key: string; parent?: string; labels?: Labels; sync?: true; fence?: WireInteger }
  | { verb: "remove" | "mounts"; key: string; fence?: WireInteger }
  | { verb: "stat" | "usage" | "why"; key: string }
  | { verb: "update"; name: string; labels?: Labels; fieldpaths?: readonly string[] }
  | { verb: "walk"; filters?: readonly string[]; after?: string; page?: number; credit?: number }
  | { verb: "cleanup" | "status" }
  | { verb: "events"; since: WireInteger; topics?: readonly string[]; page?: number; credit?: number; follow?: true }
  | { verb: "audit"; after?: string; page?: number; credit?: number }
  | { verb: "repair"; execute?: true; after?: string; page?: number; credit?: number }
  | { verb: "cancel"; request: Uint8Array; calls?: readonly number[] };

/** The name of a call. */
export type Verb = Call["verb"];

/** Every verb, in the order of the specification. */
export const VERBS: readonly string[] = [
  "prepare",
  "view",
  "commit",
  "remove",
  "mounts",
  "stat",
  "update",
  "usage",
  "walk",
  "cleanup",
  "events",
  "audit",
  "repair",
  "why",
  "cancel",
  "status",
] satisfies Verb[];

/** What must not be done twice: a request with one of these carries a token. */
export const CHANGES: ReadonlySet<string> = new Set<Verb>(["prepare", "view", "commit", "remove", "update"]);

/** The body of a request. */
export interface Request {
  readonly calls: readonly Call[];
  readonly namespace: string;
  readonly atomic: boolean;
  readonly timeoutMs: number;
  readonly token: Uint8Array;
}

/** Infos in the order of their names; `sequence` is the newest event that the page has seen, `next` where to go on. */
export interface WalkPage {
  readonly infos: readonly Info[];
  readonly sequence: bigint;
  readonly next: string;
}

/** Events in their order; `next` is the `since` to go on with, `newest` the newest sequence of the journal. */
export interface EventsPage {
  readonly events: readonly SnapshotEvent[];
  readonly next: bigint;
  readonly newest: bigint;
}

/** Findings in the order in which they were made; `looked`: how many things this request has looked at so far. */
export interface AuditPage {
  readonly findings: readonly Finding[];
  readonly next: string;
  readonly looked: number;
}

/** An error on the wire. */
export interface Fault {
  readonly code: string;
  readonly message: string;
  readonly details: Details;
}

/** The outcome, or the progress, of call number `call`; `ok` is read by the verb of the call. */
export interface Outcome {
  readonly call: number;
  readonly ok: unknown;
  readonly error: Fault | undefined;
  readonly progress: Progress | undefined;
}

/** One part of a reply: outcomes by call, or one error for the request as a whole. */
export interface Reply {
  readonly outcomes: readonly Outcome[];
  readonly error: Fault | undefined;
}

/** The newest sequence, that of the heartbeat before, and the newest of each topic that changed in between. */
export interface Heartbeat {
  readonly sequence: bigint;
  readonly previous: bigint;
  readonly time: bigint;
  readonly topics: ReadonlyMap<string, bigint> | undefined;
}

// Calls. Fields are put in the order of the specification.

/** A prepare or a view. */
export function creation(verb: "prepare" | "view", key: string, parent: string, labels: Labels): Call {
  return { verb, key, ...(parent && { parent }), ...present(labels) };
}

/** A commit. */
export function commit(
  name: string,
  key: string,
  parent: string,
  labels: Labels,
  sync: boolean,
  fence: WireInteger,
): Call {
  return {
    verb: "commit",
    name,
    key,
    ...(parent && { parent }),
    ...present(labels),
    ...(sync && { sync }),
    ...fenced(fence),
  };
}

/** A remove or a mounts. */
export function fencedCall(verb: "remove" | "mounts", key: string, fence: WireInteger): Call {
  return fence === 0 ? { verb, key } : { verb, key, fence };
}

/** An update. */
export function update(name: string, labels: Labels, fieldpaths: readonly string[]): Call {
  return { verb: "update", name, ...present(labels), ...(fieldpaths.length > 0 && { fieldpaths }) };
}

/** A walk, or its continuation behind `after`. */
export function walk(filters: readonly string[], after: string, page: number, credit: number): Call {
  return { verb: "walk", ...(filters.length > 0 && { filters }), ...continued(after, page, credit) };
}

/** An audit, or its continuation behind `after`. */
export function audit(after: string, page: number, credit: number): Call {
  return { verb: "audit", ...continued(after, page, credit) };
}

/** A repair, or its continuation behind `after`; without `execute` nothing is changed. */
export function repair(execute: boolean, after: string, page: number, credit: number): Call {
  return { verb: "repair", ...(execute && { execute }), ...continued(after, page, credit) };
}

/** The journal above `since`. */
export function events(
  since: bigint,
  topics: readonly string[],
  page: number = PAGE,
  credit: number = CREDIT,
  follow = false,
): Call {
  return {
    verb: "events",
    since: integer(since),
    ...(topics.length > 0 && { topics }),
    ...(page !== PAGE && { page }),
    ...(credit !== CREDIT && { credit }),
    ...(follow && { follow }),
  };
}

/** A cancel of the request with this id; without calls of all of them. */
export function cancel(request: Uint8Array, calls: readonly number[] = []): Call {
  return { verb: "cancel", request, ...(calls.length > 0 && { calls }) };
}

function continued(after: string, page: number, credit: number): { after?: string; page?: number; credit?: number } {
  return { ...(after && { after }), ...(page !== PAGE && { page }), ...(credit !== CREDIT && { credit }) };
}

function present(labels: Labels): { labels?: Labels } {
  for (const key in labels) {
    if (Object.hasOwn(labels, key)) return { labels };
  }
  return Object.hasOwn(labels, "__proto__") ? { labels } : {};
}

function fenced(fence: WireInteger): { fence?: WireInteger } {
  return fence === 0 ? {} : { fence };
}

/** The body of a request. */
export function encodeRequest(request: Request): Uint8Array {
  return encode({
    calls: request.calls,
    ...(request.namespace && { namespace: request.namespace }),
    ...(request.atomic && { atomic: true }),
    ...(request.timeoutMs !== 0 && { timeout_ms: integer(request.timeoutMs) }),
    ...(request.token.length > 0 && { token: request.token }),
  });
}

// Values that came in: each reader answers what it says, or throws.

type Fields = Readonly<Record<string, unknown>>;

function malformed(what: string, expected: string): TypeError {
  return new TypeError(`${what} must be ${expected}`);
}

function fields(value: unknown, what: string): Fields {
  if (typeof value !== "object" || value === null || Object.getPrototypeOf(value) !== Object.prototype) {
    throw malformed(what, "a map");
  }
  if (ODD in value) throw malformed(`a name in ${what}`, "text");
  return value as Fields;
}

function text(value: unknown, what: string): string {
  if (typeof value === "string") return value;
  throw malformed(what, "text");
}

function textOr(value: unknown, what: string, absent = ""): string {
  return value === undefined ? absent : text(value, what);
}

function boolean(value: unknown, what: string): boolean {
  if (value === undefined) return false;
  if (typeof value === "boolean") return value;
  throw malformed(what, "a boolean");
}

function int64(value: unknown, what: string): bigint {
  if (typeof value === "number" && Number.isInteger(value)) return BigInt(value);
  if (typeof value === "bigint" && value <= SEQUENCE_MAX) return value;
  throw malformed(what, "an integer of 64 bits with a sign");
}

function int64Or(value: unknown, what: string, absent = 0n): bigint {
  return value === undefined ? absent : int64(value, what);
}

/** An integer that no limit lets grow beyond what a number holds. */
function int53Or(value: unknown, what: string, absent = 0): number {
  if (value === undefined) return absent;
  const number = typeof value === "bigint" ? Number(value) : value;
  if (Number.isSafeInteger(number)) return number as number;
  throw malformed(what, "an integer below 2^53");
}

function required(fields: Fields, ...names: string[]): void {
  for (const name of names) if (fields[name] === undefined) throw malformed(name, "there");
}

function real(value: unknown, what: string): number {
  if (value === undefined) return 0;
  if (value instanceof Float) return value.value;
  if (typeof value === "number" || typeof value === "bigint") return Number(value);
  throw malformed(what, "a number");
}

function list<T>(value: unknown, what: string, read: (value: unknown, what: string) => T): readonly T[] {
  if (value === undefined) return [];
  if (Array.isArray(value)) return value.map((one) => read(one, what));
  throw malformed(what, "a list");
}

function bytes(value: unknown, what: string): Uint8Array {
  if (value instanceof Uint8Array) return value;
  throw malformed(what, "bytes");
}

function map<T>(value: unknown, what: string, read: (value: unknown, what: string) => T): Readonly<Record<string, T>> {
  const result: Record<string, T> = {};
  if (value === undefined) return result;
  const entries = fields(value, what);
  for (const key in entries) {
    const one = read(entries[key], what);
    if (key === PROTO) {
      Object.defineProperty(result, "__proto__", { value: one, enumerable: true, configurable: true, writable: true });
    } else {
      result[key] = one;
    }
  }
  return result;
}

/** A value of details: an integer that a number holds without doubt is a number, however it was written. */
function plain(value: unknown): unknown {
  if (typeof value === "bigint") return integer(value);
  if (value instanceof Float) return value.value;
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  return Object.getPrototypeOf(value) === Object.prototype ? map(value, "details", plain) : value;
}

// Answers.

/** The answer of prepare, view and mounts. */
export function readMounts(value: unknown): Mounts {
  const answer = fields(value, "the answer");
  required(answer, "mounts");
  return { mounts: list(answer["mounts"], "mounts", readMount), fence: int64Or(answer["fence"], "fence") };
}

function readMount(value: unknown): Mount {
  const mount = fields(value, "a mount");
  return {
    type: text(mount["type"], "type"),
    source: text(mount["source"], "source"),
    options: list(mount["options"], "options", text),
    target: textOr(mount["target"], "target"),
  };
}

/** The answer of commit, remove, cleanup and cancel. */
export function readNothing(value: unknown): void {
  fields(value, "the answer");
}

/** The answer of stat and update. */
export function readInfo(value: unknown): Info {
  const info = fields(value, "info");
  const kind = text(info["kind"], "kind");
  if (!KINDS.includes(kind)) throw malformed("kind", `one of ${KINDS.join(", ")}`);
  return {
    name: text(info["name"], "name"),
    kind: kind as Kind,
    parent: textOr(info["parent"], "parent"),
    labels: map(info["labels"], "labels", text),
    created: int64Or(info["created"], "created"),
    updated: int64Or(info["updated"], "updated"),
  };
}

/** The answer of usage. */
export function readUsage(value: unknown): Usage {
  const usage = fields(value, "usage");
  return { inodes: int64Or(usage["inodes"], "inodes"), size: int64Or(usage["size"], "size") };
}

/** A page of a walk. */
export function readWalkPage(value: unknown): WalkPage {
  const page = fields(value, "the page");
  return {
    infos: list(page["infos"], "infos", readInfo),
    sequence: int64Or(page["sequence"], "sequence"),
    next: textOr(page["next"], "next"),
  };
}

/** A page of the journal. */
export function readEventsPage(value: unknown): EventsPage {
  const page = fields(value, "the page");
  return {
    events: list(page["events"], "events", readEvent),
    next: int64Or(page["next"], "next"),
    newest: int64Or(page["newest"], "newest"),
  };
}

function readEvent(value: unknown): SnapshotEvent {
  const event = fields(value, "the event");
  const snapshotter = text(event["snapshotter"], "snapshotter");
  const namespace = text(event["namespace"], "namespace");
  const verb = text(event["verb"], "verb");
  const info = event["info"];
  return {
    sequence: int64(event["sequence"], "sequence"),
    previous: int64(event["previous"], "previous"),
    time: int64(event["time"], "time"),
    snapshotter,
    namespace,
    verb,
    key: textOr(event["key"], "key"),
    info: info === undefined || info === null ? undefined : readInfo(info),
    topic: topicOf(snapshotter, namespace, verb),
  };
}

/** A page of an audit or a repair. */
export function readAuditPage(value: unknown): AuditPage {
  const page = fields(value, "the page");
  return {
    findings: list(page["findings"], "findings", readFinding),
    next: textOr(page["next"], "next"),
    looked: int53Or(page["looked"], "looked"),
  };
}

function readFinding(value: unknown): Finding {
  const finding = fields(value, "a finding");
  return {
    kind: text(finding["kind"], "kind"),
    severity: text(finding["severity"], "severity"),
    message: text(finding["message"], "message"),
    advice: text(finding["advice"], "advice"),
    namespace: textOr(finding["namespace"], "namespace"),
    key: textOr(finding["key"], "key"),
    id: int64Or(finding["id"], "id"),
    path: textOr(finding["path"], "path"),
    sequence: int64Or(finding["sequence"], "sequence"),
    time: int64Or(finding["time"], "time"),
    inodes: int64Or(finding["inodes"], "inodes"),
    size: int64Or(finding["size"], "size"),
    repair: textOr(finding["repair"], "repair"),
    mended: boolean(finding["mended"], "mended"),
    failure: textOr(finding["failure"], "failure"),
  };
}

/** The answer of why. */
export function readWhy(value: unknown): Why {
  const why = fields(value, "the answer");
  const info = why["info"];
  return {
    info: info === undefined || info === null ? undefined : readInfo(info),
    id: int64Or(why["id"], "id"),
    fence: int64Or(why["fence"], "fence"),
    broken: boolean(why["broken"], "broken"),
    children: list(why["children"], "children", text),
    childrenCount: int53Or(why["children_count"], "children_count"),
    holds: list(why["holds"], "holds", text),
    mounts: list(why["mounts"], "mounts", readMountUse),
    references: list(why["references"], "references", text),
    events: list(why["events"], "events", readEvent),
    oldest: int64Or(why["oldest"], "oldest"),
  };
}

function readMountUse(value: unknown): MountUse {
  const mount = fields(value, "a mount");
  return {
    point: text(mount["point"], "point"),
    type: text(mount["type"], "type"),
    pid: int53Or(mount["pid"], "pid"),
    process: textOr(mount["process"], "process"),
  };
}

/** The answer of status. */
export function readStatus(value: unknown): Status {
  const status = fields(value, "status");
  required(status, "pid", "uptime_seconds", "resident_bytes");
  return {
    version: text(status["version"], "version"),
    pid: int53Or(status["pid"], "pid"),
    uptimeSeconds: real(status["uptime_seconds"], "uptime_seconds"),
    residentBytes: int53Or(status["resident_bytes"], "resident_bytes"),
    endpoint: text(status["endpoint"], "endpoint"),
    eventsEndpoint: text(status["events_endpoint"], "events_endpoint"),
    queues: readFigures(status["queues"]),
    snapshotters: list(status["snapshotters"], "snapshotters", readSnapshotterStatus),
  };
}

function readSnapshotterStatus(value: unknown): SnapshotterStatus {
  const actor = fields(value, "a snapshotter");
  return {
    name: text(actor["name"], "name"),
    backend: text(actor["backend"], "backend"),
    state: text(actor["state"], "state"),
    pid: int53Or(actor["pid"], "pid"),
    restarts: int53Or(actor["restarts"], "restarts"),
    residentBytes: int53Or(actor["resident_bytes"], "resident_bytes"),
    cpuSeconds: real(actor["cpu_seconds"], "cpu_seconds"),
    openFiles: int53Or(actor["open_files"], "open_files"),
    sequence: int64Or(actor["sequence"], "sequence"),
    snapshots: int53Or(actor["snapshots"], "snapshots"),
    capabilities: list(actor["capabilities"], "capabilities", text),
    root: textOr(actor["root"], "root"),
    queues: readFigures(actor["queues"]),
    backlog: map(actor["backlog"], "backlog", int53Or),
  };
}

function readFigures(value: unknown): Figures {
  return map(value, "queues", (queue) => map(queue, "a queue", int53Or));
}

// Bodies.

/** One part of a reply; InternalError where the broker sent something else. */
export function decodeReply(body: Uint8Array): Reply {
  return reading("reply", body, readReply);
}

function readReply(value: unknown): Reply {
  const reply = fields(value, "a reply");
  return {
    outcomes: list(reply["outcomes"], "outcomes", readOutcome),
    error: readFault(reply["error"]),
  };
}

function readOutcome(value: unknown): Outcome {
  const outcome = fields(value, "an outcome");
  required(outcome, "call");
  const progress = outcome["progress"];
  return {
    call: int53Or(outcome["call"], "call"),
    ok: outcome["ok"],
    error: readFault(outcome["error"]),
    progress: progress === undefined || progress === null ? undefined : readProgress(progress),
  };
}

function readProgress(value: unknown): Progress {
  const progress = fields(value, "progress");
  return { entries: int64Or(progress["entries"], "entries"), bytes: int64Or(progress["bytes"], "bytes") };
}

function readFault(value: unknown): Fault | undefined {
  if (value === undefined || value === null) return undefined;
  const fault = fields(value, "an error");
  return {
    code: text(fault["code"], "code"),
    message: text(fault["message"], "message"),
    details: map(fault["details"], "details", plain),
  };
}

/** The error as it is thrown. */
export function thrown(fault: Fault): SnapbrokerError {
  return errorOf(fault.code, fault.message, { details: fault.details });
}

/** `read(ok)`; InternalError where the broker's answer is something else. */
export function readAnswer<T>(ok: unknown, read: (value: unknown) => T): T {
  return checking("answer", ok, read);
}

/** The event in a publication's last frame; InternalError where the broker sent something else. */
export function decodeEvent(body: Uint8Array): SnapshotEvent {
  return reading("event", body, readEvent);
}

/** The heartbeat in a publication's last frame; InternalError where the broker sent something else. */
export function decodeHeartbeat(body: Uint8Array): Heartbeat {
  return reading("heartbeat", body, (value) => {
    const beat = fields(value, "the heartbeat");
    const topics = beat["topics"];
    return {
      sequence: int64(beat["sequence"], "sequence"),
      previous: int64(beat["previous"], "previous"),
      time: int64(beat["time"], "time"),
      topics:
        topics === undefined || topics === null ? undefined : new Map(Object.entries(map(topics, "topics", int64))),
    };
  });
}

/** A namespace is never empty, so no event has this topic; a subscription to `<snapshotter>/` covers it. */
export function heartbeatTopic(snapshotter: string): string {
  return `${snapshotter}//heartbeat`;
}

// Requests that came in. A client reads none; whoever stands in for a broker does, tests above all.

/** The request in `body`; InvalidArgument or Unimplemented (unknown verb) where it is none. */
export function decodeRequest(body: Uint8Array): Request {
  try {
    const request = fields(decode(body), "the body");
    const calls = request["calls"];
    if (!Array.isArray(calls) || calls.length < 1 || calls.length > CALLS_MAX) {
      throw malformed("calls", `a list of 1 to ${CALLS_MAX} calls`);
    }
    const token = request["token"] === undefined ? new Uint8Array() : bytes(request["token"], "token");
    if (token.length > TOKEN_BYTES_MAX) throw malformed("token", `at most ${TOKEN_BYTES_MAX} bytes`);
    for (const call of calls as readonly unknown[]) checkVerb(fields(call, "a call"));
    return {
      calls: calls.map((call) => readCall(call as Fields)),
      namespace: textOr(request["namespace"], "namespace"),
      atomic: boolean(request["atomic"], "atomic"),
      timeoutMs: int53Or(request["timeout_ms"], "timeout_ms"),
      token,
    };
  } catch (error) {
    if (error instanceof UnimplementedError) throw error;
    throw new InvalidArgumentError(`the body is not a request: ${reason(error)}`);
  }
}

function checkVerb(call: Fields): void {
  const verb = text(call["verb"], "verb");
  if (!VERBS.includes(verb)) {
    throw new UnimplementedError(`unknown verb '${verb.slice(0, 40)}'; known are ${VERBS.join(", ")}`);
  }
}

function readCall(call: Fields): Call {
  const key = () => text(call["key"], "key");
  const after = () => textOr(call["after"], "after");
  const parent = textOr(call["parent"], "parent");
  const labels = map(call["labels"], "labels", text);
  const fence = integer(int64Or(call["fence"], "fence"));
  const page = int53Or(call["page"], "page", PAGE);
  const credit = int53Or(call["credit"], "credit", CREDIT);
  const verb = call["verb"] as Verb;
  switch (verb) {
    case "prepare":
    case "view":
      return creation(verb, key(), parent, labels);
    case "commit":
      return commit(text(call["name"], "name"), key(), parent, labels, boolean(call["sync"], "sync"), fence);
    case "remove":
    case "mounts":
      return fencedCall(verb, key(), fence);
    case "stat":
    case "usage":
    case "why":
      return { verb, key: key() };
    case "update":
      return update(text(call["name"], "name"), labels, list(call["fieldpaths"], "fieldpaths", text));
    case "walk":
      return walk(list(call["filters"], "filters", text), after(), page, credit);
    case "audit":
      return audit(after(), page, credit);
    case "repair":
      return repair(boolean(call["execute"], "execute"), after(), page, credit);
    case "events":
      return events(
        int64(call["since"], "since"),
        list(call["topics"], "topics", text),
        page,
        credit,
        boolean(call["follow"], "follow"),
      );
    case "cancel":
      return cancel(
        bytes(call["request"], "request"),
        list(call["calls"], "calls", (one) => int53Or(one, "calls")),
      );
    case "cleanup":
    case "status":
      return { verb };
  }
}
