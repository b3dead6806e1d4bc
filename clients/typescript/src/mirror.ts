/** What exists, kept up to date: a walk, and the events above it, applied as RFC 2, section 6, says. */

import type { Info, SnapshotEvent } from "./contract.js";
import { OutOfRangeError } from "./errors.js";
import { Events, type EventsOptions } from "./events.js";
import type { EventStatistics } from "./tracker.js";
import type { View } from "./view.js";
import { Walk } from "./walk.js";

/** How a mirror is kept. */
export type MirrorOptions = Pick<EventsOptions, "timeoutMs" | "silenceMs" | "signal">;

/** The mirror was made anew by a walk: at the start, and after the journal no longer had what was missed. */
export interface Walked {
  readonly type: "walked";
  /** The newest event that the first page of the walk has seen. */
  readonly sequence: bigint;
  /** What the mirror held before the walk; empty at the start. */
  readonly before: ReadonlyMap<string, Info>;
}

/** An event was applied to the mirror. */
export interface Changed {
  readonly type: "changed";
  readonly event: SnapshotEvent;
}

/** What happened to a mirror. */
export type Change = Walked | Changed;

/**
 * The snapshots of one namespace, by name, as they are: `for await` it for its changes, each of which is in `snapshots` when
 * it is given out. The mirror moves only as it is iterated.
 *
 *     for await (const change of broker.mirror()) {
 *       if (change.type === "walked") console.log(mirror.snapshots.size);
 *       else console.log(change.event.verb, change.event.key);
 *     }
 */
export class Mirror implements AsyncIterable<Change> {
  readonly #view: View;
  readonly #options: MirrorOptions;
  #snapshots = new Map<string, Info>();
  #events: Events | undefined;
  #healed = 0;
  #closed = false;

  /** @internal */
  constructor(view: View, options: MirrorOptions) {
    this.#view = view;
    this.#options = options;
  }

  /** Name to snapshot. In the order in which they came: the walk's first. */
  get snapshots(): ReadonlyMap<string, Info> {
    return this.#snapshots;
  }

  /** How often something was, or may have been, missed, and had from the journal or by a walk. */
  get gaps(): number {
    return this.#healed + (this.#events?.statistics().gaps ?? 0);
  }

  /** What became of the messages since the last walk. */
  statistics(): EventStatistics {
    return this.#events?.statistics() ?? { events: 0, duplicates: 0, gaps: 0, malformed: 0 };
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Change, undefined> {
    try {
      while (!this.#closed) {
        yield await this.#walk();
        try {
          yield* this.#follow();
          return;
        } catch (error) {
          if (!(error instanceof OutOfRangeError)) throw error;
        }
        this.#healed += 1 + this.statistics().gaps;
        this.#events?.close();
        this.#events = undefined;
      }
    } finally {
      this.close();
    }
  }

  /** Stop following; `snapshots` stays as it is. */
  close(): void {
    this.#closed = true;
    this.#events?.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.close();
    return Promise.resolve();
  }

  async #walk(): Promise<Walked> {
    const { signal, timeoutMs } = this.#options;
    const before = this.#snapshots;
    await using walk = new Walk(this.#view, { signal, timeoutMs });
    const sequence = await walk.first();
    // Subscribed while the walk goes on: what comes meanwhile is kept by the socket, or had from the journal.
    const events = new Events(this.#view, { ...this.#options, since: sequence });
    this.#events = events;
    await events.start();
    const snapshots = new Map<string, Info>();
    for await (const info of walk) snapshots.set(info.name, info);
    this.#snapshots = snapshots;
    return { type: "walked", sequence, before };
  }

  async *#follow(): AsyncGenerator<Changed, undefined> {
    for await (const event of this.#events ?? []) {
      this.#apply(event);
      yield { type: "changed", event };
    }
  }

  #apply({ verb, key, info }: SnapshotEvent): void {
    if (verb === "commit" || verb === "remove") this.#snapshots.delete(key);
    if (info !== undefined) this.#snapshots.set(info.name, info);
  }
}
