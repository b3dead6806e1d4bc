/**
 * What a subscriber has seen and has missed: published messages and a journal become every event once, in order.
 *
 * A snapshotter's events are one sequence: 1, 2, 3 and so on. A publisher drops messages for a slow subscriber, and a
 * subscription reaches it later than the first events, so what arrives on the socket is the sequence with holes. The
 * journal has no holes but must be asked. The `Tracker` answers what arrives as long as that is provably the next event,
 * and else says that it is `behind`: then the journal is asked for what is above `position`.
 *
 * *What is provably next.* A subscriber of one topic follows the chain: each event names the one before it on its topic. A
 * subscriber of several topics cannot: that nothing is missing on the topic of an event does not say that nothing before
 * it is missing on another, and yielding it first would break the order. It therefore subscribes to the whole
 * snapshotter and follows the sequence itself, skipping by topic, undecoded, what it was not asked for.
 *
 * *The tail.* A hole with nothing behind it is seen by the next heartbeat, which names the newest sequence, and the
 * newest of each topic that changed since the heartbeat before.
 *
 * *Why messages may be thrown away while behind.* An event is in the journal before it is published, so the journal's
 * answer contains every event that arrived before the question.
 *
 * *A journal that starts again* (the store was replaced) shows as a heartbeat below `position`. The journal is then
 * asked, and answers `out_of_range`: the caller has to walk again.
 */

import { EVENT_VERBS, type SnapshotEvent } from "./contract.js";
import { InternalError, InvalidArgumentError, OutOfRangeError, UnimplementedError } from "./errors.js";
import {
  decodeEvent,
  decodeHeartbeat,
  EVENT_VERSION,
  events,
  FILTERS_MAX,
  heartbeatTopic,
  type Call,
  type EventsPage,
  type Heartbeat,
} from "./protocol.js";
import { texts } from "./arguments.js";
import { PAGES_AT_ONCE } from "./session.js";

/**
 * How long nothing may arrive, not even a heartbeat, before the journal is asked whether something was missed.
 *
 * So it is until two heartbeats have told their interval; from then on it is `SILENCE_INTERVALS` of those.
 */
export const SILENCE_MS = 5_000;
/** Intervals of the heartbeat without a message that are silence (RFC 2, 7.2). */
export const SILENCE_INTERVALS = 3;
/** Shortest silence that is believed in: a busy machine may be late by as much. */
export const SILENCE_MS_MIN = 1_000;
/** Longest silence that is waited for: the broker's clock may have been set between two heartbeats. */
export const SILENCE_MS_MAX = 300_000;
/** First pause before a journal that is unavailable is asked again. */
export const RETRY_MS = 100;
/** Longest pause before a journal that is unavailable is asked again. */
export const RETRY_MS_MAX = 2_000;

const PAGE = 1000;
const ENDINGS: readonly string[] = EVENT_VERBS.map((verb) => `/snapshot/${verb}`);

/** What became of the messages: events given out, duplicates dropped, gaps healed, messages that were none. */
export interface EventStatistics {
  readonly events: number;
  readonly duplicates: number;
  /** How often the journal was asked because something was, or may have been, missed: the start is not counted. */
  readonly gaps: number;
  readonly malformed: number;
}

/** The events of one snapshotter on the topics that begin with one of `topics`, above sequence `since`. */
export class Tracker {
  readonly snapshotter: string;
  readonly topics: readonly string[];
  /** Every event asked for with a sequence up to it was answered. */
  position: bigint;
  /** The journal has to be asked for what is above `position`; messages are thrown away until it has answered. */
  behind = true;
  /** How many milliseconds nothing may arrive before that is to be doubted; learned from the heartbeats. */
  silenceMs: number;
  #beatTime = 0n;
  #events = 0;
  #duplicates = 0;
  #gaps = 0;
  #malformed = 0;
  readonly #heartbeat: string;
  readonly #onlyTopic: string | undefined;

  constructor(
    snapshotter: string,
    namespace: string,
    topics: readonly string[],
    since: bigint,
    silenceMs = SILENCE_MS,
  ) {
    this.snapshotter = snapshotter;
    this.topics = checkedTopics(snapshotter, namespace, topics);
    this.position = since;
    this.silenceMs = Math.min(silenceMs, SILENCE_MS_MAX);
    this.#heartbeat = heartbeatTopic(snapshotter);
    const [first, second] = this.topics;
    this.#onlyTopic = first !== undefined && second === undefined && isComplete(first) ? first : undefined;
  }

  /** The prefixes to subscribe to; the heartbeat is covered. */
  get subscriptions(): readonly string[] {
    return this.#onlyTopic === undefined ? [`${this.snapshotter}/`] : [this.#onlyTopic, this.#heartbeat];
  }

  /** The counters so far. */
  statistics(): EventStatistics {
    return { events: this.#events, duplicates: this.#duplicates, gaps: this.#gaps, malformed: this.#malformed };
  }

  /** Answer what comes above `newest`, the newest sequence there is. */
  beginAt(newest: bigint): void {
    this.position = newest;
    this.behind = false;
  }

  /** The call that asks the journal for what is above `position`. */
  question(): Call {
    return events(this.position, this.topics, PAGE, PAGES_AT_ONCE);
  }

  /** Ask the journal, though no message says so: nothing was heard for too long. */
  doubt(): void {
    this.#miss();
  }

  /**
   * Take one published message; answers the event if it is the next one.
   *
   * A message that is none counts as lost: the next one shows the gap. Throws Unimplemented where the publisher speaks
   * another version.
   */
  feed(frames: readonly Buffer[]): SnapshotEvent | undefined {
    if (this.behind) {
      // A heartbeat may be among what is thrown away: the next is not one interval after the one before.
      this.#beatTime = 0n;
      return undefined;
    }
    const [topic, version, number, body] = frames;
    if (frames.length !== 4 || !topic || !version || number?.length !== 8 || !body) {
      this.#malformed++;
      return undefined;
    }
    if (!EVENT_VERSION.equals(version)) {
      throw new UnimplementedError(
        `the broker publishes events as '${version.toString("latin1")}', not SNBE version 1: update the client`,
      );
    }
    try {
      const name = topic.toString();
      if (name === this.#heartbeat) {
        this.#feedHeartbeat(decodeHeartbeat(body));
        return undefined;
      }
      return this.#feedEvent(name, number.readBigUInt64BE(), body);
    } catch (error) {
      if (!(error instanceof InternalError)) throw error;
      this.#malformed++;
      return undefined;
    }
  }

  #feedEvent(topic: string, sequence: bigint, body: Buffer): SnapshotEvent | undefined {
    if (sequence <= this.position) {
      this.#duplicates++;
      return undefined;
    }
    let event: SnapshotEvent | undefined;
    let follows: boolean;
    if (this.#onlyTopic === undefined) {
      follows = sequence === this.position + 1n;
      if (follows && this.#asked(topic)) event = decodeEvent(body);
    } else if (topic === this.#onlyTopic) {
      event = decodeEvent(body);
      follows = event.previous <= this.position;
    } else {
      // A subscription is a prefix: a topic that merely begins like the one asked for may match.
      return undefined;
    }
    if (event !== undefined && (event.sequence !== sequence || event.topic !== topic)) {
      this.#malformed++;
      return undefined;
    }
    if (!follows) {
      this.#miss();
      return undefined;
    }
    this.position = sequence;
    if (event !== undefined) this.#events++;
    return event;
  }

  #asked(topic: string): boolean {
    return this.topics.some((prefix) => topic.startsWith(prefix));
  }

  #feedHeartbeat(beat: Heartbeat): void {
    this.#learnInterval(beat.time);
    if (beat.sequence === this.position) return;
    if (beat.sequence > this.position && this.position >= beat.previous && beat.topics !== undefined) {
      let missed = false;
      for (const [topic, sequence] of beat.topics) missed ||= sequence > this.position && this.#asked(topic);
      if (!missed) {
        this.position = beat.sequence;
        return;
      }
    }
    this.#miss();
  }

  /** Take the publisher's times, in nanoseconds: those of arrival say how often this program looks. */
  #learnInterval(time: bigint): void {
    const before = this.#beatTime;
    this.#beatTime = time;
    if (0n < before && before < time) {
      const silence = SILENCE_INTERVALS * (Number(time - before) / 1e6);
      this.silenceMs = Math.min(Math.max(silence, SILENCE_MS_MIN), SILENCE_MS_MAX);
    }
  }

  #miss(): void {
    this.behind = true;
    this.#gaps++;
  }

  /**
   * Take one page of the journal; answers the events that were not answered yet.
   *
   * Throws OutOfRange where the journal ends below `position`: it is not the journal that was read before.
   */
  page(page: EventsPage): readonly SnapshotEvent[] {
    const before = this.position;
    if (page.newest < before) {
      throw new OutOfRangeError(`the journal of '${this.snapshotter}' ends at ${page.newest}, below ${before}`, {
        details: { newest: page.newest },
      });
    }
    const fresh = page.events.filter((event) => event.sequence > before && this.#asked(event.topic));
    const last = page.events.at(-1)?.sequence ?? 0n;
    this.position = larger(before, larger(page.next, last));
    if (this.position === before && before < page.newest && page.events.length > 0) {
      throw new InternalError(`the journal of '${this.snapshotter}' answered what is above ${before} with what is not`);
    }
    if (this.position >= page.newest || this.position === before) {
      // Nothing for these topics up to the newest: an empty page that leads nowhere is the end.
      this.position = larger(this.position, page.newest);
      this.behind = false;
    }
    this.#events += fresh.length;
    return fresh;
  }
}

function larger(one: bigint, other: bigint): bigint {
  return one < other ? other : one;
}

/** The journal's refusal, as it reaches the caller. */
export function walkAgain(error: OutOfRangeError, tracker: Tracker): OutOfRangeError {
  const { oldest, newest } = error.details;
  // The journal's words are for whoever asks it directly, and end in advice of their own.
  let held = "";
  if (isSequence(oldest) && isSequence(newest)) {
    held = oldest <= newest ? `, which has ${oldest} to ${newest}` : ", which is empty";
  } else if (isSequence(newest)) {
    held = `, which ends at ${newest}`;
  }
  return new OutOfRangeError(
    `the events of '${tracker.snapshotter}' above ${tracker.position} are not in its journal${held}: walk again, ` +
      "and follow the events above the walk's sequence",
    { details: { ...error.details, since: tracker.position } },
  );
}

function isSequence(value: unknown): value is number | bigint {
  return typeof value === "number" || typeof value === "bigint";
}

function isComplete(topic: string): boolean {
  return ENDINGS.some((ending) => topic.endsWith(ending)) && topic.split("/").length === 4;
}

/** The prefixes asked for, those of the own namespace where none are; InvalidArgument for another snapshotter's. */
function checkedTopics(snapshotter: string, namespace: string, topics: readonly string[]): readonly string[] {
  const asked = texts(topics, "topics");
  const chosen = asked.length > 0 ? asked : [`${snapshotter}/${namespace}/`];
  if (chosen.length > FILTERS_MAX) {
    throw new InvalidArgumentError(`${chosen.length} topics, more than ${FILTERS_MAX}: use a shorter prefix`);
  }
  for (const topic of chosen) {
    if (!topic.startsWith(`${snapshotter}/`)) {
      throw new InvalidArgumentError(
        `topic '${topic.slice(0, 80)}' does not begin with '${snapshotter}/': a stream has the events of one ` +
          "snapshotter; open one for each with broker.snapshotter(name).events()",
      );
    }
  }
  return chosen;
}
