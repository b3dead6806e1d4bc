/** The pace of repeats, and what the codec and the arguments do at their edges. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { parse } from "../conformance/lines.js";
import { fenceNumber, labelMap } from "../src/arguments.js";
import { errorOf, InternalError, InvalidArgumentError, UnavailableError } from "../src/errors.js";
import { toJson } from "../src/json.js";
import { encode, integer } from "../src/msgpack.js";
import { Patience, Repeats } from "../src/patience.js";
import { audit, creation, decodeReply, readAuditPage, readInfo } from "../src/protocol.js";
import { Answer, Exchange, Lane, Stream } from "../src/session.js";
import * as wire from "./wire.js";

const LANE = new Lane(Buffer.from("fake"), "default", 60_000);

function clockwork(ms: number): { patience: Patience; now: { ms: number } } {
  const now = { ms: 0 };
  const sources = { clock: () => now.ms, chance: () => 0.5, entropy: (count: number) => Buffer.alloc(count, 7) };
  return { patience: new Patience(ms, sources), now };
}

describe("a stream", () => {
  const part = (of: Parameters<typeof wire.outcome>[0]) => {
    return Buffer.from(
      encode(
        wire.reply({ outcomes: [{ ok: undefined, error: undefined, progress: undefined, ...of }], error: undefined }),
      ),
    );
  };

  test("hands on its progress, which is no page", () => {
    const heard: bigint[] = [];
    const stream = new Stream(LANE, audit("", 1000, 8), readAuditPage, ({ entries }) => heard.push(entries));
    assert(!stream.receive(part({ call: 0, progress: { entries: 5n, bytes: 0n } }), false));
    assert.equal(stream.take(), undefined);
    assert(stream.receive(part({ call: 0, ok: { looked: 7 } }), true));
    assert.deepEqual([heard, stream.take()], [[5n], { findings: [], next: "", looked: 7 }]);
  });

  test("is given up where its progress fails", () => {
    const stream = new Stream(LANE, audit("", 1000, 8), readAuditPage, () => {
      throw new RangeError("enough");
    });
    stream.receive(part({ call: 0, progress: { entries: 5n, bytes: 0n } }), false);
    assert(stream.forsaken);
    assert.throws(() => stream.take(), RangeError);
  });
});

describe("repeats", () => {
  test("come after pauses that double up to a second, until patience is over", () => {
    const { patience, now } = clockwork(10_000);
    const repeats = new Repeats(patience, Infinity);
    const away = new UnavailableError("away");
    const pauses: number[] = [];
    for (let pause = repeats.pause(away); pause !== undefined; pause = repeats.pause(away)) {
      pauses.push(pause);
      now.ms += pause + 1000;
    }
    assert.deepEqual(pauses, [25, 50, 100, 200, 400, 500, 500, 500]);
    assert.equal(repeats.told(), "; repeated 8 times in 10.3 s");
    assert.equal(repeats.patienceLeft, 0);
  });

  test("come as late as the broker asks, within reason, and not behind the deadline", () => {
    const { patience } = clockwork(10_000);
    const asking = (ms: number) => new UnavailableError("later", { details: { retry_after_ms: ms } });
    assert.equal(new Repeats(patience, Infinity).pause(asking(300)), 325);
    assert.equal(new Repeats(patience, Infinity).pause(asking(900_000)), 5025);
    assert.equal(new Repeats(patience, 20).pause(asking(0)), undefined);
  });

  test("have tokens of the connection's random bytes and a number, for changes alone", () => {
    const { patience } = clockwork(1);
    const [change, read] = [new Exchange(LANE), new Exchange(LANE)];
    change.add(creation("prepare", "a", "", {}), (ok) => ok, new Answer());
    read.add({ verb: "stat", key: "a" }, (ok) => ok, new Answer());
    patience.equip(read);
    patience.equip(change);
    assert.equal(read.token.length, 0);
    assert.equal(Buffer.from(change.token).toString("hex"), `${"07".repeat(16)}0000000000000001`);
    const { patience: none } = clockwork(0);
    const single = new Exchange(LANE);
    single.add(creation("prepare", "a", "", {}), (ok) => ok, new Answer());
    none.equip(single);
    assert.equal(single.token.length + Number(single.patient), 0);
  });
});

describe("a reply", () => {
  test("that ends without an outcome for every call is refused", () => {
    const exchange = new Exchange(LANE);
    for (const key of ["a", "b"]) exchange.add({ verb: "stat", key }, readInfo, new Answer());
    const body = encode({ outcomes: [{ call: 0, ok: { name: "a", kind: "view" } }] });
    assert(!exchange.receive(body, false));
    assert.throws(() => exchange.receive(encode({}), true), InternalError);
  });

  test("may bring an outcome again: the first one counts", () => {
    const exchange = new Exchange(LANE);
    const answer = new Answer<unknown>();
    exchange.add({ verb: "stat", key: "a" }, readInfo, answer);
    exchange.add({ verb: "stat", key: "b" }, readInfo, new Answer());
    exchange.receive(encode({ outcomes: [{ call: 0, ok: { name: "a", kind: "view" } }] }), false);
    exchange.receive(encode({ outcomes: [{ call: 0, error: { code: "internal", message: "" } }] }), false);
    assert.equal(answer.error, undefined);
    assert.equal(exchange.unsettled, 1);
  });
});

describe("bodies", () => {
  const cases: readonly (readonly [bigint, string])[] = [
    [0n, "00"],
    [127n, "7f"],
    [128n, "cc80"],
    [65_535n, "cdffff"],
    [4_294_967_295n, "ceffffff" + "ff"],
    [4_294_967_296n, "cf0000000100000000"],
    [2n ** 53n + 1n, "cf0020000000000001"],
    [2n ** 63n - 1n, "cf7fffffffffffffff"],
    [-1n, "ff"],
    [-33n, "d0df"],
    [-2_147_483_648n, "d280000000"],
    [-2_147_483_649n, "d3ffffffff7fffffff"],
  ];
  for (const [value, hex] of cases) {
    test(`have ${value} in its shortest form`, () => {
      assert.equal(Buffer.from(encode(integer(value))).toString("hex"), hex);
    });
  }

  test("keep every label, whatever it is called", () => {
    const labels = labelMap(JSON.parse('{"__proto__": "a", "constructor": "b", "1": "c", "é": "d"}'));
    const body = encode({ outcomes: [{ call: 0, ok: { name: "n", kind: "view", labels } }] });
    const read = readInfo(decodeReply(body).outcomes[0]?.ok).labels;
    assert.deepEqual(Object.entries(read), Object.entries(labels));
    assert.equal(Object.getPrototypeOf(read), Object.prototype);
    assert.deepEqual(Object.keys(creation("prepare", "k", "", labels)), ["verb", "key", "labels"]);
  });

  test("with text that is not UTF-8 are refused, wherever it is", () => {
    for (const text of ["a2c328", "a2c080", "a3eda080", `d920${"61".repeat(31)}ff`, `da0100${"61".repeat(255)}80`]) {
      const body = `81a56572726f7282a4636f6465a178a76d657373616765${text}`;
      assert.throws(() => decodeReply(Buffer.from(body, "hex")), InternalError, text);
    }
    const odd = "83a56c61746572d5050102a16ec40180a16dcb4000000000000000";
    assert.equal(decodeReply(Buffer.from(odd, "hex")).outcomes.length, 0);
  });
});

test("fences are sequences", () => {
  assert.equal(fenceNumber(undefined), 0);
  assert.equal(fenceNumber(5n), 5);
  assert.equal(fenceNumber(2n ** 40n), 2n ** 40n);
  for (const wrong of [-1, 0.5, 2n ** 63n, "1", null, Number.NaN]) {
    assert.throws(() => fenceNumber(wrong), InvalidArgumentError);
  }
});

test("a code that is not known is internal", () => {
  assert(errorOf("on_fire", "what?") instanceof InternalError);
  assert(errorOf("constructor", "what?") instanceof InternalError);
});

test("JSON has integers as they are", () => {
  const value = { a: 2n ** 63n - 1n, b: [1, "x\n", null, true], c: undefined, d: { e: 1.5 } };
  const text = '{"a":9223372036854775807,"b":[1,"x\\n",null,true],"c":null,"d":{"e":1.5}}';
  assert.equal(toJson(value), text);
  assert.deepEqual(parse(text), { ...value, c: null });
  assert.deepEqual(parse('{"a":"1234567890123456789","b":-9223372036854775808}'), {
    a: "1234567890123456789",
    b: -(2n ** 63n),
  });
});
