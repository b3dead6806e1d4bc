/** The client's front: the verbs, over one connection. */

import { milliseconds } from "./arguments.js";
import { Audit, type AuditOptions, type RepairOptions } from "./audit.js";
import { Batch, type BatchOptions } from "./batch.js";
import * as calls from "./calls.js";
import { Connection, type ConnectionStatistics } from "./connection.js";
import type { Info, Labels, Mounts, Progress, Status, Usage, Why } from "./contract.js";
import { eventsEndpoint, namespaceOrDefault, routerEndpoint, snapshotterOrNone } from "./endpoints.js";
import { Events, type EventsOptions } from "./events.js";
import { keysFor } from "./keys.js";
import { Mirror, type MirrorOptions } from "./mirror.js";
import { Patience, PATIENCE_MS } from "./patience.js";
import { readInfo, readMounts, readNothing, readUsage, readWhy } from "./protocol.js";
import { CALLS_PER_REQUEST, TIMEOUT_MS } from "./session.js";
import { CONNECT_MS } from "./sockets.js";
import { View, type CallOptions } from "./view.js";
import { Walk, type WalkOptions } from "./walk.js";

/** Which broker, and how. What is absent comes from the environment, else from the defaults. */
export interface ConnectOptions {
  /** The router's socket: a path, `ipc://...` or `tcp://...`. SNAPBROKER_ENDPOINT, else the machine's own socket. */
  readonly endpoint?: string | undefined;
  /** The publisher's socket. SNAPBROKER_EVENTS_ENDPOINT, else beside an ipc router's socket, else asked of the broker. */
  readonly eventsEndpoint?: string | undefined;
  /** Whose snapshots. SNAPBROKER_NAMESPACE, else `default`. */
  readonly namespace?: string | undefined;
  /** SNAPBROKER_SNAPSHOTTER, else the broker's only one. */
  readonly snapshotter?: string | undefined;
  /** How long a call may take, in milliseconds: 60,000 where absent, `Infinity` for without end. */
  readonly timeoutMs?: number | undefined;
  /** How long a call waits for a broker that is not there, in milliseconds: 3,000 where absent. */
  readonly connectTimeoutMs?: number | undefined;
  /** How long a request is repeated, in milliseconds: 10,000 where absent, 0 for never. */
  readonly patienceMs?: number | undefined;
  /** Most calls that travel in one request, 1 to 1,024: 256 where absent. Reads leave in requests of 32. */
  readonly callsPerRequest?: number | undefined;
  /** On tcp, for CURVE: the path of the client key file. SNAPBROKER_CLIENT_KEY. */
  readonly clientKey?: string | undefined;
  /** On tcp, for CURVE: the broker's public key or its file. SNAPBROKER_SERVER_KEY, else that in the client key file. */
  readonly serverKey?: string | undefined;
}

/** A call that may take long. */
export interface LongCallOptions extends CallOptions {
  /** Told how far the call is, now and then. */
  readonly onProgress?: ((progress: Progress) => void) | undefined;
}

/**
 * A connection to a broker.
 *
 * The broker need not be there yet: a call waits for it up to `connectTimeoutMs`. A request whose connection breaks, or
 * that finds the snapshotter unavailable, is repeated for up to `patienceMs`, within its own timeout, and takes effect
 * once. Calls made in one turn of the event loop travel together.
 *
 * InvalidArgument where the options are wrong, a key file among them.
 */
export async function connect(options: ConnectOptions = {}): Promise<Broker> {
  const endpoint = routerEndpoint(options.endpoint);
  const namespace = namespaceOrDefault(options.namespace);
  const snapshotter = snapshotterOrNone(options.snapshotter);
  const connection = new Connection({
    endpoint,
    eventsEndpoint: eventsEndpoint(options.eventsEndpoint, endpoint),
    keys: await keysFor(endpoint, options.clientKey, options.serverKey),
    timeoutMs: milliseconds(options.timeoutMs ?? TIMEOUT_MS),
    connectTimeoutMs: milliseconds(options.connectTimeoutMs ?? CONNECT_MS, "connectTimeoutMs"),
    patience: new Patience(options.patienceMs ?? PATIENCE_MS),
    callsPerRequest: options.callsPerRequest ?? CALLS_PER_REQUEST,
  });
  try {
    return new Broker(new View(connection, namespace, snapshotter));
  } catch (error) {
    await connection.close();
    throw error;
  }
}

/**
 * One snapshotter, in one namespace, of a broker.
 *
 * Every method rejects with a `SnapbrokerError`, or with the reason of its signal. A call that runs into its timeout is
 * a `DeadlineExceededError`, and the broker is told that nobody waits, as it is when the signal is aborted.
 */
export class Broker {
  readonly #view: View;

  /** @internal */
  constructor(view: View) {
    this.#view = view;
  }

  /** The router's endpoint. */
  get endpoint(): string {
    return this.#view.connection.endpoint;
  }

  /** The namespace this view is of. */
  get namespace(): string {
    return this.#view.namespace;
  }

  /** The snapshotter this view is of; the broker is asked for its only one where none was named. */
  async snapshotterName(options: CallOptions = {}): Promise<string> {
    const lane = await this.#view.resolved(options.timeoutMs, options.signal);
    return Buffer.from(lane.target).toString();
  }

  /** The same connection's view of another snapshotter, or of another namespace. */
  snapshotter(name: string, namespace?: string): Broker {
    const chosen = namespace === undefined ? this.namespace : namespaceOrDefault(namespace);
    return new Broker(new View(this.#view.connection, chosen, name));
  }

  /** Create the active snapshot `key` on the committed `parent`, or an empty one; answers the mounts to make. */
  prepare(key: string, options: calls.CreateOptions & LongCallOptions = {}): Promise<Mounts> {
    return this.#view.call(() => calls.prepare(key, options), readMounts, options);
  }

  /** Create the read-only snapshot `key` of the committed `parent`; answers the mounts to make. */
  view(key: string, options: calls.CreateOptions & CallOptions = {}): Promise<Mounts> {
    return this.#view.call(() => calls.view(key, options), readMounts, options);
  }

  /**
   * Turn the active `key` into the committed `name`, which has exactly `labels`; the key is free again.
   *
   * `parent`: the parent of one that was prepared without. `fence`: FailedPrecondition where `key` is another's.
   */
  commit(name: string, key: string, options: calls.CommitOptions & LongCallOptions = {}): Promise<void> {
    return this.#view.call(() => calls.commit(name, key, options), readNothing, options);
  }

  /** Remove a snapshot without children; its files are deleted in the background. */
  remove(key: string, options: calls.FenceOptions & CallOptions = {}): Promise<void> {
    return this.#view.call(() => calls.remove(key, options), readNothing, options);
  }

  /** The mounts of an active snapshot or view, as prepare and view answered them. */
  mounts(key: string, options: calls.FenceOptions & CallOptions = {}): Promise<Mounts> {
    return this.#view.call(() => calls.mounts(key, options), readMounts, options);
  }

  /** What is known of a snapshot. */
  stat(key: string, options: CallOptions = {}): Promise<Info> {
    return this.#view.call(() => calls.stat(key), readInfo, options);
  }

  /** Replace all labels, or those that `fieldpaths` name (`labels.<key>`); answers the snapshot with them. */
  update(name: string, labels: Labels, options: calls.UpdateOptions & CallOptions = {}): Promise<Info> {
    return this.#view.call(() => calls.update(name, labels, options), readInfo, options);
  }

  /** What a snapshot takes beyond its parents; an active one is measured. */
  usage(key: string, options: LongCallOptions = {}): Promise<Usage> {
    return this.#view.call(() => calls.usage(key), readUsage, options);
  }

  /** All snapshots that match one of the filters, by name. */
  walk(options: WalkOptions = {}): Walk {
    return new Walk(this.#view, options);
  }

  /** Wait until everything removed so far is deleted from disk. */
  cleanup(options: LongCallOptions = {}): Promise<void> {
    return this.#view.call(() => ({ verb: "cleanup" }), readNothing, options);
  }

  /** What is not as it must be with the snapshotter's records, journal and directories, of all namespaces. */
  audit(options: AuditOptions = {}): Audit {
    return new Audit(this.#view, undefined, options);
  }

  /** An audit whose findings are mended as they come; without `execute` they only say what would be done. */
  repair(options: RepairOptions = {}): Audit {
    return new Audit(this.#view, options.execute ?? false, options);
  }

  /** What keeps the snapshot `key`, and the last events on this name, also where there is none. */
  why(key: string, options: CallOptions = {}): Promise<Why> {
    return this.#view.call(() => calls.why(key), readWhy, options);
  }

  /** The events above `since`, each once and in order; without end, unless `follow` is false. */
  events(options: EventsOptions = {}): Events {
    return new Events(this.#view, options);
  }

  /** What exists in the namespace, kept up to date. */
  mirror(options: MirrorOptions = {}): Mirror {
    return new Mirror(this.#view, options);
  }

  /** Calls that travel together, in order; with `atomic` all take effect or none. */
  batch(options: BatchOptions = {}): Batch {
    return new Batch(this.#view, options);
  }

  /** How the broker and its snapshotters are. */
  async status(options: CallOptions = {}): Promise<Status> {
    const { connection } = this.#view;
    return connection.status(milliseconds(options.timeoutMs ?? connection.timeoutMs), options);
  }

  /** What the connection has done, and what it waits for. */
  statistics(): ConnectionStatistics {
    return this.#view.connection.statistics();
  }

  /** Take back what is under way, and close the connection: this view's and every other's. */
  close(): Promise<void> {
    return this.#view.connection.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
