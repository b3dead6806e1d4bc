/**
 * One connection to a broker: a DEALER on the event loop, and the requests under way on it.
 *
 * Calls made in one turn of the event loop travel together. A call only joins the exchange that is being gathered for its
 * lane (snapshotter, namespace and timeout); the exchange is sent when the turn is over. A call costs a promise and a share
 * of a message: no timer of its own.
 *
 * The socket's monitor is read by a promise as well, so a break may be told after a request was sent behind it. Such a
 * request is lost with the others and repeated like them: its token keeps it from taking effect twice. After a break
 * nothing is sent until the monitor has seen the next handshake.
 *
 * ZeroMQ's descriptor is edge-triggered, and asking a socket for its state takes the edge away from the `receive` that waits
 * for it. So nothing here asks: `send` is tried, and `receive` is always waited for.
 */

import type { Dealer, Observer, Subscriber } from "zeromq";

import { turn } from "./bell.js";
import type { Status } from "./contract.js";
import { reachableEventsEndpoint } from "./endpoints.js";
import {
  DeadlineExceededError,
  FailedPreconditionError,
  InternalError,
  InvalidArgumentError,
  SnapbrokerError,
  UnavailableError,
} from "./errors.js";
import { refusalOf, type Refusal } from "./handshakes.js";
import type { Keys } from "./keys.js";
import { reason } from "./msgpack.js";
import type { Patience } from "./patience.js";
import { CALLS_MAX, readStatus, REQUEST_VERSION, type Call } from "./protocol.js";
import {
  encodeCancel,
  Exchange,
  Lane,
  READS,
  READS_PER_REQUEST,
  type OnProgress,
  type Pursuit,
  type Read,
  type Slot,
} from "./session.js";
import { connectAnew, connectTo, dealer, RECONNECT_MS, RECONNECT_MS_MAX, subscriber } from "./sockets.js";

/** Longest time a timer can be set to: 24 days, which is without end for a call. */
const TIMER_MS_MAX = 2 ** 31 - 1;
const ID_BYTES = 8;

/** What the connection has done, and what it waits for. */
export interface ConnectionStatistics {
  /** Requests sent, repeats not counted. */
  readonly requests: number;
  /** Calls that travelled in them. */
  readonly calls: number;
  /** Requests that wait for their answer. */
  readonly underWay: number;
  /** Requests among them that wait for a connection. */
  readonly unsent: number;
  /** Replies that were late, or none at all. */
  readonly stray: number;
  /** How often a request was repeated. */
  readonly repeated: number;
}

/** What a caller may say of one call. */
export interface CallFacts {
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: OnProgress | undefined;
}

/** What a connection is made of. */
export interface ConnectionFacts {
  readonly endpoint: string;
  readonly eventsEndpoint: string | undefined;
  readonly keys: Keys | undefined;
  readonly timeoutMs: number;
  readonly connectTimeoutMs: number;
  readonly patience: Patience;
  readonly callsPerRequest: number;
}

/** The caller of one call: its promise, and its signal. */
class Caller<T> implements Slot<T> {
  settled = false;
  exchange: Exchange | undefined;
  #unhook: (() => void) | undefined;

  constructor(
    readonly resolve: (value: T) => void,
    readonly reject: (error: unknown) => void,
  ) {}

  /** Give up when `signal` says so; `takeBack` tells the broker. */
  heed(signal: AbortSignal, takeBack: (caller: this) => void): void {
    const onAbort = () => {
      if (this.settled) return;
      this.fail(signal.reason);
      this.exchange?.abandon();
      takeBack(this);
    };
    signal.addEventListener("abort", onAbort, { once: true });
    this.#unhook = () => {
      signal.removeEventListener("abort", onAbort);
    };
  }

  succeed(value: T): void {
    this.settled = true;
    this.#unhook?.();
    this.resolve(value);
  }

  fail(error: unknown): void {
    this.settled = true;
    this.#unhook?.();
    this.reject(error);
  }
}

export class Connection {
  readonly endpoint: string;
  readonly timeoutMs: number;
  readonly patience: Patience;
  closed = false;
  readonly #facts: ConnectionFacts;
  #eventsEndpoint: string | undefined;
  readonly #readsPerRequest: number;
  readonly #dealer: Dealer;
  readonly #monitoring: Promise<void>;
  #gathering = new Map<string, Exchange>();
  readonly #underWay = new Map<number, Pursuit>();
  readonly #unsent = new Set<Pursuit>();
  readonly #subscriptions = new Set<Subscriber>();
  #connected = false;
  #refusal: Refusal | undefined;
  #reconnecting: NodeJS.Timeout | undefined;
  #reconnectMs = RECONNECT_MS;
  #number = 0;
  #received = 0;
  #requests = 0;
  #calls = 0;
  #stray = 0;
  #repeated = 0;

  constructor(facts: ConnectionFacts) {
    const { callsPerRequest } = facts;
    if (!Number.isInteger(callsPerRequest) || callsPerRequest < 1 || callsPerRequest > CALLS_MAX) {
      throw new InvalidArgumentError(`callsPerRequest must be 1 to ${CALLS_MAX}, not ${callsPerRequest}`);
    }
    this.#facts = facts;
    this.endpoint = facts.endpoint;
    this.timeoutMs = facts.timeoutMs;
    this.patience = facts.patience;
    this.#eventsEndpoint = facts.eventsEndpoint;
    this.#readsPerRequest = Math.min(READS_PER_REQUEST, callsPerRequest);
    this.#dealer = dealer(facts.endpoint, facts.keys);
    this.#monitoring = this.#watch(this.#dealer.events);
    connectTo(this.#dealer, facts.endpoint);
    void this.#listen();
  }

  // Calls into requests.

  /** One call, together with whatever else is called in this turn. What `build` throws is the call's error. */
  call<T>(lane: Lane, build: () => Call, read: Read<T>, facts: CallFacts = {}): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      const { signal, onProgress } = facts;
      signal?.throwIfAborted();
      const call = build();
      const caller = new Caller(resolve, reject);
      const exchange = this.#gathering.get(lane.key) ?? this.#gather(lane);
      const most = READS.has(call.verb) ? this.#readsPerRequest : this.#facts.callsPerRequest;
      if (signal !== undefined) caller.heed(signal, this.#takeBackCall);
      if (exchange.add(call, read, caller, onProgress) >= most) {
        this.#gathering.delete(lane.key);
        this.launch(exchange);
      }
    });
  }

  #gather(lane: Lane): Exchange {
    this.checkOpen();
    if (this.#gathering.size === 0) setImmediate(this.flush);
    const exchange = new Exchange(lane);
    this.#gathering.set(lane.key, exchange);
    return exchange;
  }

  /** Send what was gathered. */
  flush = (): void => {
    if (this.#gathering.size === 0) return;
    const gathering = this.#gathering;
    this.#gathering = new Map();
    for (const exchange of gathering.values()) this.launch(exchange);
  };

  /** Begin a request. */
  launch(pursuit: Pursuit): void {
    if (pursuit instanceof Exchange) {
      pursuit.withoutAbandoned();
      if (pursuit.calls.length === 0) return;
      this.patience.equip(pursuit);
    }
    let body: Uint8Array;
    try {
      body = pursuit.encode();
    } catch (error) {
      this.#launchApart(pursuit, error as SnapbrokerError);
      return;
    }
    pursuit.deadline = this.#now() + pursuit.lane.timeoutMs;
    this.#requests++;
    this.#calls += pursuit.calls.length;
    this.#dispatch(pursuit, body);
  }

  /** One call that cannot be sent must not fail those it travels with: halve until it is alone. */
  #launchApart(pursuit: Pursuit, error: SnapbrokerError): void {
    const halves = pursuit instanceof Exchange ? pursuit.halves() : [];
    for (const half of halves) this.launch(half);
    if (halves.length === 0) this.#end(pursuit, error);
  }

  /** Send a request, or keep it until there is a connection. */
  #dispatch(pursuit: Pursuit, body: Uint8Array): void {
    pursuit.requestNumber = ++this.#number;
    pursuit.requestId = requestId(pursuit.requestNumber);
    this.#underWay.set(pursuit.requestNumber, pursuit);
    if (this.#refusal?.atOnce) {
      this.#end(pursuit, this.#refusal.error);
      return;
    }
    const left = pursuit.deadline - this.#now();
    if (this.#unsent.size === 0 && this.#send(pursuit, body)) {
      this.#arm(pursuit, left);
      return;
    }
    this.#unsent.add(pursuit);
    this.#arm(pursuit, this.#connected ? left : Math.min(left, this.#timeToConnect(pursuit)));
  }

  #timeToConnect(pursuit: Pursuit): number {
    return Math.min(this.#facts.connectTimeoutMs, pursuit.repeats?.patienceLeft ?? Infinity);
  }

  #send(pursuit: Pursuit, body: Uint8Array): boolean {
    if (!this.#connected) return false;
    const number = pursuit.requestNumber;
    pursuit.sent = true;
    this.#dealer.send([REQUEST_VERSION, pursuit.requestId, pursuit.lane.target, body]).then(undefined, () => {
      this.#comeBack(pursuit, number);
    });
    if (pursuit.repeats !== undefined && pursuit instanceof Exchange) {
      const { givenUp } = pursuit;
      if (givenUp.length > 0) this.#takeBack(pursuit, givenUp);
    }
    return true;
  }

  /** The socket did not take a request: its queue is full, or the connection went in this moment. */
  #comeBack(pursuit: Pursuit, number: number): void {
    if (this.closed || this.#underWay.get(number) !== pursuit || !pursuit.sent) return;
    pursuit.sent = false;
    this.#unsent.add(pursuit);
  }

  #sendUnsent(): void {
    for (const pursuit of this.#unsent) {
      if (!this.#send(pursuit, pursuit.encode())) return;
      this.#unsent.delete(pursuit);
      this.#arm(pursuit, pursuit.deadline - this.#now());
    }
  }

  // Replies into outcomes.

  /** Take every message, as long as the connection is open. */
  async #listen(): Promise<void> {
    try {
      for (;;) {
        this.#take(await this.#dealer.receive());
        if (this.#unsent.size > 0) this.#sendUnsent();
      }
    } catch (error) {
      // Closing ends the receive that waits; after anything else nothing would be heard any more.
      this.#close(new InternalError(`the connection failed: ${reason(error)}`));
    }
  }

  #take(frames: readonly Buffer[]): void {
    this.#received++;
    const [version, id, more, body] = frames;
    const isReply =
      frames.length === 4 &&
      version &&
      REQUEST_VERSION.equals(version) &&
      id?.length === ID_BYTES &&
      more?.length === 1;
    const pursuit = isReply ? this.#underWay.get(requestNumber(id)) : undefined;
    if (pursuit === undefined || body === undefined || more === undefined || (more[0] ?? 2) > 1) {
      this.#stray++;
      return;
    }
    let finished: boolean;
    try {
      finished = pursuit.receive(body, more[0] === 1);
    } catch (error) {
      if (!(error instanceof InternalError)) throw error;
      pursuit.doubt = true;
      pursuit.fail(error);
      finished = true;
    }
    if (!finished) this.takeBackIfForsaken(pursuit);
    else if (pursuit.failure !== undefined) this.#repeatLater(pursuit, pursuit.failure);
    else this.#forget(pursuit);
  }

  // The monitor.

  /** Learn when the connection is made and when it breaks, until the socket is closed. */
  async #watch(observer: Observer): Promise<void> {
    for (;;) {
      const event = await observer.receive().catch(() => undefined);
      switch (event?.type) {
        case undefined:
        case "end":
          return;
        case "handshake":
          this.#connected = true;
          this.#refusal = undefined;
          this.#reconnectMs = RECONNECT_MS;
          this.#sendUnsent();
          break;
        case "disconnect":
          if (this.#connected) void this.#lose();
          break;
        case "close":
          // Nobody took the connection: a refusal of before says nothing about whoever is there next.
          this.#refusal = undefined;
          break;
        case "handshake:error:auth":
        case "handshake:error:protocol":
        case "handshake:error:other":
          this.#refused(event.type, event.error);
          break;
        default:
      }
    }
  }

  /** The connection broke: replies under way on it will never come. */
  async #lose(): Promise<void> {
    this.#connected = false;
    const lost = [...this.#underWay].filter(([, pursuit]) => pursuit.sent);
    await this.#drained();
    const error = new UnavailableError(
      `the connection to the broker at ${this.endpoint} broke with the call under way`,
    );
    for (const [number, pursuit] of lost) {
      if (this.#underWay.get(number) !== pursuit || !pursuit.sent) continue;
      pursuit.doubt = true;
      this.#repeatLater(pursuit, error);
    }
  }

  /** Replies that came before the break are taken first: whole turns of the event loop pass without one. */
  async #drained(): Promise<void> {
    let before: number;
    do {
      before = this.#received;
      await turn();
      await turn();
    } while (this.#received !== before);
  }

  /** A handshake failed. Where it is the other side's word, ZeroMQ does not try again by itself. */
  #refused(type: string, error: object): void {
    if (type !== "handshake:error:other") this.#connectLater();
    const code = "code" in error ? String(error.code) : "";
    const status = "status" in error ? Number(error.status) : 0;
    this.#refusal = refusalOf({ type, code, status }, this.endpoint, this.#facts.keys !== undefined) ?? this.#refusal;
    if (!this.#refusal?.atOnce) return;
    for (const pursuit of [...this.#unsent]) this.#end(pursuit, this.#refusal.error);
  }

  #connectLater(): void {
    clearTimeout(this.#reconnecting);
    this.#reconnecting = setTimeout(() => {
      connectAnew(this.#dealer, this.endpoint);
    }, this.#reconnectMs);
    this.#reconnectMs = Math.min(2 * this.#reconnectMs, RECONNECT_MS_MAX);
  }

  // Repeats.

  /** Send a request once more after a pause; `error` ends it where it was repeated for long enough. */
  #repeatLater(pursuit: Pursuit, error: SnapbrokerError): void {
    if (pursuit.forsaken) {
      this.#forget(pursuit);
      return;
    }
    const pause = pursuit instanceof Exchange ? pursuit.pause(this.patience, error) : undefined;
    if (pause === undefined) {
      this.#end(pursuit, error);
      return;
    }
    clearTimeout(pursuit.timer);
    pursuit.timer = setTimeout(() => {
      this.#underWay.delete(pursuit.requestNumber);
      this.#repeated++;
      this.#dispatch(pursuit, pursuit.encode());
    }, pause);
  }

  // Ends.

  #arm(pursuit: Pursuit, within: number): void {
    clearTimeout(pursuit.timer);
    if (within > TIMER_MS_MAX) return;
    pursuit.timer = setTimeout(
      () => {
        this.#expire(pursuit, within);
      },
      Math.max(0, within),
    );
  }

  #expire(pursuit: Pursuit, within: number): void {
    if (pursuit.sent) {
      pursuit.doubt = true;
      this.#takeBack(pursuit);
      const who =
        pursuit.lane.target.length > 0 ? `'${Buffer.from(pursuit.lane.target).toString()}'` : "the broker itself";
      const late = `no answer from ${who} at ${this.endpoint} within ${seconds(pursuit.lane.timeoutMs)}`;
      this.#end(pursuit, new DeadlineExceededError(late));
      return;
    }
    if (this.#refusal !== undefined) {
      this.#end(pursuit, this.#refusal.error);
      return;
    }
    const absent =
      `no broker answers at ${this.endpoint} (waited ${seconds(within)}): start snapbrokerd, ` +
      "or name the right endpoint by argument or SNAPBROKER_ENDPOINT";
    const error = new UnavailableError(absent);
    if (pursuit.repeats === undefined) {
      this.#end(pursuit, error);
    } else {
      this.#unsent.delete(pursuit);
      this.#repeatLater(pursuit, error);
    }
  }

  /** Send the Cancel of a request that nobody waits for any more. */
  takeBackIfForsaken(pursuit: Pursuit): void {
    if (pursuit.forsaken && this.#underWay.get(pursuit.requestNumber) === pursuit) {
      this.#takeBack(pursuit);
      this.#forget(pursuit);
    }
  }

  /** One caller gave up: its call is taken back alone while others wait for theirs. */
  readonly #takeBackCall = (slot: Slot<never>): void => {
    const { exchange } = slot;
    if (exchange === undefined) return;
    if (exchange.forsaken) {
      this.takeBackIfForsaken(exchange);
    } else if (this.#underWay.get(exchange.requestNumber) === exchange) {
      const number = exchange.number(slot);
      if (number !== undefined) this.#takeBack(exchange, [number]);
    }
  };

  #takeBack(pursuit: Pursuit, calls: readonly number[] = []): void {
    if (!pursuit.sent) return;
    const body = encodeCancel(pursuit.requestId, pursuit.lane.namespace, calls);
    // Without a connection there is nobody to tell: the broker has lost the request with it.
    this.#dealer
      .send([REQUEST_VERSION, requestId(++this.#number), pursuit.lane.target, body])
      .then(undefined, () => undefined);
  }

  #end(pursuit: Pursuit, error: SnapbrokerError): void {
    this.#forget(pursuit);
    pursuit.fail(error);
  }

  #forget(pursuit: Pursuit): void {
    this.#underWay.delete(pursuit.requestNumber);
    this.#unsent.delete(pursuit);
    clearTimeout(pursuit.timer);
    pursuit.onEnd?.();
  }

  /** FailedPrecondition on a connection that was closed. */
  checkOpen(): void {
    if (this.closed) throw new FailedPreconditionError(`the connection to ${this.endpoint} is closed: connect again`);
  }

  /** Take back what is under way, and close the sockets. */
  async close(): Promise<void> {
    this.#close(new UnavailableError(`the connection to ${this.endpoint} was closed with the call under way`));
    await this.#monitoring;
  }

  #close(error: SnapbrokerError): void {
    if (this.closed) return;
    const pursuits = [...this.#underWay.values(), ...this.#gathering.values()];
    this.#gathering.clear();
    for (const pursuit of pursuits) {
      pursuit.doubt ||= pursuit.sent;
      this.#takeBack(pursuit);
      this.#end(pursuit, error);
    }
    this.closed = true;
    clearTimeout(this.#reconnecting);
    for (const socket of this.#subscriptions) socket.close();
    this.#subscriptions.clear();
    this.#dealer.close();
  }

  /** Send a request of one caller, and wait for all its outcomes. */
  run(exchange: Exchange, signal?: AbortSignal): Promise<void> {
    return new Promise<void>((resolve, reject) => {
      signal?.throwIfAborted();
      this.checkOpen();
      const onAbort = () => {
        exchange.abandonAll();
        reject(signal?.reason as Error);
        this.takeBackIfForsaken(exchange);
      };
      exchange.onEnd = () => {
        signal?.removeEventListener("abort", onAbort);
        resolve();
      };
      signal?.addEventListener("abort", onAbort, { once: true });
      // What was called before in this turn goes first.
      this.flush();
      this.launch(exchange);
    });
  }

  /** How the broker is. */
  status(timeoutMs: number, facts: CallFacts = {}): Promise<Status> {
    return this.call(new Lane(NOBODY, "", timeoutMs), () => ({ verb: "status" }), readStatus, facts);
  }

  /** A socket of the publisher; the broker is asked where it is, if neither argument nor environment tells. */
  async subscribe(prefixes: readonly string[]): Promise<Subscriber> {
    this.#eventsEndpoint ??= reachableEventsEndpoint(await this.status(this.timeoutMs), this.endpoint);
    this.checkOpen();
    const keys = this.#eventsEndpoint.startsWith("ipc://") ? undefined : this.#facts.keys;
    const socket = subscriber(this.#eventsEndpoint, keys, prefixes);
    this.#subscriptions.add(socket);
    return socket;
  }

  /** Connect a socket of the publisher anew: what it heard of before is too long ago (RFC 2, 7.2). */
  resubscribe(socket: Subscriber): void {
    if (this.#subscriptions.has(socket) && this.#eventsEndpoint !== undefined)
      connectAnew(socket, this.#eventsEndpoint);
  }

  /** Close a socket of the publisher. */
  unsubscribe(socket: Subscriber): void {
    if (this.#subscriptions.delete(socket)) socket.close();
  }

  /** The counters and queues. */
  statistics(): ConnectionStatistics {
    return {
      requests: this.#requests,
      calls: this.#calls,
      underWay: this.#underWay.size,
      unsent: this.#unsent.size,
      stray: this.#stray,
      repeated: this.#repeated,
    };
  }

  #now(): number {
    return this.patience.sources.clock();
  }
}

const NOBODY = new Uint8Array();

function requestId(number: number): Buffer {
  const id = Buffer.alloc(ID_BYTES);
  id.writeUIntBE(number, 2, 6);
  return id;
}

function requestNumber(id: Buffer): number {
  return id.readUInt16BE() === 0 ? id.readUIntBE(2, 6) : -1;
}

function seconds(ms: number): string {
  return `${Number((ms / 1000).toPrecision(6))} s`;
}
