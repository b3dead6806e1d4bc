/** What a subscriber has seen and has missed, without a socket. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { InternalError, InvalidArgumentError, OutOfRangeError, UnimplementedError } from "../src/errors.js";
import type { EventsPage } from "../src/protocol.js";
import { decodeEvent } from "../src/protocol.js";
import { SILENCE_MS, Tracker, walkAgain } from "../src/tracker.js";
import { beatFrames, eventFrames } from "./fake.js";

const PREPARE = "fake/default/snapshot/prepare";
const REMOVE = "fake/default/snapshot/remove";

function tracker(topics: readonly string[] = [], since = 0n): Tracker {
  const made = new Tracker("fake", "default", topics, since);
  made.behind = false;
  return made;
}

function page(sequences: readonly bigint[], next: bigint, newest: bigint): EventsPage {
  return { events: sequences.map((sequence) => decodeEvent(eventFrames(sequence, 0n)[3] as Buffer)), next, newest };
}

function fed(of: Tracker, ...messages: Buffer[][]): (bigint | undefined)[] {
  return messages.map((frames) => of.feed(frames)?.sequence);
}

describe("a tracker of a namespace", () => {
  test("subscribes to the whole snapshotter and answers what follows", () => {
    const of = tracker();
    assert.deepEqual(of.subscriptions, ["fake/"]);
    assert.deepEqual(fed(of, eventFrames(1n, 0n), eventFrames(2n, 0n, "remove"), eventFrames(3n, 1n)), [1n, 2n, 3n]);
    assert.equal(of.position, 3n);
  });

  test("skips what it was not asked for, and counts it", () => {
    const of = tracker(["fake/other/", REMOVE]);
    assert.deepEqual(fed(of, eventFrames(1n, 0n), eventFrames(2n, 0n, "remove")), [undefined, 2n]);
    assert(!of.behind);
  });

  test("drops what it had", () => {
    const of = tracker([], 5n);
    assert.deepEqual(fed(of, eventFrames(5n, 0n), eventFrames(6n, 5n)), [undefined, 6n]);
    assert.deepEqual(of.statistics(), { events: 1, duplicates: 1, gaps: 0, malformed: 0 });
  });

  test("is behind after a hole, and throws away what comes until the journal has answered", () => {
    const of = tracker();
    assert.deepEqual(fed(of, eventFrames(2n, 0n), eventFrames(3n, 2n)), [undefined, undefined]);
    assert(of.behind);
    assert.deepEqual(of.question(), {
      verb: "events",
      since: 0,
      topics: ["fake/default/"],
      credit: 8,
    });
    assert.deepEqual(
      of.page(page([1n, 2n], 2n, 4n)).map(({ sequence }) => sequence),
      [1n, 2n],
    );
    assert(of.behind);
    assert.deepEqual(of.page(page([3n, 4n], 4n, 4n)).length, 2);
    assert(!of.behind);
    assert.deepEqual(fed(of, eventFrames(4n, 3n), eventFrames(5n, 4n)), [undefined, 5n]);
    assert.equal(of.statistics().gaps, 1);
  });

  test("does not count the first question as a gap, and does count a doubt", () => {
    const of = new Tracker("fake", "default", [], 0n);
    assert(of.behind);
    of.page(page([], 0n, 0n));
    assert.equal(of.statistics().gaps, 0);
    of.doubt();
    assert(of.behind);
    assert.equal(of.statistics().gaps, 1);
  });

  test("counts messages that are none, and sees the gap that they leave", () => {
    const of = tracker();
    const [topic, version, number, body] = eventFrames(1n, 0n) as [Buffer, Buffer, Buffer, Buffer];
    const odd = [
      [topic, version, number],
      [topic, version, Buffer.from("1"), body],
      [topic, version, number, Buffer.from("90", "hex")],
      [topic, version, number, eventFrames(2n, 0n)[3] as Buffer],
      [topic, version, number, eventFrames(1n, 0n, "remove")[3] as Buffer],
    ];
    assert.deepEqual(
      fed(of, ...odd),
      odd.map(() => undefined),
    );
    assert.equal(of.statistics().malformed, odd.length);
    assert.deepEqual(fed(of, eventFrames(2n, 1n)), [undefined]);
    assert(of.behind);
  });

  test("does not read another version", () => {
    const [topic, , number, body] = eventFrames(1n, 0n) as [Buffer, Buffer, Buffer, Buffer];
    assert.throws(() => tracker().feed([topic, Buffer.from("SNBE\x02"), number, body]), UnimplementedError);
  });
});

describe("a tracker of one topic", () => {
  test("follows its chain, whatever else happens", () => {
    const of = tracker([PREPARE]);
    assert.deepEqual(of.subscriptions, [PREPARE, "fake//heartbeat"]);
    assert.deepEqual(fed(of, eventFrames(3n, 0n), eventFrames(9n, 3n)), [3n, 9n]);
    assert.deepEqual(fed(of, eventFrames(12n, 10n)), [undefined]);
    assert(of.behind);
  });

  test("takes an event that is another topic's for lost", () => {
    const of = tracker([PREPARE]);
    const [topic, version, number] = eventFrames(1n, 0n) as [Buffer, Buffer, Buffer];
    assert.deepEqual(fed(of, [topic, version, number, eventFrames(1n, 0n, "remove")[3] as Buffer]), [undefined]);
    assert.deepEqual([of.position, of.statistics().malformed], [0n, 1]);
    assert.deepEqual(fed(of, eventFrames(2n, 1n)), [undefined]);
    assert(of.behind);
  });

  test("does not take another topic that begins alike", () => {
    const of = tracker([PREPARE]);
    assert.deepEqual(fed(of, eventFrames(1n, 0n, "prepared")), [undefined]);
    assert.equal(of.position, 0n);
  });
});

describe("a heartbeat", () => {
  test("confirms what is there", () => {
    const of = tracker([], 4n);
    fed(of, beatFrames(4n, 4n, {}));
    assert(!of.behind);
  });

  test("moves on over topics that were not asked for", () => {
    const of = tracker([PREPARE], 4n);
    fed(of, beatFrames(9n, 3n, { [REMOVE]: 9n, [PREPARE]: 4n }));
    assert(!of.behind);
    assert.equal(of.position, 9n);
  });

  test("tells of the last event that was lost", () => {
    const of = tracker([PREPARE], 4n);
    fed(of, beatFrames(9n, 3n, { [PREPARE]: 7n }));
    assert(of.behind);
  });

  for (const [what, beat] of [
    ["that follows another one that was lost", beatFrames(9n, 6n, {})],
    ["without topics", beatFrames(9n, 3n)],
    ["of a journal that begins again", beatFrames(2n, 0n, {})],
  ] as const) {
    test(`${what} makes the tracker ask`, () => {
      const of = tracker([PREPARE], 4n);
      fed(of, beat);
      assert(of.behind);
    });
  }

  test("tells how long silence may last, once there were two", () => {
    const of = tracker();
    assert.equal(of.silenceMs, SILENCE_MS);
    fed(of, beatFrames(0n, 0n, {}, 1_000_000_000n), beatFrames(0n, 0n, {}, 3_000_000_000n));
    assert.equal(of.silenceMs, 6000);
    fed(of, beatFrames(0n, 0n, {}, 3_000_000_001n));
    assert.equal(of.silenceMs, 1000);
    of.doubt();
    fed(of, beatFrames(0n, 0n, {}, 4_000_000_000n));
    of.page(page([], 0n, 0n));
    fed(of, beatFrames(0n, 0n, {}, 104_000_000_000n));
    assert.equal(of.silenceMs, 1000);
  });
});

describe("the journal", () => {
  test("is at its end with an empty page that leads nowhere", () => {
    const of = new Tracker("fake", "default", [PREPARE], 3n);
    assert.deepEqual(of.page(page([], 3n, 8n)), []);
    assert.equal(of.position, 8n);
    assert(!of.behind);
  });

  test("that ends below what was read is out of range", () => {
    const of = new Tracker("fake", "default", [], 9n);
    assert.throws(() => of.page(page([], 2n, 2n)), OutOfRangeError);
  });

  test("that answers what was not asked is an internal error", () => {
    const of = new Tracker("fake", "default", [], 5n);
    assert.throws(() => of.page(page([3n], 0n, 9n)), InternalError);
  });

  test("tells the caller to walk again", () => {
    const of = new Tracker("fake", "default", [], 5n);
    const told = walkAgain(new OutOfRangeError("", { details: { oldest: 7, newest: 9n } }), of);
    assert.match(told.message, /above 5 .* which has 7 to 9: walk again/);
    assert.deepEqual(told.details, { oldest: 7, newest: 9n, since: 5n });
  });
});

test("topics of another snapshotter are refused", () => {
  assert.throws(() => tracker(["fake2/default/"]), InvalidArgumentError);
  assert.throws(() => tracker(Array.from({ length: 65 }, () => "fake/")), InvalidArgumentError);
  assert.throws(() => tracker("fake/" as unknown as string[]), InvalidArgumentError);
});
