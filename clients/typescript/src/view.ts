/** One snapshotter and namespace over a connection: where the calls of a broker go, once the snapshotter is known. */

import { milliseconds } from "./arguments.js";
import type { CallFacts, Connection } from "./connection.js";
import { onlySnapshotter, targetFrame } from "./endpoints.js";
import type { Call } from "./protocol.js";
import { Lane, type Read } from "./session.js";

/** What may be said of every call. */
export interface CallOptions {
  /** How long the call may take, in milliseconds; the connection's own where absent, `Infinity` for without end. */
  readonly timeoutMs?: number | undefined;
  /** Aborting it rejects the call with the signal's reason and takes the call back at the broker. */
  readonly signal?: AbortSignal | undefined;
}

export class View {
  #lane: Lane | undefined;
  #resolving: Promise<Lane> | undefined;

  constructor(
    readonly connection: Connection,
    readonly namespace: string,
    snapshotter: string | undefined,
  ) {
    if (snapshotter !== undefined) {
      this.#lane = new Lane(targetFrame(snapshotter), namespace, connection.timeoutMs);
    }
  }

  /** One call over this view. What `build` throws is the call's error. */
  call<T>(build: () => Call, read: Read<T>, options: CallOptions & CallFacts): Promise<T> {
    const lane = this.#lane;
    if (lane !== undefined && options.timeoutMs === undefined) return this.connection.call(lane, build, read, options);
    return this.#callElsewhere(build, read, options);
  }

  /** A call whose lane is not the usual one, or not known yet. */
  async #callElsewhere<T>(build: () => Call, read: Read<T>, options: CallOptions & CallFacts): Promise<T> {
    const lane = await this.resolved(options.timeoutMs, options.signal);
    return this.connection.call(lane, build, read, options);
  }

  /** The lane; the broker is asked for its only snapshotter where none was named. */
  async resolved(timeoutMs?: number, signal?: AbortSignal): Promise<Lane> {
    if (timeoutMs !== undefined) milliseconds(timeoutMs);
    const usual = this.#lane ?? (await orAborted((this.#resolving ??= this.#resolve()), signal));
    return timeoutMs === undefined ? usual : new Lane(usual.target, usual.namespace, timeoutMs);
  }

  async #resolve(): Promise<Lane> {
    const { connection } = this;
    try {
      const name = onlySnapshotter(await connection.status(connection.timeoutMs), connection.endpoint);
      return (this.#lane = new Lane(targetFrame(name), this.namespace, connection.timeoutMs));
    } finally {
      this.#resolving = undefined;
    }
  }
}

/** What `promise` answers, unless `signal` is aborted before. */
export function orAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise;
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const onAbort = () => {
      reject(signal.reason as Error);
    };
    signal.addEventListener("abort", onAbort, { once: true });
    promise.then(resolve, reject).finally(() => {
      signal.removeEventListener("abort", onAbort);
    });
  });
}
