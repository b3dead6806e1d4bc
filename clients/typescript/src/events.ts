/** The events of one snapshotter, each once and in the order of their sequence: socket and journal as one stream. */

import type { Subscriber } from "zeromq";

import { milliseconds, sequenceNumber } from "./arguments.js";
import { Bell, turn } from "./bell.js";
import type { Connection } from "./connection.js";
import type { SnapshotEvent } from "./contract.js";
import { FailedPreconditionError, OutOfRangeError, ResourceExhaustedError, UnavailableError } from "./errors.js";
import { Pages } from "./pages.js";
import { readEventsPage, type EventsPage } from "./protocol.js";
import { Stream } from "./session.js";
import { Steps } from "./steps.js";
import { RETRY_MS, RETRY_MS_MAX, SILENCE_MS, Tracker, walkAgain, type EventStatistics } from "./tracker.js";
import type { View } from "./view.js";
import { Walk } from "./walk.js";

/** Most messages that are taken from the socket before the first of their events is given out. */
const BURST = 256;

/** Which events, and how. */
export interface EventsOptions {
  /** Events above this sequence; those from here on where absent. */
  readonly since?: bigint | number | undefined;
  /** Those on topics that begin with one of these; where absent, those of the namespace. */
  readonly topics?: readonly string[] | undefined;
  /** Go on with the events that come (true where absent), or end with the newest one of the journal. */
  readonly follow?: boolean | undefined;
  /** How long a journal that does not answer is asked again, in milliseconds; the connection's timeout where absent. */
  readonly timeoutMs?: number | undefined;
  /**
   * After how many milliseconds without any message the journal is asked whether something was missed, until two
   * heartbeats have told their interval; from then on three intervals.
   */
  readonly silenceMs?: number | undefined;
  /** Aborting it ends the stream with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * The events of one snapshotter: `for await` it. The first step, or `start()`, subscribes; leaving the loop, `close()` and
 * `await using` unsubscribe.
 *
 * What the publisher drops is taken from the journal, across restarts of the broker. `OutOfRangeError`: the journal no
 * longer has what is missing; walk again, and follow from the walk's sequence.
 */
export class Events extends Steps<SnapshotEvent> {
  readonly #view: View;
  readonly #connection: Connection;
  readonly #options: EventsOptions;
  readonly #since: bigint | undefined;
  readonly #follow: boolean;
  readonly #silenceMs: number;
  readonly #bell = new Bell();
  #tracker: Tracker | undefined;
  #socket: Subscriber | undefined;
  #pages: Pages<EventsPage> | undefined;
  /** The message that is waited for, and then the message. */
  #waiting = false;
  #message: readonly Buffer[] | undefined;
  #heard = 0;
  #closed = false;

  /** @internal */
  constructor(view: View, options: EventsOptions) {
    super();
    this.#view = view;
    this.#connection = view.connection;
    this.#options = options;
    this.#since = options.since === undefined ? undefined : sequenceNumber(options.since, "since");
    this.#follow = options.follow ?? true;
    this.#silenceMs = milliseconds(options.silenceMs ?? SILENCE_MS, "silenceMs");
    if (options.timeoutMs !== undefined) milliseconds(options.timeoutMs);
    options.signal?.addEventListener("abort", this.#onAbort, { once: true });
  }

  /** Subscribe, unless that is done: events from here on are in the stream. */
  async start(): Promise<void> {
    await this.turns.take(async () => {
      await this.#started();
    });
  }

  /** Every event asked for up to this one was given out: where another stream goes on (`since`). */
  get sequence(): bigint {
    const next = this.ready[this.used];
    if (next !== undefined) return next.sequence - 1n;
    if (this.#tracker === undefined) {
      throw new FailedPreconditionError("a stream of events has no sequence before it is started");
    }
    return this.#tracker.position;
  }

  /** What was dropped on the way, and healed. */
  statistics(): EventStatistics {
    return this.#tracker?.statistics() ?? { events: 0, duplicates: 0, gaps: 0, malformed: 0 };
  }

  protected following(): Promise<SnapshotEvent | undefined> {
    return this.#next(Infinity);
  }

  /** The next event; undefined where none comes within `withinMs`, or the stream is at its end. */
  poll(withinMs: number): Promise<SnapshotEvent | undefined> {
    return this.turns.take(() => this.#next(performance.now() + withinMs));
  }

  /** Unsubscribe; what was received already is still given out. */
  close(): void {
    this.#closed = true;
    this.#options.signal?.removeEventListener("abort", this.#onAbort);
    this.#pages?.close();
    this.#pages = undefined;
    if (this.#socket !== undefined) this.#connection.unsubscribe(this.#socket);
    this.#bell.ring();
  }

  readonly #onAbort = (): void => {
    this.close();
  };

  async #started(): Promise<Tracker> {
    if (this.#tracker !== undefined) return this.#tracker;
    const { signal, timeoutMs, topics } = this.#options;
    signal?.throwIfAborted();
    const lane = await this.#view.resolved(undefined, signal);
    const name = Buffer.from(lane.target).toString();
    const tracker = new Tracker(name, lane.namespace, topics ?? [], this.#since ?? 0n, this.#silenceMs);
    if (this.#follow) {
      this.#socket = await this.#connection.subscribe(tracker.subscriptions);
      if (this.#closed) this.#connection.unsubscribe(this.#socket);
    }
    if (this.#since === undefined) {
      // Start above the newest event there is: a walk's first page says which that is.
      const walk = new Walk(this.#view, { page: 1, signal, timeoutMs });
      tracker.beginAt(await walk.first());
      walk.close();
    }
    this.#heard = performance.now();
    this.#tracker = tracker;
    return tracker;
  }

  async #next(until: number): Promise<SnapshotEvent | undefined> {
    try {
      const tracker = this.#tracker ?? (await this.#started());
      for (;;) {
        const event = this.ready[this.used];
        if (event !== undefined) {
          this.used++;
          return event;
        }
        this.#options.signal?.throwIfAborted();
        this.#connection.checkOpen();
        if (this.#closed || performance.now() >= until) return undefined;
        if (tracker.behind) await this.#askJournal(tracker, until);
        else if (this.#socket === undefined) return undefined;
        else await this.#receive(tracker, this.#socket, until);
      }
    } catch (error) {
      if (this.#options.signal?.aborted) this.close();
      throw error;
    }
  }

  #giveOut(events: readonly SnapshotEvent[]): void {
    this.ready = events;
    this.used = 0;
  }

  /** Take what lies in the socket; where nothing does, wait for a message, for silence, or until `until`. */
  async #receive(tracker: Tracker, socket: Subscriber, until: number): Promise<void> {
    const events: SnapshotEvent[] = [];
    let taken = 0;
    while (taken < BURST && !tracker.behind && !this.#closed) {
      const frames = this.#message ?? (!this.#waiting && socket.readable ? await this.#take(socket) : undefined);
      this.#message = undefined;
      if (frames === undefined) break;
      taken++;
      const event = tracker.feed(frames);
      if (event !== undefined) events.push(event);
    }
    if (taken > 0) {
      this.#heard = performance.now();
      this.#giveOut(events);
      return;
    }
    // Asking a socket for its state takes the wake-up from a receive that waits: from here on none asks.
    if (!this.#waiting) this.#waitForMessage(socket);
    const left = this.#heard + tracker.silenceMs - performance.now();
    if (left > 0) {
      await this.#bell.wait(Math.min(left, until - performance.now()));
    } else {
      // A program that was stopped finds its timer run out before it could look at what lies in the socket.
      await turn();
      if (this.#message !== undefined) return;
      this.#heard = performance.now();
      this.#connection.resubscribe(socket);
      tracker.doubt();
    }
  }

  /** The message that is there; undefined where the socket was closed. */
  #take(socket: Subscriber): Promise<readonly Buffer[] | undefined> {
    return socket.receive().catch(() => undefined);
  }

  #waitForMessage(socket: Subscriber): void {
    this.#waiting = true;
    void this.#take(socket).then((message) => {
      this.#message = message;
      this.#waiting = false;
      this.#bell.ring();
    });
  }

  /** Take a page of what is missing from the journal, asking again until the timeout where it is unavailable. */
  async #askJournal(tracker: Tracker, until: number): Promise<void> {
    const giveUp = performance.now() + (this.#options.timeoutMs ?? this.#connection.timeoutMs);
    let pause = RETRY_MS;
    for (;;) {
      try {
        await this.#readJournal(tracker, until);
        return;
      } catch (error) {
        this.#pages = undefined;
        if (error instanceof OutOfRangeError) throw walkAgain(error, tracker);
        const mayPass = error instanceof UnavailableError || error instanceof ResourceExhaustedError;
        if (!mayPass || this.#socket === undefined || performance.now() + pause > giveUp) throw error;
      }
      await this.#pause(pause, until);
      if (this.#closed || performance.now() >= until) return;
      pause = Math.min(2 * pause, RETRY_MS_MAX);
    }
  }

  async #pause(ms: number, until: number): Promise<void> {
    const end = Math.min(performance.now() + ms, until);
    while (!this.#closed && performance.now() < end) await this.#bell.wait(end - performance.now());
  }

  async #readJournal(tracker: Tracker, until: number): Promise<void> {
    if (this.#pages === undefined) {
      const lane = await this.#view.resolved(this.#options.timeoutMs, this.#options.signal);
      if (this.#closed) return;
      const stream = new Stream(lane, tracker.question(), readEventsPage);
      this.#pages = new Pages(this.#connection, stream, this.#bell.ring);
    }
    const pages = this.#pages;
    for (;;) {
      const page = pages.take();
      if (page !== undefined) {
        this.#giveOut(tracker.page(page));
        if (!tracker.behind) this.#endPages();
        return;
      }
      if (pages.over) {
        this.#pages = undefined;
        return;
      }
      if (this.#closed || performance.now() >= until) return;
      await this.#bell.wait(until - performance.now());
    }
  }

  #endPages(): void {
    this.#pages?.close();
    this.#pages = undefined;
  }
}
