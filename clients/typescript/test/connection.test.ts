/** The front, against a broker that the test plays: what travels, and what becomes of it when things go wrong. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import {
  connect,
  DeadlineExceededError,
  FailedPreconditionError,
  InternalError,
  InvalidArgumentError,
  NotFoundError,
  SnapbrokerError,
  UnavailableError,
  type Broker,
  type ConnectOptions,
} from "../src/index.js";
import { encode } from "../src/msgpack.js";
import { FakeBroker, type Received } from "./fake.js";

const INFO = { name: "a", kind: "active" };
const MOUNTS = { mounts: [], fence: 7 };

function to(fake: FakeBroker, options: ConnectOptions = {}): Promise<Broker> {
  return connect({ endpoint: fake.endpoint, snapshotter: "fake", namespace: "default", ...options });
}

/** Answer nothing: the test does it later. */
function later(): void {
  // Nothing is answered here.
}

async function failure(work: Promise<unknown>): Promise<SnapbrokerError> {
  try {
    await work;
  } catch (error) {
    assert(error instanceof SnapbrokerError, String(error));
    return error;
  }
  assert.fail("it succeeded");
}

describe("calls of one turn", () => {
  test("travel in one request", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const infos = await Promise.all(["a", "b", "c"].map((key) => broker.stat(key)));
    assert.equal(infos.length, 3);
    assert.deepEqual(fake.received[0]?.keys, ["a", "b", "c"]);
    assert.equal(fake.received.length, 1);
    assert.equal(fake.received[0].request.token.length, 0);
    assert.equal(fake.received[0].target, "fake");
  });

  test("travel in one request across awaits", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const call = async (hops: number) => {
      for (let hop = 0; hop < hops; hop++) await Promise.resolve();
      return broker.stat(`hop-${hops}`);
    };
    await Promise.all([0, 1, 5, 9].map(call));
    assert.equal(fake.received.length, 1);
  });

  test("leave in requests of 256 changes, or 32 reads", async () => {
    using fake = await new FakeBroker((received) => {
      return received.succeed(received.verbs[0] === "stat" ? INFO : MOUNTS);
    }).start();
    await using broker = await to(fake);
    const keys = Array.from({ length: 600 }, (_, index) => `k${index}`);
    await Promise.all(keys.map((key) => broker.prepare(key)));
    assert.deepEqual(
      fake.received.map(({ verbs }) => verbs.length),
      [256, 256, 88],
    );
    assert.equal(new Set(fake.received.map(({ request }) => Buffer.from(request.token).toString("hex"))).size, 3);
    fake.received.length = 0;
    await Promise.all(keys.slice(0, 70).map((key) => broker.stat(key)));
    assert.deepEqual(
      fake.received.map(({ verbs }) => verbs.length),
      [32, 32, 6],
    );
  });

  test("of another namespace, snapshotter or timeout travel apart", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const other = broker.snapshotter("other", "elsewhere");
    await Promise.all([broker.stat("a"), other.stat("b"), broker.stat("c", { timeoutMs: 5000 }), broker.stat("d")]);
    const sent = fake.received.map(({ target, request, keys }) => [target, request.namespace, request.timeoutMs, keys]);
    assert.deepEqual(sent, [
      ["fake", "default", 60_000, ["a", "d"]],
      ["other", "elsewhere", 60_000, ["b"]],
      ["fake", "default", 5000, ["c"]],
    ]);
  });

  test("that are too long together are sent apart, and one that is too long alone is refused", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const long = "x".repeat(6_000_000);
    const calls = ["a", "b", "c"].map((key) => broker.update(key, { long }));
    const tooLong = failure(broker.update("d", { long: long.repeat(3) }));
    await Promise.all(calls);
    assert((await tooLong) instanceof InvalidArgumentError);
    assert.deepEqual(
      fake.received.flatMap(({ request }) => request.calls.map((call) => "name" in call && call.name)),
      ["a", "b", "c"],
    );
  });

  test("with a wrong argument are refused alone", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const wrong = [
      broker.stat(7 as unknown as string),
      broker.stat("\ud800"),
      broker.update("a", { b: 1 as unknown as string }),
      broker.remove("a", { fence: -1n }),
      broker.remove("a", { fence: 1.5 }),
      broker.stat("a", { timeoutMs: Number.NaN }),
    ].map(failure);
    const right = broker.stat("right");
    for (const call of wrong) assert((await call) instanceof InvalidArgumentError);
    assert.equal((await right).name, "a");
    assert.deepEqual(
      fake.received.map(({ keys }) => keys),
      [["right"]],
    );
    assert((await failure(broker.stat("a", { timeoutMs: 0 }))) instanceof DeadlineExceededError);
  });
});

describe("outcomes", () => {
  test("settle their calls in any order, progress first", async () => {
    using fake = await new FakeBroker(async (received) => {
      await received.part(false, { call: 1, progress: { entries: 3n, bytes: 2n ** 40n } });
      await received.part(false, { call: 1, ok: { inodes: 1, size: 2n ** 53n + 1n } });
      await received.part(false, { call: 1, ok: { inodes: 2, size: 2 } });
      await received.part(true, { call: 0, error: { code: "not_found", message: "no", details: { a: 1 } } });
    }).start();
    await using broker = await to(fake);
    const reports: unknown[] = [];
    const first = broker.stat("a");
    const second = broker.usage("b", { onProgress: (progress) => reports.push(progress) });
    assert.deepEqual(await second, { inodes: 1n, size: 9_007_199_254_740_993n });
    assert.deepEqual(reports, [{ entries: 3n, bytes: 2n ** 40n }]);
    const error = await failure(first);
    assert(error instanceof NotFoundError);
    assert.deepEqual([error.code, error.message, error.details, error.inDoubt], ["not_found", "no", { a: 1 }, false]);
  });

  test("that are none are an internal error", async () => {
    const bodies = [
      encode({ outcomes: [{ call: 5, ok: {} }] }),
      encode({ outcomes: [{ call: 0, ok: { kind: "odd" } }] }),
      encode({}),
      Buffer.from("c1", "hex"),
    ];
    using fake = await new FakeBroker((received) => received.send(bodies.shift() ?? encode({}), true)).start();
    await using broker = await to(fake);
    for (let left = bodies.length; left > 0; left--) {
      assert((await failure(broker.stat("a"))) instanceof InternalError);
    }
  });

  test("a progress callback that throws gives its own call up", async () => {
    using fake = await new FakeBroker(async (received) => {
      await received.part(false, { call: 0, progress: { entries: 1n, bytes: 1n } });
      await received.part(true, { call: 0, ok: MOUNTS }, { call: 1, ok: MOUNTS });
    }).start();
    await using broker = await to(fake);
    const onProgress = () => {
      throw new RangeError("enough");
    };
    const [first, second] = await Promise.allSettled([broker.prepare("a", { onProgress }), broker.prepare("b")]);
    assert(first.status === "rejected" && first.reason instanceof RangeError);
    assert.equal(second.status, "fulfilled");
  });
});

describe("an abort", () => {
  test("of one call takes back this call", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake);
    const stop = new AbortController();
    const [aborted, kept] = [broker.prepare("a", { signal: stop.signal }), broker.prepare("b")];
    await fake.until(() => fake.received.length === 1);
    const reason = new Error("the user left");
    stop.abort(reason);
    await assert.rejects(aborted, reason);
    await fake.until(() => fake.cancels.length === 1);
    const [cancel] = fake.cancels[0]?.request.calls ?? [];
    assert(cancel?.verb === "cancel");
    assert.deepEqual(cancel.calls, [0]);
    assert.deepEqual(Buffer.from(cancel.request), fake.received[0]?.id);
    await fake.received[0]?.succeed(MOUNTS);
    assert.equal((await kept).fence, 7n);
  });

  test("of every call takes back the request", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake);
    const stop = new AbortController();
    const calls = ["a", "b"].map((key) => broker.stat(key, { signal: stop.signal }));
    await fake.until(() => fake.received.length === 1);
    stop.abort();
    for (const call of calls) await assert.rejects(call, { name: "AbortError" });
    await fake.until(() => fake.cancels.length === 2);
    const last = fake.cancels[1]?.request.calls[0];
    assert(last?.verb === "cancel" && last.calls === undefined);
    assert.equal(broker.statistics().underWay, 0);
  });

  test("before the turn is over leaves the call out", async () => {
    using fake = await new FakeBroker((received) => received.succeed(INFO)).start();
    await using broker = await to(fake);
    const stop = new AbortController();
    const [aborted, kept] = [broker.stat("a", { signal: stop.signal }), broker.stat("b")];
    stop.abort();
    await assert.rejects(aborted, { name: "AbortError" });
    await kept;
    await assert.rejects(broker.stat("c", { signal: stop.signal }), { name: "AbortError" });
    assert.deepEqual(
      fake.received.map(({ keys }) => keys),
      [["b"]],
    );
    assert.equal(fake.cancels.length, 0);
  });
});

describe("a deadline", () => {
  test("that passes is told, with doubt for a change, and the broker is told", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake, { timeoutMs: 150 });
    const [change, read] = await Promise.all([failure(broker.remove("a")), failure(broker.stat("b"))]);
    assert(change instanceof DeadlineExceededError && change.inDoubt);
    assert.match(change.message, /no answer from 'fake' at .* within 0.15 s; it is unknown/);
    assert(read instanceof DeadlineExceededError && !read.inDoubt);
    await fake.until(() => fake.cancels.length === 1);
  });

  test("without a broker is unavailable, without doubt", async () => {
    using fake = new FakeBroker();
    await using broker = await to(fake, { connectTimeoutMs: 100 });
    const error = await failure(broker.prepare("a"));
    assert(error instanceof UnavailableError && !error.inDoubt);
    assert.match(error.message, /no broker answers at .*waited 0.1 s.*SNAPBROKER_ENDPOINT/);
  });

  test("a broker that comes in time is waited for", async () => {
    using fake = new FakeBroker((received: Received) => received.succeed(INFO));
    await using broker = await to(fake);
    const call = broker.stat("a");
    await fake.start();
    assert.equal((await call).name, "a");
  });
});

describe("a repeat", () => {
  test("after a lost connection has the same token and another id", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake);
    const call = broker.prepare("a", { labels: { b: "c" } });
    await fake.until(() => fake.received.length === 1);
    fake.stop();
    fake.answer = (received) => received.succeed(MOUNTS);
    await fake.start();
    assert.equal((await call).fence, 7n);
    const [first, second] = fake.received;
    assert(first && second && fake.received.length === 2);
    assert.equal(first.request.token.length, 24);
    assert.deepEqual(first.request.token, second.request.token);
    assert.deepEqual(first.request.calls, second.request.calls);
    assert.notDeepEqual(first.id, second.id);
    assert(second.request.timeoutMs < first.request.timeoutMs);
    assert.equal(broker.statistics().repeated, 1);
  });

  test("is not made without patience, and the doubt is told", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake, { patienceMs: 0 });
    const [change, read] = [failure(broker.prepare("a")), failure(broker.stat("a"))];
    await fake.until(() => fake.received.length === 1);
    assert.equal(fake.received[0]?.request.token.length, 0);
    fake.stop();
    const error = await change;
    assert(error instanceof UnavailableError && error.inDoubt, error.message);
    assert(!(await read).inDoubt);
  });

  test("keeps its doubt when no repeat brings an outcome", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake, { patienceMs: 300, connectTimeoutMs: 100 });
    const call = failure(broker.prepare("a"));
    await fake.until(() => fake.received.length === 1);
    fake.stop();
    const error = await call;
    assert(error instanceof UnavailableError && error.inDoubt);
    assert.match(error.message, /repeated (once|\d+ times) in \d\.\d s; it is unknown/);
  });

  test("follows a refusal, as late as the broker asks", async () => {
    const answers = [
      (received: Received) => received.refuse("unavailable", "it restarts", { retry_after_ms: 50 }),
      (received: Received) => received.fail("unavailable", { retry_after_ms: 50 }),
      (received: Received) => received.succeed(MOUNTS),
    ];
    using fake = await new FakeBroker((received) => answers.shift()?.(received)).start();
    await using broker = await to(fake);
    const begin = performance.now();
    assert.equal((await broker.prepare("a")).fence, 7n);
    assert(performance.now() - begin >= 100);
    assert.equal(broker.statistics().repeated, 2);
  });

  test("is not made of what is final", async () => {
    using fake = await new FakeBroker((received) => received.refuse("resource_exhausted", "full")).start();
    await using broker = await to(fake);
    assert.equal((await failure(broker.prepare("a"))).code, "resource_exhausted");
    assert.equal(fake.received.length, 1);
  });

  test("holds the calls of callers that left, and takes them back", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake);
    const stop = new AbortController();
    const [left, kept] = [broker.prepare("a", { signal: stop.signal }), broker.prepare("b")];
    await fake.until(() => fake.received.length === 1);
    fake.stop();
    stop.abort();
    await assert.rejects(left);
    fake.answer = (received) => received.succeed(MOUNTS);
    await fake.start();
    await kept;
    assert.deepEqual(fake.received[1]?.keys, ["a", "b"]);
    await fake.until(() => fake.cancels.length === 1);
    const cancel = fake.cancels[0]?.request.calls[0];
    assert(cancel?.verb === "cancel");
    assert.deepEqual(cancel.calls, [0]);
  });

  test("of an atomic batch is not made once a call has failed by itself", async () => {
    using fake = await new FakeBroker((received) =>
      received.part(
        true,
        { call: 0, error: { code: "cancelled", message: "call 1 failed", details: {} } },
        { call: 1, error: { code: "not_found", message: "no b", details: {} } },
      ),
    ).start();
    await using broker = await to(fake);
    const batch = broker.batch({ atomic: true });
    const [first, second] = [batch.prepare("a"), batch.remove("b")];
    assert.equal((await failure(batch.send())).code, "not_found");
    assert.equal(first.error?.code, "cancelled");
    assert.throws(() => {
      second.result();
    }, NotFoundError);
    assert.equal(batch.refusal, undefined);
    assert(fake.received[0]?.request.atomic);
    assert.equal(fake.received.length, 1);
  });
});

describe("a walk", () => {
  test("goes on over pages and requests, and after a broker that was away", async () => {
    const after: string[] = [];
    using fake = await new FakeBroker(async (received) => {
      const [call] = received.request.calls;
      assert(call?.verb === "walk");
      after.push(call.after ?? "");
      const page = (names: string[], sequence: number, next: string) => ({
        call: 0,
        ok: { infos: names.map((name) => ({ name, kind: "active" })), sequence, next },
      });
      if (after.length === 1) {
        await received.part(false, page(["a", "b"], 5, "b"));
        await received.part(true, page([], 6, "c"));
      } else if (after.length === 2) await received.refuse("unavailable");
      else await received.part(true, page(["d"], 9, ""));
    }).start();
    await using broker = await to(fake);
    const walk = broker.walk({ filters: ["kind==active"], page: 2 });
    assert.throws(() => walk.sequence, FailedPreconditionError);
    const names: string[] = [];
    for await (const info of walk) names.push(info.name);
    assert.deepEqual(names, ["a", "b", "d"]);
    assert.equal(walk.sequence, 5n);
    assert.deepEqual(after, ["", "c", "c"]);
    assert.deepEqual(await walk.next(), { done: true, value: undefined });
  });

  test("that is left early is taken back", async () => {
    using fake = await new FakeBroker((received) =>
      received.part(false, { call: 0, ok: { infos: [INFO], sequence: 1, next: "a" } }),
    ).start();
    await using broker = await to(fake);
    for await (const info of broker.walk()) {
      assert.equal(info.name, "a");
      break;
    }
    await fake.until(() => fake.cancels.length === 1);
    assert.equal(broker.statistics().underWay, 0);
  });

  test("that leads back is an internal error", async () => {
    using fake = await new FakeBroker((received) =>
      received.part(true, { call: 0, ok: { infos: [INFO], sequence: 1, next: "a" } }),
    ).start();
    await using broker = await to(fake);
    await assert.rejects(async () => {
      for await (const info of broker.walk()) assert.equal(info.name, "a");
    }, InternalError);
  });

  test("is aborted", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake);
    const stop = new AbortController();
    const step = broker.walk({ signal: stop.signal }).next();
    await fake.until(() => fake.received.length === 1);
    stop.abort();
    await assert.rejects(step, { name: "AbortError" });
    await fake.until(() => fake.cancels.length === 1);
  });
});

describe("a close", () => {
  test("ends what is under way, and what is called afterwards", async () => {
    using fake = await new FakeBroker(later).start();
    const broker = await to(fake);
    const [change, step] = [failure(broker.prepare("a")), broker.walk().next()];
    step.catch(() => undefined);
    await fake.until(() => fake.received.length === 2);
    await broker.close();
    const error = await change;
    assert(error instanceof UnavailableError && error.inDoubt);
    await assert.rejects(step, SnapbrokerError);
    assert((await failure(broker.stat("a"))) instanceof FailedPreconditionError);
    await fake.until(() => fake.cancels.length === 2);
    await broker.close();
  });

  test("an endpoint that is none is refused", async () => {
    await assert.rejects(connect({ endpoint: "odd://x" }), InvalidArgumentError);
    await assert.rejects(connect({ namespace: "a..b" }), InvalidArgumentError);
    await assert.rejects(connect({ callsPerRequest: 0 }), InvalidArgumentError);
    await assert.rejects(connect({ patienceMs: -1 }), InvalidArgumentError);
    await assert.rejects(connect({ snapshotter: "a/b" }), InvalidArgumentError);
  });

  test("late and odd replies are ignored", async () => {
    using fake = await new FakeBroker(later).start();
    await using broker = await to(fake, { timeoutMs: 100 });
    await failure(broker.stat("a"));
    await fake.received[0]?.succeed(INFO);
    fake.answer = (received) => received.succeed(INFO);
    await broker.stat("b", { timeoutMs: 5000 });
    assert(broker.statistics().stray >= 1);
  });
});
