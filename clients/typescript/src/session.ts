/**
 * Requests out, replies in, without a socket: all of the client but the waiting.
 *
 * An `Exchange` is one request under way. Its calls settle one by one, in whatever order the parts of the reply bring
 * their outcomes; a call that its caller has given up stays open until the broker has answered it, so that the exchange
 * can tell when nobody waits for any of its calls: then, and only then, the whole request is taken back with a `Cancel`.
 * A `Stream` is a request with one call that is answered in pages.
 *
 * *Repeats.* A request is tried again when its connection broke, and when the broker answers that it is unavailable: the
 * same calls in the same order, under another request id and with the token of the first try, by which the broker knows
 * what it has done already (RFC 1, 6.5). An outcome that came stays; that of the repeat says the same. A caller that gives
 * up while its request waits for the next try cannot be left out of it, for a token stands for all its calls: a `Cancel`
 * for the calls `givenUp` is sent right behind the repeat. `Patience` has the pace, `Repeats` the count.
 *
 * *Doubt.* A try without a reply may have taken effect. A later try that is refused does not take that doubt away, only an
 * outcome does: until then every error that is told says so, and has `inDoubt` set.
 *
 * Whatever the broker sends, a call ends with its answer or with an error of the contract.
 */

import type { Progress } from "./contract.js";
import {
  CancelledError,
  FailedPreconditionError,
  InternalError,
  InvalidArgumentError,
  retold,
  UnavailableError,
  type SnapbrokerError,
} from "./errors.js";
import { reason } from "./msgpack.js";
import { Repeats, type Patience } from "./patience.js";
import {
  BODY_BYTES_MAX,
  cancel,
  CHANGES,
  decodeReply,
  encodeRequest,
  readAnswer,
  thrown,
  type Call,
  type Fault,
  type WalkPage,
} from "./protocol.js";

/** How long a call waits for its answer where the caller says nothing, in milliseconds. */
export const TIMEOUT_MS = 60_000;
/** Most calls in one request: enough for a group commit, few enough to answer early. */
export const CALLS_PER_REQUEST = 256;
/**
 * A request that reads leaves when it has so many calls, though more come in the same turn: the snapshotter then works on
 * one while the client reads the answer of another. Writes gain more by sharing a commit.
 */
export const READS_PER_REQUEST = 32;
export const READS: ReadonlySet<string> = new Set(["stat", "mounts", "usage"]);
/** How long an audit or a repair may take where the caller says nothing, in milliseconds: it reads all there is. */
export const AUDIT_MS = 3_600_000;
/** Infos in one page of a walk. */
export const WALK_PAGE = 1000;
/** Pages asked for at once by walk and events: what a slow reader may have lying in its memory. */
export const PAGES_AT_ONCE = 8;
/** Longest timeout that is sent; a longer one is the broker's own longest, for who waits so long waits without end. */
const TIMEOUT_MS_SENT_MAX = 2 ** 31;

/** Codes of calls that are repeated. `cancelled`, to a call nobody took back, is what a broker that stops may say. */
const AGAIN: ReadonlySet<string> = new Set(["unavailable", "cancelled"]);
/** Codes that are an outcome: a call that has one of these had no effect, in no try (RFC 1, 6.5). */
const DECIDED: ReadonlySet<string> = new Set([
  "not_found",
  "already_exists",
  "failed_precondition",
  "invalid_argument",
  "unimplemented",
]);

const NO_TOKEN = new Uint8Array();

/** Reads what a verb's `ok` is; throws where it is something else. */
export type Read<T> = (ok: unknown) => T;
/** Told how far a long call is, now and then. */
export type OnProgress = (progress: Progress) => void;

/** Raise Internal where a page's `next` leads back: the walk would never end. */
export function checkContinues(page: WalkPage, after: string): void {
  if (page.next && Buffer.compare(Buffer.from(page.next), Buffer.from(after)) <= 0) {
    throw new InternalError(
      `the broker continues its walk at '${page.next.slice(0, 80)}', though it was at '${after.slice(0, 80)}' before`,
    );
  }
}

// Bodies and frames.

function timeoutSent(timeoutMs: number): number {
  return timeoutMs < TIMEOUT_MS_SENT_MAX ? Math.max(1, Math.round(timeoutMs)) : 0;
}

/** The body that takes back the request `requestId`. */
export function encodeCancel(requestId: Uint8Array, namespace: string, calls: readonly number[]): Uint8Array {
  return encodeRequest({ calls: [cancel(requestId, calls)], namespace, atomic: false, timeoutMs: 0, token: NO_TOKEN });
}

// Requests under way.

/** Where the outcome of one call goes. */
export interface Slot<T> {
  /** Whether the caller has an outcome, or has given up. */
  readonly settled: boolean;
  /** The request that the call is in. */
  exchange: Exchange | undefined;
  succeed(value: T): void;
  fail(error: unknown): void;
}

/** Where calls go: which snapshotter, whose snapshots, and how long they may take. Calls of one lane travel together. */
export class Lane {
  /** The same for every lane that goes the same way. */
  readonly key: string;

  constructor(
    readonly target: Uint8Array,
    readonly namespace: string,
    readonly timeoutMs: number,
  ) {
    this.key = `${timeoutMs} ${namespace} ${Buffer.from(target).toString("latin1")}`;
  }
}

/** What the client needs of any request under way: whose it is, and how to end it. */
export abstract class Pursuit {
  readonly calls: Call[] = [];
  requestNumber = 0;
  requestId: Uint8Array = NO_TOKEN;
  sent = false;
  deadline = Infinity;
  timer: NodeJS.Timeout | undefined;
  onEnd: (() => void) | undefined;
  /** Once a try is over: why the request is to be repeated. */
  failure: SnapbrokerError | undefined;
  /** A try without a reply may have taken effect. */
  doubt = false;
  repeats: Repeats | undefined;

  constructor(readonly lane: Lane) {}

  /** The body to send; InvalidArgument where it is too long. */
  abstract encode(): Uint8Array;
  /** Take one part of the reply; true when nothing more is to come. Throws Internal where it is malformed. */
  abstract receive(body: Uint8Array, last: boolean): boolean;
  /** End every call that has no outcome with `error`. */
  abstract fail(error: SnapbrokerError): void;
  /** Whether nobody waits for what is still to come. */
  abstract readonly forsaken: boolean;
}

/** A request whose calls have one outcome each. */
export class Exchange extends Pursuit {
  patient = false;
  token: Uint8Array = NO_TOKEN;
  /** How many calls have no outcome. */
  unsettled = 0;
  /** Why the request failed as a whole, where no call had an outcome of its own. */
  refusal: SnapbrokerError | undefined;
  readonly atomic: boolean;
  #reads: Read<unknown>[] = [];
  #slots: (Slot<never> | undefined)[] = [];
  #progress = new Map<number, OnProgress>();
  readonly #refused = new Map<number, SnapbrokerError>();
  readonly #forgone: number[] = [];
  #abandoned = 0;

  constructor(lane: Lane, atomic = false) {
    super(lane);
    this.atomic = atomic;
  }

  /** Add a call whose outcome goes to `slot`; answers how many calls there are. */
  add<T>(call: Call, read: Read<T>, slot: Slot<T>, progress?: OnProgress): number {
    this.calls.push(call);
    this.#reads.push(read);
    this.#slots.push(slot);
    slot.exchange = this;
    if (progress !== undefined) this.#progress.set(this.calls.length - 1, progress);
    return ++this.unsettled;
  }

  /** One caller has given up; its slot is settled. */
  abandon(): void {
    this.#abandoned++;
  }

  /** The one caller of all calls has given up. */
  abandonAll(): void {
    this.#abandoned = this.unsettled;
  }

  /** The number of the call whose outcome was to go to `slot`; undefined once it has its outcome. */
  number(slot: Slot<never>): number | undefined {
    const index = this.#slots.indexOf(slot);
    return index < 0 ? undefined : index;
  }

  /** Leave out, before it is sent, what nobody waits for. */
  withoutAbandoned(): void {
    if (this.#abandoned === 0) return;
    const before = this.#slots;
    const kept = [...before.keys()].filter((index) => before[index]?.settled === false);
    const at = <T>(values: readonly T[]) => kept.map((index) => values[index] as T);
    const calls = at(this.calls);
    this.calls.length = 0;
    this.calls.push(...calls);
    this.#reads = at(this.#reads);
    this.#slots = at(before);
    this.#progress = new Map(
      kept.flatMap((old, index) => {
        const report = this.#progress.get(old);
        return report === undefined ? [] : [[index, report] as const];
      }),
    );
    this.unsettled = kept.length;
    this.#abandoned = 0;
  }

  get forsaken(): boolean {
    return 0 < this.unsettled && this.unsettled <= this.#abandoned;
  }

  /** The body to send; a repeat has the time that is left. */
  encode(): Uint8Array {
    const timeoutMs = this.repeats?.timeLeft ?? this.lane.timeoutMs;
    return bounded(this.calls.length, {
      calls: this.calls,
      namespace: this.lane.namespace,
      atomic: this.atomic,
      timeoutMs: timeoutSent(timeoutMs),
      token: this.token,
    });
  }

  /** Make ready for another try; answers the milliseconds until then, undefined where there is none. */
  pause(patience: Patience, error: SnapbrokerError): number | undefined {
    if (!this.patient) return undefined;
    this.repeats ??= new Repeats(patience, this.deadline);
    const pause = this.repeats.pause(error);
    if (pause !== undefined) {
      this.sent = false;
      this.failure = undefined;
      this.#refused.clear();
    }
    return pause;
  }

  /** The calls that a repeat must hold although their callers have gone. */
  get givenUp(): readonly number[] {
    const open = [...this.#slots.keys()].filter((index) => this.#slots[index]?.settled === true);
    return [...this.#forgone, ...open];
  }

  /** The same calls in two requests, for one that cannot be sent as it is; none where it has to stay whole. */
  halves(): readonly Exchange[] {
    if (this.atomic || this.onEnd !== undefined || this.calls.length < 2) return [];
    const middle = this.calls.length >> 1;
    return [
      [0, middle],
      [middle, this.calls.length],
    ].map(([begin, end]) => {
      const half = new Exchange(this.lane);
      for (let index = begin ?? 0; index < (end ?? 0); index++) {
        const [call, read, slot] = [this.calls[index], this.#reads[index], this.#slots[index]];
        if (call && read && slot) half.add(call, read as Read<never>, slot, this.#progress.get(index));
      }
      return half;
    });
  }

  /** Take one part of the reply; true when every call has its outcome, or this try is over: see `failure`. */
  receive(body: Uint8Array, last: boolean): boolean {
    const reply = decodeReply(body);
    for (const outcome of reply.outcomes) {
      const index = outcome.call;
      if (index < 0 || index >= this.#slots.length) {
        throw new InternalError(`the broker answered call ${index} of a request of ${this.#slots.length}`);
      }
      const slot = this.#slots[index];
      if (slot === undefined) continue;
      if (outcome.progress !== undefined) {
        this.#report(index, slot, outcome.progress);
        continue;
      }
      if (outcome.error !== undefined && this.#refuse(index, slot, outcome.error)) continue;
      this.#slots[index] = undefined;
      this.unsettled--;
      if (slot.settled) this.#abandoned--;
      else this.#settle(index, slot, outcome.ok, outcome.error);
    }
    if (reply.error !== undefined) return this.#receiveRefusal(thrown(reply.error));
    if (last && this.unsettled > 0) {
      this.#endTry();
      return true;
    }
    return this.unsettled === 0;
  }

  #settle(index: number, slot: Slot<never>, ok: unknown, fault: Fault | undefined): void {
    if (fault !== undefined) {
      const refusal = thrown(fault);
      const final = this.repeats === undefined || DECIDED.has(refusal.code);
      slot.fail(final ? refusal : this.#told(index, refusal));
      return;
    }
    let value: never;
    try {
      value = readAnswer(ok, this.#reads[index] as Read<never>);
    } catch (error) {
      slot.fail(error);
      return;
    }
    slot.succeed(value);
  }

  /** Keep a call open that a repeat may bring an outcome for. */
  #refuse(index: number, slot: Slot<never>, fault: Fault): boolean {
    if (!this.patient || !AGAIN.has(fault.code)) return false;
    if (slot.settled) {
      // Nobody waits for it, but a repeat for the others would execute it.
      this.#forgone.push(index);
      return false;
    }
    this.#refused.set(index, thrown(fault));
    return true;
  }

  /** The request was refused as a whole; or the snapshotter died, which is told by a detail (RFC 1, 6.4). */
  #receiveRefusal(error: SnapbrokerError): boolean {
    this.doubt ||= error.details["in_doubt"] === true;
    if (this.patient && error instanceof UnavailableError) this.failure = error;
    else this.fail(error);
    return true;
  }

  /** The reply is over and calls are open: those that were refused. */
  #endTry(): void {
    const [error] = this.#refused.values();
    if (error === undefined || this.#refused.size < this.unsettled) {
      throw new InternalError("the broker ended its reply without an outcome for every call");
    }
    if (this.atomic && this.unsettled < this.calls.length) {
      // The reason is another call's, and final: these were taken back with it.
      this.fail(error);
    } else {
      this.failure = error;
    }
  }

  /** End every call without outcome, each with an error of its own. */
  fail(error: SnapbrokerError): void {
    if (this.unsettled === 0) return;
    if (this.unsettled === this.calls.length && this.#refused.size === 0) this.refusal = error;
    this.#slots.forEach((slot, index) => {
      if (slot !== undefined && !slot.settled) slot.fail(this.#told(index, this.#refused.get(index) ?? error));
      this.#slots[index] = undefined;
    });
    this.unsettled = 0;
  }

  /** The error for the caller of one call: how long it was repeated, and whether it may have taken effect. */
  #told(index: number, error: SnapbrokerError): SnapbrokerError {
    const verb = this.calls[index]?.verb ?? "";
    const doubt = this.doubt && CHANGES.has(verb);
    let message = error.message + (this.repeats?.told() ?? "");
    if (doubt && !message.includes("unknown")) {
      message += "; it is unknown whether the call took effect: look with stat";
    }
    return retold(error, message, doubt);
  }

  /** Hand on how far a call is; a callback that fails gives its own call up, and no other. */
  #report(index: number, slot: Slot<never>, progress: Progress): void {
    const report = this.#progress.get(index);
    if (report === undefined || slot.settled) return;
    try {
      report(progress);
    } catch (error) {
      slot.fail(error);
      this.abandon();
    }
  }
}

function bounded(count: number, request: Parameters<typeof encodeRequest>[0]): Uint8Array {
  let body: Uint8Array;
  try {
    body = encodeRequest(request);
  } catch (error) {
    throw new InvalidArgumentError(`the call cannot be sent: ${reason(error)}`);
  }
  if (body.length > BODY_BYTES_MAX) {
    throw new InvalidArgumentError(
      `a request of ${count} calls takes ${body.length} bytes, more than ${BODY_BYTES_MAX}: send fewer at once`,
    );
  }
  return body;
}

/** A request of one call that is answered in pages; `wake` is called whenever something has come. */
export class Stream<T> extends Pursuit {
  readonly #read: Read<T>;
  readonly #pages: T[] = [];
  #wanted = true;
  #answered = false;
  #error: SnapbrokerError | undefined;
  over = false;
  wake: (() => void) | undefined;
  readonly #progress: OnProgress | undefined;
  #broken: { readonly error: unknown } | undefined;

  constructor(lane: Lane, call: Call, read: Read<T>, progress?: OnProgress) {
    super(lane);
    this.calls.push(call);
    this.#read = read;
    this.#progress = progress;
  }

  encode(): Uint8Array {
    return bounded(1, {
      calls: this.calls,
      namespace: this.lane.namespace,
      atomic: false,
      timeoutMs: timeoutSent(this.lane.timeoutMs),
      token: NO_TOKEN,
    });
  }

  receive(body: Uint8Array, last: boolean): boolean {
    const reply = decodeReply(body);
    for (const outcome of reply.outcomes) {
      if (outcome.call !== 0) throw new InternalError(`the broker answered call ${outcome.call} of a request of 1`);
      if (outcome.error !== undefined) {
        this.fail(thrown(outcome.error));
      } else if (outcome.progress !== undefined) {
        this.#report(outcome.progress);
      } else {
        this.#pages.push(readAnswer(outcome.ok, this.#read));
        this.#answered = true;
      }
    }
    if (reply.error !== undefined) this.fail(thrown(reply.error));
    if (last && !this.#answered && !this.over) throw new InternalError("the broker ended its reply without a page");
    this.over ||= last;
    this.wake?.();
    return this.over;
  }

  /** End the stream with `error`, behind the pages that came before it. */
  fail(error: SnapbrokerError): void {
    if (this.over) return;
    this.#error = error;
    this.over = true;
    this.wake?.();
  }

  /** Hand on how far the call is; a callback that fails gives the call up. */
  #report(progress: Progress): void {
    if (this.#broken !== undefined || !this.#wanted) return;
    try {
      this.#progress?.(progress);
    } catch (error) {
      this.#broken = { error };
      this.giveUp();
    }
  }

  /** The caller wants no more pages. */
  giveUp(): void {
    this.#wanted = false;
  }

  get forsaken(): boolean {
    return !this.#wanted && !this.over;
  }

  /** The next page; undefined where it has not come or there is none, and then the stream's error is thrown. */
  take(): T | undefined {
    if (this.#broken !== undefined) throw this.#broken.error;
    const page = this.#pages.shift();
    if (page === undefined && this.#error !== undefined) throw this.#error;
    return page;
  }
}

// Batches.

/** The outcome of one call of a batch: `result()` answers or throws it. */
export class Answer<T> implements Slot<T> {
  /** Whether the outcome is there. */
  settled = false;
  /** @internal */
  exchange: Exchange | undefined;
  #value: T | undefined;
  #error: unknown;

  /** @internal */
  succeed(value: T): void {
    this.#value = value;
    this.settled = true;
  }

  /** @internal */
  fail(error: unknown): void {
    this.#error = error;
    this.settled = true;
  }

  /** Why the call failed; undefined where it did not, or has no outcome. */
  get error(): SnapbrokerError | undefined {
    return this.#error as SnapbrokerError | undefined;
  }

  /** The answer; throws the call's error, and FailedPrecondition before the batch is sent. */
  result(): T {
    if (this.#error !== undefined) throw this.#error as SnapbrokerError;
    if (!this.settled) throw new FailedPreconditionError("the call has no outcome yet: send() the batch first");
    return this.#value as T;
  }
}

/** The error of the first call of a batch that failed by itself; undefined where none did. */
export function firstError(answers: readonly Answer<unknown>[]): SnapbrokerError | undefined {
  const errors = answers.flatMap((answer) => answer.error ?? []);
  // A call of an atomic batch that was only taken back with the others is `cancelled`: not the reason.
  return errors.find((error) => !(error instanceof CancelledError)) ?? errors[0];
}
