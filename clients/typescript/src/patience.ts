/** When a request is repeated, how often, and for how long (RFC 1, 6.5). */

import { randomBytes } from "node:crypto";

import { InvalidArgumentError, type SnapbrokerError } from "./errors.js";
import { CHANGES } from "./protocol.js";
import type { Exchange } from "./session.js";

/** How long a request is repeated where the caller says nothing: a restart and a recovery take a second or two. */
export const PATIENCE_MS = 10_000;
/** Longest pause before the first repeat; doubled with every further one. */
export const PAUSE_MS = 50;
/** Longest pause of a client's own between two repeats. */
export const PAUSE_MS_MAX = 1_000;
/** Longest pause that a broker's `retry_after_ms` is believed. */
export const RETRY_AFTER_MS_MAX = 5_000;

/** The clock, chance and entropy of a connection: inputs, so that a test can say what they are. */
export interface Sources {
  /** Milliseconds, steadily. */
  readonly clock: () => number;
  /** A number from 0 up to 1. */
  readonly chance: () => number;
  readonly entropy: (count: number) => Uint8Array;
}

const SOURCES: Sources = { clock: () => performance.now(), chance: Math.random, entropy: randomBytes };

/** How long the requests of one connection are repeated, at what pace, and the tokens that they carry. */
export class Patience {
  readonly #prefix: Uint8Array;
  #number = 0n;

  constructor(
    /** Milliseconds; 0 for never. */
    readonly ms: number,
    readonly sources: Sources = SOURCES,
  ) {
    if (typeof ms !== "number" || !(ms >= 0)) {
      throw new InvalidArgumentError(
        `patienceMs must be a number of milliseconds, 0 to repeat nothing, not ${String(ms)}`,
      );
    }
    // Random bytes of the connection and a counter are as unique as random bytes for each request, and cheaper.
    this.#prefix = sources.entropy(16);
  }

  /** Make the request one that can be repeated. */
  equip(exchange: Exchange): void {
    if (this.ms === 0) return;
    exchange.patient = true;
    if (exchange.calls.some((call) => CHANGES.has(call.verb))) {
      const token = Buffer.alloc(this.#prefix.length + 8);
      token.set(this.#prefix);
      token.writeBigUInt64BE(++this.#number, this.#prefix.length);
      exchange.token = token;
    }
  }
}

/** The repeats of one request: since when, how many, and for how long there may be more. */
export class Repeats {
  readonly #patience: Patience;
  readonly #deadline: number;
  readonly #since: number;
  readonly #until: number;
  #count = 0;

  /** `deadline` is the request's own, on the clock of `patience`. */
  constructor(patience: Patience, deadline: number) {
    this.#patience = patience;
    this.#deadline = deadline;
    this.#since = patience.sources.clock();
    this.#until = Math.min(deadline, this.#since + patience.ms);
  }

  /**
   * Milliseconds until the next repeat, a random number of them; undefined where that would be too late.
   *
   * Callers that lost the same broker come back spread over the pause. What the broker asks for comes on top.
   */
  pause(error: SnapbrokerError): number | undefined {
    const longest = Math.min(PAUSE_MS * 2 ** Math.min(this.#count, 16), PAUSE_MS_MAX);
    const pause = retryAfterMs(error) + this.#patience.sources.chance() * longest;
    if (this.#patience.sources.clock() + pause >= this.#until) return undefined;
    this.#count++;
    return pause;
  }

  /** Milliseconds until the request's deadline. */
  get timeLeft(): number {
    return Math.max(0, this.#deadline - this.#patience.sources.clock());
  }

  /** Milliseconds until there is no further repeat. */
  get patienceLeft(): number {
    return Math.max(0, this.#until - this.#patience.sources.clock());
  }

  /** How often and how long, for a message; empty where there was none. */
  told(): string {
    if (this.#count === 0) return "";
    const times = this.#count === 1 ? "once" : `${this.#count} times`;
    const seconds = (this.#patience.sources.clock() - this.#since) / 1000;
    return `; repeated ${times} in ${seconds.toFixed(1)} s`;
  }
}

/** Milliseconds that the broker asks to wait, as far as it is believed. */
export function retryAfterMs(error: SnapbrokerError): number {
  const asked = error.details["retry_after_ms"];
  return typeof asked === "number" && asked > 0 ? Math.min(asked, RETRY_AFTER_MS_MAX) : 0;
}
