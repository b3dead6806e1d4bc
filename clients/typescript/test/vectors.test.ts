/** Every golden vector, decoded and encoded byte for byte. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";

import { parse } from "../conformance/lines.js";
import { InternalError, InvalidArgumentError, UnimplementedError } from "../src/errors.js";
import { encode, reading } from "../src/msgpack.js";
import * as protocol from "../src/protocol.js";
import { vectors } from "./places.js";
import * as wire from "./wire.js";

interface Vector {
  readonly name: string;
  readonly type: string;
  readonly hex: string;
  readonly json?: unknown;
  readonly same_as?: string;
  readonly error?: string;
}

interface Exchange {
  readonly name: string;
  readonly steps: readonly { readonly direction: string; readonly frames: readonly string[] }[];
  readonly dropped?: boolean;
}

interface Vectors {
  readonly messages: readonly Vector[];
  readonly tolerated: readonly Vector[];
  readonly malformed: readonly Vector[];
  readonly refused: readonly Vector[];
  readonly exchanges: readonly Exchange[];
}

const all = parse(readFileSync(vectors, "utf8")) as Vectors;

/** How a type is read from a body, and what is written of what was read. */
interface Codec {
  readonly decode: (body: Uint8Array) => unknown;
  readonly message: (value: never) => unknown;
}

function answer<T>(read: (value: unknown) => T, message: (value: T) => unknown): Codec {
  return { decode: (body) => reading("answer", body, read), message };
}

const CODECS: Readonly<Record<string, Codec>> = {
  Request: { decode: protocol.decodeRequest, message: wire.request },
  Reply: { decode: protocol.decodeReply, message: wire.reply },
  Event: { decode: protocol.decodeEvent, message: wire.event },
  Heartbeat: { decode: protocol.decodeHeartbeat, message: wire.heartbeat },
  MountsAnswer: answer(protocol.readMounts, wire.mounts),
  Empty: answer(protocol.readNothing, () => ({})),
  Info: answer(protocol.readInfo, wire.info),
  Usage: answer(protocol.readUsage, wire.usage),
  WalkPage: answer(protocol.readWalkPage, wire.walkPage),
  EventsPage: answer(protocol.readEventsPage, wire.eventsPage),
  AuditPage: answer(protocol.readAuditPage, wire.auditPage),
  WhyAnswer: answer(protocol.readWhy, wire.why),
  StatusAnswer: answer(protocol.readStatus, wire.status),
};

function codec(type: string): Codec {
  const found = CODECS[type];
  assert(found, `no codec for ${type}`);
  return found;
}

function decoded(vector: Vector): unknown {
  return codec(vector.type).decode(Buffer.from(vector.hex, "hex"));
}

function encoded(type: string, value: unknown): string {
  const message = codec(type).message(value as never);
  const body = type === "Request" ? protocol.encodeRequest(value as protocol.Request) : encode(message);
  return Buffer.from(body).toString("hex");
}

/** The JSON view: bytes in base64, every integer a bigint. */
function view(value: unknown): unknown {
  if (value instanceof Uint8Array) return Buffer.from(value).toString("base64");
  if (typeof value === "number" && Number.isInteger(value)) return BigInt(value);
  if (Array.isArray(value)) return value.map(view);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, member]) => [key, view(member)]));
}

describe("messages", () => {
  for (const vector of all.messages) {
    test(vector.name, () => {
      const value = decoded(vector);
      assert.deepEqual(view(codec(vector.type).message(value as never)), view(vector.json));
      assert.equal(encoded(vector.type, value), vector.hex);
    });
  }
});

describe("tolerated", () => {
  for (const vector of all.tolerated) {
    test(vector.name, () => {
      const same = all.messages.find(({ name }) => name === vector.same_as);
      assert(same, `no vector ${vector.same_as ?? ""}`);
      const value = decoded(vector);
      assert.deepEqual(value, decoded(same));
      assert.equal(encoded(vector.type, value), same.hex);
    });
  }
});

describe("malformed", () => {
  const classes = {
    invalid_argument: InvalidArgumentError,
    unimplemented: UnimplementedError,
    internal: InternalError,
  } as const;
  for (const vector of all.malformed) {
    test(vector.name, () => {
      const expected = classes[vector.error as keyof typeof classes];
      assert.throws(() => decoded(vector), expected);
    });
  }
});

describe("refused", () => {
  for (const vector of all.refused) {
    test(vector.name, () => {
      const value = decoded(vector);
      assert.deepEqual(view(wire.request(value as never)), view(vector.json));
      assert.equal(encoded("Request", value), vector.hex);
    });
  }
});

describe("exchanges", () => {
  for (const exchange of all.exchanges) {
    test(exchange.name, () => {
      for (const step of exchange.steps) checkStep(step.direction, step.frames, exchange.dropped === true);
    });
  }
});

function checkStep(direction: string, frames: readonly string[], dropped: boolean): void {
  const [first, second, third, body] = frames;
  const version = protocol.REQUEST_VERSION.toString("hex");
  if (direction === "subscriber-to-broker") {
    assert.equal(frames.length, 1);
    assert.match(first ?? "", /^01/);
  } else if (direction === "broker-to-subscriber") {
    const isHeartbeat = Buffer.from(first ?? "", "hex")
      .toString()
      .endsWith("//heartbeat");
    assert.equal(second, protocol.EVENT_VERSION.toString("hex"));
    const type = isHeartbeat ? "Heartbeat" : "Event";
    const value = codec(type).decode(Buffer.from(body ?? "", "hex")) as protocol.Heartbeat;
    assert.equal(value.sequence, Buffer.from(third ?? "", "hex").readBigUInt64BE());
    assert.equal(encoded(type, value), body);
  } else if (!dropped && first === version) {
    const type = direction === "client-to-broker" ? "Request" : "Reply";
    if (type === "Reply") assert.match(third ?? "", /^0[01]$/);
    assert.equal(frames.length, 4);
    assert.equal(encoded(type, codec(type).decode(Buffer.from(body ?? "", "hex"))), body);
  }
}
