/**
 * The words of the snapshot contract: kinds, mounts, infos, usages, events, and the limits of their fields.
 *
 * A *snapshot* is a directory tree under one *name*. An `active` snapshot is written to under its *key*; a `view` is
 * read under its key; a `committed` one never changes again and may be the *parent* of others. Keys and names share one
 * space per snapshotter and namespace.
 *
 * *A layer is unpacked.* `prepare("unpack-1", {parent: "base"})` answers mounts; the caller mounts them, writes,
 * unmounts; `commit("layer-1", "unpack-1")` turns the active snapshot into the committed `layer-1`.
 *
 * *A build runs.* `prepare("job-42", {parent: "layer-1"})` gives a fresh workspace; `remove("job-42")` discards it.
 *
 * *Somebody looks.* `view("look", {parent: "layer-1"})` answers read-only mounts.
 *
 * Integers of the wire have up to 63 bits. Those that can be so large are bigints, always: sequences, fences, times and
 * what a snapshot takes. Those that a limit keeps small (pages, milliseconds, figures of the status) are numbers.
 */

import { FailedPreconditionError, InvalidArgumentError } from "./errors.js";

/** Highest sequence and fencing number: 2^63-1. */
export const SEQUENCE_MAX = 2n ** 63n - 1n;
/** Longest namespace, in bytes. */
export const NAMESPACE_BYTES_MAX = 76;

/** What a snapshot is. */
export type Kind = "view" | "active" | "committed";
export const KINDS: readonly string[] = ["view", "active", "committed"] satisfies Kind[];

/** Label to value. A label with an empty value is legal and not stored. */
export type Labels = Readonly<Record<string, string>>;

/** What is known of a snapshot without looking at its files. Times are nanoseconds since 1970-01-01T00:00:00Z. */
export interface Info {
  readonly name: string;
  readonly kind: Kind;
  /** The name of the parent; empty where there is none. */
  readonly parent: string;
  readonly labels: Labels;
  readonly created: bigint;
  readonly updated: bigint;
}

/** One mount for the caller to make, in the words of mount(8); `target` is relative to the mount point. */
export interface Mount {
  readonly type: string;
  readonly source: string;
  readonly options: readonly string[];
  readonly target: string;
}

/** The mounts of an active snapshot or view, to make in their order. */
export interface Mounts {
  readonly mounts: readonly Mount[];
  /**
   * The snapshot's fencing number: a later snapshot under the same key has a higher one. Commit, remove and mounts that
   * carry it are refused with failed_precondition once the key stands for another snapshot.
   */
  readonly fence: bigint;
}

/** What a snapshot takes beyond its parents: `inodes`, and `size` in bytes of allocated blocks. */
export interface Usage {
  readonly inodes: bigint;
  readonly size: bigint;
}

/** How far a long call is, in entries and bytes. */
export interface Progress {
  readonly entries: bigint;
  readonly bytes: bigint;
}

/** The verbs that change something, and so have a topic. */
export const EVENT_VERBS = ["prepare", "view", "commit", "update", "remove", "cleanup"] as const;
/** What happened. Later versions of the protocol may have more. */
export type EventVerb = (typeof EVENT_VERBS)[number] | (string & Record<never, never>);

/** One change. */
export interface SnapshotEvent {
  /** 1 for the snapshotter's first event, then one more each, without gaps. */
  readonly sequence: bigint;
  /** The sequence of the event before it on the same topic; 0 for the first. */
  readonly previous: bigint;
  /** When, in nanoseconds since 1970-01-01T00:00:00Z. It is for people: order is the sequence's. */
  readonly time: bigint;
  readonly snapshotter: string;
  readonly namespace: string;
  readonly verb: EventVerb;
  /** To which key or name; for `commit` the active snapshot that was consumed. Empty for `cleanup`. */
  readonly key: string;
  /** The snapshot as it is after the change; absent for `remove` and `cleanup`. */
  readonly info: Info | undefined;
  /** The topic it is published on. */
  readonly topic: string;
}

/** `<snapshotter>/<namespace>/snapshot/<verb>`. */
export function topicOf(snapshotter: string, namespace: string, verb: string): string {
  return `${snapshotter}/${namespace}/snapshot/${verb}`;
}

/** One snapshotter: `state` is starting, ready, unavailable or stopped. */
export interface SnapshotterStatus {
  readonly name: string;
  readonly backend: string;
  readonly state: string;
  readonly pid: number;
  readonly restarts: number;
  readonly residentBytes: number;
  readonly cpuSeconds: number;
  readonly openFiles: number;
  readonly sequence: bigint;
  readonly snapshots: number;
  readonly capabilities: readonly string[];
  readonly root: string;
  readonly queues: Figures;
  readonly backlog: Readonly<Record<string, number>>;
}

/** Queue to figure to value. */
export type Figures = Readonly<Record<string, Readonly<Record<string, number>>>>;

/** The broker's own figures, and one entry for each snapshotter. */
export interface Status {
  readonly version: string;
  readonly pid: number;
  readonly uptimeSeconds: number;
  readonly residentBytes: number;
  readonly endpoint: string;
  readonly eventsEndpoint: string;
  readonly queues: Figures;
  readonly snapshotters: readonly SnapshotterStatus[];
}

/** How grave a finding is. An audit without warnings and errors is clean. */
export type Severity = "note" | "warning" | "error" | (string & Record<never, never>);

/** Something that is not as it must be, or that somebody should know of. What is not known of it is "" or 0n. */
export interface Finding {
  /** One of those that RFC 1, 5.15 lists. Later versions of the broker may have more. */
  readonly kind: string;
  readonly severity: Severity;
  readonly message: string;
  readonly advice: string;
  readonly namespace: string;
  readonly key: string;
  readonly id: bigint;
  readonly path: string;
  readonly sequence: bigint;
  /** Since when, in nanoseconds since the epoch. */
  readonly time: bigint;
  /** What it takes. */
  readonly inodes: bigint;
  readonly size: bigint;
  /** What a repair does about it; empty where it does nothing. */
  readonly repair: string;
  /** After a repair: whether it is mended, or why it could not be. */
  readonly mended: boolean;
  readonly failure: string;
}

/** A mount that uses a snapshot's files, and a process that sees it. */
export interface MountUse {
  readonly point: string;
  readonly type: string;
  /** 0 where no process is known. */
  readonly pid: number;
  readonly process: string;
}

/** What keeps a snapshot, and what the journal has on its name. */
export interface Why {
  /** Absent where there is no such snapshot. */
  readonly info: Info | undefined;
  readonly id: bigint;
  readonly fence: bigint;
  /** Its files are missing. */
  readonly broken: boolean;
  /** Snapshots that stand on it: the first of `childrenCount`. */
  readonly children: readonly string[];
  readonly childrenCount: number;
  /** Calls under way that need it, as sentences. */
  readonly holds: readonly string[];
  /** Where it is mounted, also as a layer of another. */
  readonly mounts: readonly MountUse[];
  /** The `containerd.io/snapshot.ref` under which it is found. */
  readonly references: readonly string[];
  /** The last events on the name, the newest first. */
  readonly events: readonly SnapshotEvent[];
  /** The oldest sequence that the journal keeps. */
  readonly oldest: bigint;
}

const NAMESPACE = /^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$/;

/** FailedPrecondition when it is missing, InvalidArgument when it is malformed (RFC 1, 7.1). */
export function checkNamespace(namespace: string): void {
  if (!namespace) {
    throw new FailedPreconditionError("namespace is required: name one, such as 'default'");
  }
  if (namespace.length > NAMESPACE_BYTES_MAX || namespace === "version" || !NAMESPACE.test(namespace)) {
    throw new InvalidArgumentError(
      `namespace '${namespace.slice(0, 80)}' must be at most ${NAMESPACE_BYTES_MAX} letters and digits, ` +
        "single '.', '_' or '-' between them, and not 'version'",
    );
  }
}
