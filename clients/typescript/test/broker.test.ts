/** The client against real brokers: verbs, errors, crashes, events. */

import assert from "node:assert/strict";
import { chmodSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";

import { Dealer } from "zeromq";

import {
  AlreadyExistsError,
  DeadlineExceededError,
  FailedPreconditionError,
  InvalidArgumentError,
  NotFoundError,
  OutOfRangeError,
  UnavailableError,
  type Broker,
  type Change,
  type Finding,
  type Info,
  type Mirror,
  type SnapshotEvent,
} from "../src/index.js";
import { decodeReply, REQUEST_VERSION } from "../src/protocol.js";
import { Daemon } from "./daemon.js";
import { vectors } from "./places.js";

const KEPT = 50;
const daemon = new Daemon(
  ["memory", "overlayfs", "forgetful"],
  `[snapshotters.forgetful]\nbackend = "memory"\n[snapshotters.forgetful.limits.journal]\nevents_max = ${KEPT}\n`,
);

before(async () => {
  await daemon.start();
});
after(async () => {
  await daemon.remove();
});

async function failure(work: Promise<unknown>): Promise<unknown> {
  return work.then(
    () => assert.fail("it succeeded"),
    (error: unknown) => error,
  );
}

async function listed<T>(from: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const one of from) found.push(one);
  return found;
}

async function names(broker: Broker, ...filters: string[]): Promise<string[]> {
  return (await listed(broker.walk({ filters }))).map(({ name }) => name);
}

for (const snapshotter of ["memory", "overlayfs"]) {
  describe(`${snapshotter}: the verbs`, () => {
    test("tell the story of a layer", async () => {
      await using broker = await daemon.client(snapshotter, { namespace: "story" });
      const { mounts, fence } = await broker.prepare("unpack", { labels: { owner: "ci", é: "☃" } });
      assert(mounts.length > 0 && fence > 0n);
      assert.deepEqual((await broker.mounts("unpack", { fence })).mounts, mounts);
      await broker.commit("base", "unpack", { labels: { team: "build" }, sync: true, fence });
      const base = await broker.stat("base");
      assert.deepEqual([base.kind, base.parent, base.labels], ["committed", "", { team: "build" }]);
      assert(base.created > 1_600_000_000_000_000_000n && base.updated === base.created);

      const view = await broker.view("look", { parent: "base", labels: { v: "1" } });
      assert(view.mounts.every(({ options }) => !options.includes("rw")));
      const updated = await broker.update("look", { v: "2", w: "3" }, { fieldpaths: ["labels.w"] });
      assert.deepEqual(updated.labels, { v: "1", w: "3" });
      assert.deepEqual((await broker.update("look", {})).labels, {});
      assert.deepEqual(await broker.usage("look"), { inodes: 0n, size: 0n });
      const usage = await broker.usage("base");
      assert(usage.inodes >= 0n && usage.size >= 0n);

      assert.deepEqual(await names(broker), ["base", "look"]);
      assert.deepEqual(await names(broker, "kind==view", "name==nothing"), ["look"]);
      await broker.remove("look", { fence: view.fence });
      await broker.remove("base");
      await broker.cleanup();
      assert.deepEqual(await names(broker), []);
    });

    test("fail with typed errors", async () => {
      await using broker = await daemon.client(snapshotter, { namespace: "errors" });
      const { fence } = await broker.prepare("a");
      assert((await failure(broker.stat("nothing"))) instanceof NotFoundError);
      assert((await failure(broker.prepare("a"))) instanceof AlreadyExistsError);
      assert((await failure(broker.prepare("b", { parent: "a" }))) instanceof InvalidArgumentError);
      assert((await failure(broker.prepare(""))) instanceof InvalidArgumentError);
      const stale = await failure(broker.remove("a", { fence: fence + 1n }));
      assert(stale instanceof FailedPreconditionError);
      assert.equal(BigInt(stale.details["fence"] as number), fence);
      const filter = await failure(names(broker, "name=a"));
      assert(filter instanceof InvalidArgumentError);
      assert.equal(filter.details["position"], 4);
      assert((await failure(names(broker, ...new Array<string>(65).fill("name")))) instanceof InvalidArgumentError);
      const other = await failure(broker.snapshotter("zfs").stat("a"));
      assert(other instanceof NotFoundError && (other.details["snapshotters"] as string[]).includes(snapshotter));
      assert((await failure(broker.events({ since: 2n ** 62n, follow: false }).next())) instanceof OutOfRangeError);
      await broker.remove("a", { fence });
    });

    test("of a batch are independent, or all or none", async () => {
      await using broker = await daemon.client(snapshotter, { namespace: "batches" });
      const atomic = broker.batch({ atomic: true });
      atomic.prepare("unpack");
      atomic.commit("layer", "unpack");
      const jobs = ["one", "two"].map((key) => atomic.prepare(key, { parent: "layer" }));
      const seen = atomic.stat("two");
      assert.throws(() => seen.result(), FailedPreconditionError);
      await atomic.send();
      assert.equal(new Set(jobs.map((job) => job.result().fence)).size, 2);
      assert.equal(seen.result().parent, "layer");
      assert((await failure(atomic.send())) instanceof FailedPreconditionError);

      const failing = broker.batch({ atomic: true });
      const three = failing.prepare("three", { parent: "layer" });
      failing.remove("nothing");
      assert((await failure(failing.send())) instanceof NotFoundError);
      assert.equal(three.error?.code, "cancelled");
      assert((await failure(broker.stat("three"))) instanceof NotFoundError);

      const loose = broker.batch();
      loose.remove("nothing");
      const removed = loose.remove("one");
      assert((await failure(loose.send())) instanceof NotFoundError);
      removed.result();
      assert.deepEqual(await names(broker), ["layer", "two"]);

      const long = broker.batch();
      for (let count = 0; count < 1024; count++) long.stat("two");
      assert.throws(() => long.stat("two"), InvalidArgumentError);
      await long.send();
    });
  });
}

describe("many calls", () => {
  test("at once are few requests, and a walk has them in pages", async () => {
    await using broker = await daemon.client("memory", { namespace: "many" });
    const keys = Array.from({ length: 3000 }, (_, index) => `k${String(index).padStart(4, "0")}`);
    const made = await Promise.all(keys.map((key) => broker.prepare(key, { labels: { key } })));
    assert.equal(new Set(made.map(({ fence }) => fence)).size, keys.length);
    const infos = await Promise.all(keys.map((key) => broker.stat(key)));
    assert.deepEqual(
      infos.map(({ labels }) => labels["key"]),
      keys,
    );
    const { requests, calls } = broker.statistics();
    assert.equal(calls, 6000);
    assert(requests <= 12 + 94, `${requests} requests`);
    const walk = broker.walk({ page: 7 });
    assert.deepEqual(await listed(walk), infos);
    assert(walk.sequence >= (made.at(-1)?.fence ?? 0n));
    assert.deepEqual(
      (await listed(broker.walk({ after: "k2997" }))).map(({ name }) => name),
      ["k2998", "k2999"],
    );
  });

  test("of 20 MB travel in requests that fit", async () => {
    await using broker = await daemon.client("memory", { namespace: "large" });
    const labels = Object.fromEntries(Array.from({ length: 60 }, (_, index) => [`l${index}`, "x".repeat(4000)]));
    await Promise.all(Array.from({ length: 84 }, (_, index) => broker.prepare(`k${index}`, { labels })));
    assert.equal((await names(broker)).length, 84);
  });
});

describe("what a snapshotter refuses", () => {
  interface Refused {
    readonly name: string;
    readonly hex: string;
    readonly error: string;
    readonly refuses: "call" | "request";
  }
  // Only text is looked at here: large integers may be rounded.
  const { refused } = JSON.parse(readFileSync(vectors, "utf8")) as { readonly refused: readonly Refused[] };

  test("it refuses as the vectors say", async () => {
    const dealer = new Dealer({ linger: 0 });
    dealer.connect(daemon.endpoint);
    try {
      for (const { name, hex, error, refuses } of refused) {
        await dealer.send([REQUEST_VERSION, name, "memory", Buffer.from(hex, "hex")]);
        const [, id, last, body] = (await dealer.receive()) as Buffer[];
        assert.equal(id?.toString(), name);
        assert.equal(last?.[0], 1, name);
        const reply = decodeReply(body ?? Buffer.of());
        const fault = refuses === "request" ? reply.error : reply.outcomes[0]?.error;
        assert.equal(fault?.code, error, name);
      }
    } finally {
      dealer.close();
    }
  });
});

describe("a snapshotter that does not answer", () => {
  test("is waited for until the deadline, or the abort", async () => {
    await using broker = await daemon.client("memory", { namespace: "slow" });
    await broker.prepare("a");
    const pid = await daemon.pid("memory");
    process.kill(pid, "SIGSTOP");
    const stop = new AbortController();
    try {
      const aborted = broker.prepare("c", { signal: stop.signal });
      const late = await failure(broker.remove("a", { timeoutMs: 200 }));
      assert(late instanceof DeadlineExceededError && late.inDoubt, String(late));
      stop.abort();
      await assert.rejects(aborted, { name: "AbortError" });
    } finally {
      process.kill(pid, "SIGCONT");
    }
  });
});

describe("events", () => {
  test("come by topic, from the journal and as they happen", async () => {
    await using broker = await daemon.client("memory", { namespace: "events" });
    await using live = broker.events({ topics: ["memory/events/snapshot/commit"] });
    await live.start();
    const since = (await live.poll(1)) ?? live.sequence;
    for (const key of ["a", "b", "c"]) {
      await broker.prepare(key);
      await broker.commit(`${key}-made`, key);
    }
    const commits: SnapshotEvent[] = [];
    for await (const event of live) {
      commits.push(event);
      if (commits.length === 3) break;
    }
    assert.deepEqual(
      commits.map(({ verb, key, info }) => [verb, key, info?.name]),
      ["a", "b", "c"].map((key) => ["commit", key, `${key}-made`]),
    );
    assert(typeof since === "bigint");
    const all = await listed(broker.events({ since, follow: false }));
    assert.equal(all.length, 6);
    assert.deepEqual(
      all.filter(({ verb }) => verb === "commit"),
      commits,
    );
    assert.deepEqual(await live.next(), { done: true, value: undefined });
    assert((await failure(broker.events({ topics: ["other/"] }).next())) instanceof InvalidArgumentError);
  });

  test("wait no longer than asked, and end when they are told to", async () => {
    await using broker = await daemon.client("memory", { namespace: "quiet" });
    const events = broker.events();
    assert.equal(await events.poll(50), undefined);
    const stop = new AbortController();
    const aborted = broker.events({ signal: stop.signal });
    const [step, other] = [events.next(), aborted.next()];
    await broker.status();
    events.close();
    stop.abort(new Error("enough"));
    assert.deepEqual(await step, { done: true, value: undefined });
    await assert.rejects(other, /enough/);
  });

  test("that the journal has forgotten are out of range", async () => {
    await using broker = await daemon.client("forgetful");
    for (let count = 0; count < KEPT; count++) {
      await broker.prepare("a");
      await broker.remove("a");
    }
    await broker.cleanup();
    const lost = await failure(broker.events({ since: 0n, follow: false }).next());
    assert(lost instanceof OutOfRangeError, String(lost));
    assert(BigInt(lost.details["oldest"] as number) > 1n);
  });
});

describe("what is not as it must be", () => {
  test("is found, told what a repair would do, and mended", async () => {
    await using broker = await daemon.client("overlayfs", { namespace: "audits" });
    await broker.prepare("a");
    const { snapshotters } = await broker.status();
    const trash = join(snapshotters.find(({ name }) => name === "overlayfs")?.root ?? "", "trash");
    const mode = statSync(trash).mode & 0o777;
    chmodSync(trash, 0o777);
    const told = async (findings: AsyncIterable<Finding>) => {
      return (await listed(findings)).filter(({ path }) => path === trash);
    };
    const audit = broker.audit({ page: 1 });
    const [found, ...more] = await told(audit);
    assert.deepEqual([found?.kind, found?.severity, found?.mended, more], ["mode", "warning", false, []]);
    assert(audit.looked > 0);
    const [planned] = await told(broker.repair());
    assert(planned?.repair && !planned.mended, "nothing was planned");
    assert.equal(statSync(trash).mode & 0o777, 0o777);
    const [mended] = await told(broker.repair({ execute: true }));
    assert.deepEqual([mended?.mended, mended?.failure], [true, ""]);
    assert.equal(statSync(trash).mode & 0o777, mode);
    for await (const { findings } of broker.audit().pages()) {
      assert(!findings.some(({ path }) => path === trash));
    }
    assert((await failure(broker.audit({ page: 10_001 }).next())) instanceof InvalidArgumentError);
  });

  test("ends where its signal or its reader says so", async () => {
    await using broker = await daemon.client("overlayfs", { namespace: "audits" });
    const stop = new AbortController();
    const aborted = broker.audit({ signal: stop.signal });
    const first = aborted.next();
    stop.abort(new Error("enough"));
    await assert.rejects(first, /enough/);
    const left = broker.audit();
    const step = left.next();
    left.close();
    assert.deepEqual(await step, { done: true, value: undefined });
    await broker.status();
    assert.equal(broker.statistics().underWay, 0);
  });

  test("or keeps a snapshot, and who removed it", async () => {
    await using broker = await daemon.client("memory", { namespace: "why" });
    await broker.prepare("making");
    await broker.commit("base", "making");
    const { fence } = await broker.prepare("job", { parent: "base" });
    const why = await broker.why("base");
    assert.deepEqual([why.info, why.broken], [await broker.stat("base"), false]);
    assert.deepEqual([why.children, why.childrenCount], [["job"], 1]);
    assert.deepEqual(why.events.map(({ verb, key }) => [verb, key]).slice(0, 1), [["commit", "making"]]);
    assert.equal((await broker.why("job")).fence, fence);
    await broker.remove("job");
    const gone = await broker.why("job");
    assert.deepEqual([gone.info, gone.events[0]?.verb], [undefined, "remove"]);
    assert(gone.oldest > 0n);
  });
});

/** Follow the changes of a mirror until it has `name`; answers the events on the way. */
async function followed(mirror: Mirror, changes: AsyncIterable<Change>, name: string): Promise<SnapshotEvent[]> {
  const events: SnapshotEvent[] = [];
  for await (const change of changes) {
    if (change.type === "changed") events.push(change.event);
    if (mirror.snapshots.has(name)) break;
  }
  return events;
}

describe("a snapshotter that is killed", () => {
  test("leaves a change in doubt, and nothing else", async () => {
    await using hasty = await daemon.client("overlayfs", { namespace: "doubt", patienceMs: 0 });
    await hasty.prepare("there");
    const pid = await daemon.pid("overlayfs");
    process.kill(pid, "SIGSTOP");
    const changed = failure(hasty.prepare("a"));
    const looked = failure(hasty.stat("there"));
    // The broker answers by itself, behind both calls: it has handed them over.
    await hasty.status();
    process.kill(pid, "SIGKILL");
    const [change, look] = [await changed, await looked];
    assert(change instanceof UnavailableError && change.inDoubt, String(change));
    assert.equal(change.details["in_doubt"], true);
    assert(look instanceof UnavailableError && !look.inDoubt, String(look));
    await daemon.pid("overlayfs");
    await using patient = await daemon.client("overlayfs", { namespace: "doubt", patienceMs: 60_000 });
    assert.equal((await patient.stat("there")).kind, "active");
  });
});

describe("a broker that is killed", () => {
  test("and started again has done every change once, and every event is heard once", async () => {
    const mortal = new Daemon(["overlayfs"], "[publisher]\nheartbeat_ms = 200\n");
    try {
      await mortal.start();
      await using broker = await mortal.client("overlayfs", { patienceMs: 60_000, connectTimeoutMs: 60_000 });
      await broker.prepare("first");
      const mirror = broker.mirror();
      const changes = mirror[Symbol.asyncIterator]();
      // Walked before the first change, or the walk has what is to be heard.
      const { value: start } = await changes.next();
      assert(start?.type === "walked");
      const heard = followed(mirror, changes, "end");
      let answered = 0;
      let killed: Promise<unknown> | undefined;
      const change = async (index: number) => {
        const key = `k${index}`;
        const { fence } = await broker.prepare(key);
        if (++answered === 150) killed = mortal.kill().then(() => mortal.start());
        await broker.commit(`${key}-made`, key, { fence });
        if (index % 2 === 0) await broker.remove(`${key}-made`);
      };
      const callers = Array.from({ length: 50 }, async (_, caller) => {
        for (let index = caller; index < 500; index += 50) await change(index);
      });
      await Promise.all(callers);
      assert(killed, "the broker was not killed");
      await killed;
      await broker.prepare("end");
      assert(broker.statistics().repeated > 0);

      const journal = await listed(broker.events({ since: 0n, follow: false }));
      const count = (verb: string) => journal.filter((event) => event.verb === verb).length;
      assert.deepEqual([count("prepare"), count("commit"), count("remove")], [502, 500, 250]);
      assert.equal(journal.length, 1252);
      const events = await heard;
      assert.deepEqual(events, journal.slice(1));
      const walked = new Map<string, Info>();
      for await (const info of broker.walk()) walked.set(info.name, info);
      assert.deepEqual(new Map([...mirror.snapshots].sort(([one], [other]) => (one < other ? -1 : 1))), walked);
      assert.equal(walked.size, 252);
    } finally {
      await mortal.remove();
    }
  });
});

test("the broker's only snapshotter need not be named, its publisher neither", async () => {
  const single = new Daemon(["memory"]);
  try {
    await single.start();
    await using broker = await single.client("");
    assert.equal(await broker.snapshotterName(), "memory");
    await broker.prepare("a");
    assert.throws(() => broker.snapshotter(""), InvalidArgumentError);
    const status = await broker.status();
    assert.equal(status.snapshotters[0]?.state, "ready");
    await using several = await daemon.client("");
    const unclear = await failure(several.stat("a"));
    assert(unclear instanceof InvalidArgumentError, String(unclear));
    assert.match(unclear.message, /memory.*SNAPBROKER_SNAPSHOTTER/);
    assert((await failure(several.snapshotter("x".repeat(64)).stat("a"))) instanceof NotFoundError);
  } finally {
    await single.remove();
  }
});
