/** A broker that a test plays: what arrives is kept, what is answered is up to the test. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { Router, XPublisher, type SocketOptions } from "zeromq";

import { SEQUENCE_MAX } from "../src/contract.js";
import { encode, integer } from "../src/msgpack.js";
import { decodeRequest, EVENT_VERSION, REQUEST_VERSION, type Fault, type Request } from "../src/protocol.js";
import * as wire from "./wire.js";

/** A request that arrived, and the way back. */
export class Received {
  readonly request: Request;
  readonly #router: Router;
  readonly #peer: Buffer;
  readonly id: Buffer;
  readonly target: string;

  constructor(router: Router, frames: readonly Buffer[]) {
    const [peer, , id, target, body] = frames;
    if (!peer || !id || !target || !body) throw new Error("not a request");
    this.#router = router;
    this.#peer = peer;
    this.id = id;
    this.target = target.toString();
    this.request = decodeRequest(body);
  }

  get verbs(): string[] {
    return this.request.calls.map((call) => call.verb);
  }

  /** The key, or name, of each call. */
  get keys(): string[] {
    return this.request.calls.map((call) => ("key" in call ? call.key : ""));
  }

  async send(body: Uint8Array, last: boolean): Promise<void> {
    await this.#router.send([this.#peer, REQUEST_VERSION, this.id, Buffer.from([last ? 1 : 0]), body]);
  }

  part(last: boolean, ...outcomes: Parameters<typeof wire.outcome>[0][]): Promise<void> {
    return this.send(encode({ outcomes: outcomes.map(wire.outcome) }), last);
  }

  /** Every call succeeds with `ok`. */
  succeed(ok: unknown): Promise<void> {
    return this.part(true, ...this.request.calls.map((_, call) => ({ call, ok })));
  }

  /** Every call fails. */
  fail(code: string, details: Fault["details"] = {}): Promise<void> {
    const error = { code, message: `the broker says ${code}`, details };
    return this.part(true, ...this.request.calls.map((_, call) => ({ call, error })));
  }

  /** The request is refused as a whole. */
  refuse(code: string, message = "refused", details: Fault["details"] = {}): Promise<void> {
    return this.send(encode({ error: wire.fault({ code, message, details }) }), true);
  }
}

type Answer = (received: Received) => unknown;

/** A ROUTER at an address that stays the same over restarts. */
export class FakeBroker {
  readonly directory = mkdtempSync(join(tmpdir(), "snb-ts-"));
  readonly received: Received[] = [];
  readonly cancels: Received[] = [];
  /** What is done with a request; Cancels are kept apart and answered with success. */
  answer: Answer;
  endpoint: string;
  publisher: XPublisher | undefined;
  #router: Router | undefined;
  readonly #options: SocketOptions<Router>;
  #changed: (() => void)[] = [];

  constructor(answer: Answer = (received) => received.succeed({}), options: SocketOptions<Router> = {}, endpoint = "") {
    this.answer = answer;
    this.#options = options;
    this.endpoint = endpoint || `ipc://${this.directory}/router.sock`;
  }

  async start(): Promise<this> {
    const router = new Router({ linger: 0, ...this.#options });
    await router.bind(this.endpoint);
    this.endpoint = router.lastEndpoint ?? this.endpoint;
    this.#router = router;
    void this.#serve(router);
    return this;
  }

  /** Publish beside the router's socket, with no more than `queue` messages waiting for a subscriber. */
  async publish(queue = 1000): Promise<XPublisher> {
    this.publisher = new XPublisher({ linger: 0, sendHighWaterMark: queue });
    await this.publisher.bind(`ipc://${this.directory}/events.sock`);
    return this.publisher;
  }

  /** Vanish, with every connection. */
  stop(): void {
    this.#router?.close();
    this.#router = undefined;
  }

  /** Vanish and clean up. */
  [Symbol.dispose](): void {
    this.stop();
    this.publisher?.close();
    rmSync(this.directory, { recursive: true, force: true });
  }

  /** Wait until `condition` holds; it is looked at whenever something has arrived. */
  async until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      await new Promise<void>((resolve) => {
        this.#changed.push(resolve);
      });
    }
  }

  async #serve(router: Router): Promise<void> {
    try {
      for (;;) {
        const received = new Received(router, await router.receive());
        if (received.verbs[0] === "cancel") {
          this.cancels.push(received);
          await received.succeed({});
        } else {
          this.received.push(received);
          await this.answer(received);
        }
        const changed = this.#changed;
        this.#changed = [];
        for (const tell of changed) tell();
      }
    } catch (error) {
      if (!router.closed) throw error;
    }
  }
}

/** The frames of a published event of the snapshotter `fake` in the namespace `default`. */
export function eventFrames(sequence: bigint, previous: bigint, verb = "prepare", key = `k${sequence}`): Buffer[] {
  const namespace = "default";
  const topic = `fake/${namespace}/snapshot/${verb}`;
  const event = { sequence, previous, time: 1n, snapshotter: "fake", namespace, verb, key, info: undefined, topic };
  return [Buffer.from(topic), EVENT_VERSION, sequenceFrame(sequence), Buffer.from(encode(wire.event(event)))];
}

/** The frames of a heartbeat of the snapshotter `fake`. */
export function beatFrames(
  sequence: bigint,
  previous: bigint,
  topics?: Readonly<Record<string, bigint>>,
  time = 0n,
): Buffer[] {
  const changed = topics && new Map(Object.entries(topics));
  const body = encode(wire.heartbeat({ sequence, previous, time, topics: changed }));
  return [Buffer.from("fake//heartbeat"), EVENT_VERSION, sequenceFrame(sequence), Buffer.from(body)];
}

function sequenceFrame(sequence: bigint): Buffer {
  if (sequence > SEQUENCE_MAX) throw new Error("no sequence");
  const frame = Buffer.alloc(8);
  frame.writeBigUInt64BE(BigInt(integer(sequence)));
  return frame;
}
