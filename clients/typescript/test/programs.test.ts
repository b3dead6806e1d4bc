/** The samples and the conformance programs, run as their users run them, against a broker that drops events. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, describe, test } from "node:test";

import { parse } from "../conformance/lines.js";
import type { Info } from "../src/index.js";
import { Daemon } from "./daemon.js";
import { Program } from "./programs.js";

const KEPT = 2000;
const BURST = 6000;
const AT_ONCE = 1000;
/** What a stopped subscriber misses is more than the publisher and both kernels' buffers keep for it. */
const LABELS = { pad: "x".repeat(400) };
const daemon = new Daemon(
  ["memory", "overlayfs", "forgetful"],
  `[publisher]\nsend_queue_max = 10\nheartbeat_ms = 200\n[snapshotters.forgetful]\nbackend = "memory"\n` +
    `[snapshotters.forgetful.limits.journal]\nevents_max = ${KEPT}\n`,
);

before(async () => {
  await daemon.start();
});
after(async () => {
  await daemon.remove();
});

interface Event {
  readonly sequence: number;
  readonly verb: string;
  readonly key: string;
  readonly info: Info | null;
}

interface Line {
  readonly ready?: true;
  readonly state?: readonly Info[];
  readonly sequence?: number;
  readonly event?: Event;
  readonly mirror?: readonly Info[];
  readonly gaps?: number;
}

describe("watch", () => {
  test("prints what exists, and what changes", async () => {
    await using broker = await daemon.client("memory", { namespace: "watch" });
    await broker.prepare("a\n");
    await broker.commit("base", "a\n");
    using watch = new Program("samples/watch.js", [], daemon.environment("memory", "watch"));
    await watch.until((lines) => lines.some((line) => line.startsWith("--")));
    await broker.prepare("job-é", { parent: "base" });
    await broker.commit("layer", "job-é");
    await broker.update("layer", { "\u{1F600}": "1", "\uFFFD": "2", b: "3" });
    await broker.cleanup();
    await broker.remove("layer");
    await watch.until((lines) => lines.at(-1)?.startsWith("- ") === true);
    assert.equal(await watch.end("SIGTERM"), 0);
    const sequence = watch.lines[1]?.split(" ").at(-1) ?? "";
    assert.deepEqual(watch.lines, [
      '= committed "base"',
      `-- 1 snapshots at ${sequence}`,
      '+ active "job-é" on "base"',
      '> committed "layer" on "base" from "job-é"',
      '~ committed "layer" on "base" {"b":"3","\uFFFD":"2","\u{1F600}":"1"}',
      '- "layer"',
    ]);
  });
});

describe("tail", () => {
  test("prints events as JSON lines, of the journal and as they come", async () => {
    await using broker = await daemon.client("memory", { namespace: "tail" });
    await broker.prepare("a");
    const environment = daemon.environment("memory", "tail");
    using first = new Program("samples/tail.js", [], environment);
    assert.equal(await first.end(), 0, first.errors);
    assert.equal(first.lines.length, 1);
    const [line = ""] = first.lines;
    const event = parse(line) as Event;
    assert.match(line, /^\{"sequence":\d+,"previous":0,"time":\d{19},"snapshotter":"memory","namespace":"tail",/);
    assert.equal(event.key, "a");

    const words = ["--since", String(event.sequence), "--follow", "memory/tail/snapshot/remove"];
    using follow = new Program("samples/tail.js", words, environment);
    await broker.remove("a");
    await broker.prepare("b");
    await broker.remove("b");
    await follow.until((lines) => lines.length === 2);
    assert.equal(await follow.end("SIGINT"), 0, follow.errors);
    const removed = follow.lines.map((text) => parse(text) as Event);
    assert.deepEqual(
      removed.map(({ verb, key, info }) => [verb, key, info]),
      [
        ["remove", "a", null],
        ["remove", "b", null],
      ],
    );
  });

  test("begins where the journal does, and says what is wrong", async () => {
    await using broker = await daemon.client("forgetful", { namespace: "tail" });
    await Promise.all(Array.from({ length: KEPT + 500 }, (_, index) => broker.prepare(`k${index}`)));
    const environment = daemon.environment("forgetful", "tail");
    using all = new Program("samples/tail.js", [], environment);
    using old = new Program("samples/tail.js", ["--since", "0"], environment);
    using wrong = new Program("samples/tail.js", ["--since", "x"], environment);
    using help = new Program("samples/tail.js", ["--help"], environment);
    assert.equal(await all.end(), 0, all.errors);
    assert.equal((parse(all.lines.at(-1) ?? "") as Event).sequence, KEPT + 500);
    assert(all.lines.length >= KEPT && all.lines.length < KEPT + 500);
    assert.equal(await old.end(), 13);
    assert.match(old.errors, /^tail: out_of_range: .*\n$/);
    assert.equal(await wrong.end(), 2);
    assert.match(wrong.errors, /^usage: tail/);
    assert.equal(await help.end(), 0);
    assert.match(help.lines[0] ?? "", /^usage: tail/);
  });
});

describe("farm", () => {
  test("makes workspaces, mounted as root, and leaves nothing", async () => {
    const environment = daemon.environment("overlayfs", "farm");
    using farm = new Program("samples/farm.js", ["--count", "8", "--callers", "4", "--prefix", "f"], environment);
    assert.equal(await farm.end(), 0, farm.errors);
    const mounted = process.geteuid?.() === 0;
    const how = mounted ? "mounted" : "not mounted \\(needs root\\)";
    assert.match(farm.lines[0] ?? "", new RegExp(`^workspaces {2}8 from "f-base", 4 at a time, ${how}$`));
    assert.match(farm.lines.at(-1) ?? "", /^total {7}\d+\.\d\d s, \d+\.\d workspaces a second$/);
    assert.equal(farm.lines.length, 5);
    using again = new Program("samples/farm.js", ["--count", "3", "--prefix", "f", "--keep", "--json"], environment);
    assert.equal(await again.end(), 0, again.errors);
    const told = JSON.parse(again.lines[0] ?? "") as Record<string, unknown>;
    const fields = [
      "workspaces",
      "callers",
      "base",
      "mounted",
      "prepare_ms",
      "use_ms",
      "commit_ms",
      "seconds",
      "per_second",
    ];
    assert.deepEqual(Object.keys(told), fields);
    await using broker = await daemon.client("overlayfs", { namespace: "farm" });
    const names: string[] = [];
    for await (const { name } of broker.walk()) names.push(name);
    assert.deepEqual(names, ["f-0-done", "f-1-done", "f-2-done", "f-base"]);
    using taken = new Program("samples/farm.js", ["--count", "3", "--prefix", "f"], environment);
    assert.equal(await taken.end(), 4, taken.errors);
    assert.match(taken.errors, /^farm: already_exists: /);
    assert(!readFileSync("/proc/self/mountinfo", "utf8").includes("/farm-"));
  });
});

describe("the recorder", () => {
  /** Stop a recorder, make more events than anybody keeps for it, and let it go on to the end. */
  async function record(snapshotter: string, namespace: string): Promise<Line[]> {
    await using broker = await daemon.client(snapshotter, { namespace });
    await broker.prepare("before");
    using recorder = new Program("conformance/recorder.js", [namespace], daemon.environment(snapshotter));
    await recorder.until((lines) => lines.length === 2);
    await broker.prepare("heard");
    await recorder.until((lines) => lines.length === 3);
    recorder.process.kill("SIGSTOP");
    const keys = Array.from({ length: BURST }, (_, index) => `k${String(index).padStart(4, "0")}`);
    // No more at once than a snapshotter takes into its hands.
    for (let begin = 0; begin < BURST; begin += AT_ONCE) {
      await Promise.all(keys.slice(begin, begin + AT_ONCE).map((key) => broker.prepare(key, { labels: LABELS })));
    }
    recorder.process.kill("SIGCONT");
    await broker.prepare("conformance-end");
    assert.equal(await recorder.end(), 0, recorder.errors);
    const lines = recorder.lines.map((line) => parse(line) as Line);
    const names = (lines.at(-1)?.mirror ?? []).map(({ name }) => name);
    assert.deepEqual(names, ["before", "conformance-end", "heard", ...keys].sort());
    assert((lines.at(-1)?.gaps ?? 0) >= 1, "nothing was missed");
    assert.deepEqual(
      lines.slice(0, 2).map(({ state, ready }) => state?.length ?? ready),
      [1, true],
    );
    return lines.slice(0, -1);
  }

  function eventsOf(lines: readonly Line[]): Event[] {
    return lines.flatMap(({ event }) => event ?? []);
  }

  test("has from the journal, once and in order, what the publisher dropped", async () => {
    const lines = await record("memory", "recorded");
    const events = eventsOf(lines);
    assert.equal(events.length, BURST + 2);
    assert.equal(events[0]?.key, "heard");
    assert(events.every(({ sequence }, index) => index === 0 || sequence > (events[index - 1]?.sequence ?? 0)));
    assert.equal(new Set(events.map(({ key }) => key)).size, BURST + 2);
  });

  test("walks again where the journal has forgotten it", async () => {
    const lines = await record("forgetful", "forgotten");
    const states = lines.filter(({ state }) => state !== undefined);
    assert(states.length > 1, "it did not walk again");
    const second = lines.lastIndexOf(states.at(-1) ?? {});
    const above = states.at(-1)?.sequence ?? 0;
    assert(eventsOf(lines.slice(second)).every(({ sequence }) => sequence > above));
  });
});

describe("the driver", () => {
  test("answers steps, and ends at what it does not know", async () => {
    using driver = new Program("conformance/driver.js", [], daemon.environment("memory", "driver"));
    const steps = [
      { id: 1, do: "prepare", key: "a", labels: { b: "c" } },
      { id: 2, do: "together", calls: ["a", "nothing"].map((key) => ({ do: "stat", key })) },
      {
        id: 3,
        do: "batch",
        atomic: true,
        calls: [
          { do: "commit", name: "b", key: "a" },
          { do: "remove", key: "x" },
        ],
      },
      { id: 4, do: "batch", calls: new Array(1025).fill({ do: "stat", key: "a" }) },
      { id: 5, do: "churn", prefix: "k", parent: "", count: 6, callers: 2 },
      { id: 6, do: "walk", filters: ["name~=^k"], page: 1, namespace: "driver", snapshotter: "memory" },
      { id: 7, do: "events", since: 0, topics: ["memory/driver/snapshot/prepare"], count: 2 },
      { id: 8, do: "open", patience_ms: 0, timeout_ms: 5000 },
      { id: 9, do: "status" },
      { id: 10, do: "stat", key: "a", odd: 1 },
    ];
    driver.process.stdin?.write(steps.map((step) => `${JSON.stringify(step)}\n`).join(""));
    assert.notEqual(await driver.end(), 0);
    assert.match(driver.errors, /unknown fields of stat: odd/);
    const answers = driver.lines.map(
      (line) => parse(line) as { id: number; ok: Record<string, unknown[]>; error: object },
    );
    const error = (code: string) => ({ error: { code, details: {}, in_doubt: false } });
    const [ready, prepared, together, batch, long, churned, walked, events, opened, status] = answers;
    assert.deepEqual(ready, { ready: "typescript" });
    assert.equal(prepared?.ok["mounts"]?.length, 1);
    assert.deepEqual(together?.ok["results"]?.[1], error("not_found"));
    assert.deepEqual(batch?.ok["results"], [error("cancelled"), error("not_found")]);
    assert.deepEqual(long, { id: 4, ...error("invalid_argument") });
    assert.deepEqual(churned, { id: 5, ok: { calls: 14 } });
    assert.deepEqual(
      (walked?.ok["infos"] as unknown as Info[]).map(({ name }) => name),
      ["k-1-made", "k-4-made"],
    );
    assert.equal(events?.ok["events"]?.length, 2);
    assert.deepEqual(opened, { id: 8, ok: {} });
    assert.deepEqual(status?.ok, { snapshotters: ["forgetful", "memory", "overlayfs"] });
  });
});

describe("the bench", () => {
  test("measures calls and events", async () => {
    await using broker = await daemon.client("memory", { namespace: "bench" });
    await broker.prepare("bench");
    const place = ["--endpoint", daemon.endpoint, "--events-endpoint", daemon.endpoint.replace("router", "events")];
    const words = [...place, "--snapshotter", "memory", "--namespace", "bench", "--seconds", "0.2", "--callers", "8"];
    const program = (work: string) => new Program("conformance/bench.js", [...words, "--work", work], process.env);
    for (const work of ["latency", "throughput"]) {
      using bench = program(work);
      assert.equal(await bench.end(), 0, bench.errors);
      const told = JSON.parse(bench.lines[0] ?? "") as Record<string, number>;
      assert.equal(told["work"], work);
      assert((told["calls"] ?? 0) > 0 && (told["p50_ms"] ?? told["per_second"] ?? 0) > 0);
    }
    using bench = program("events");
    await bench.until((lines) => lines.length === 1);
    await Promise.all(["a", "b"].map((key) => broker.prepare(key)));
    await broker.prepare("bench-end");
    assert.equal(await bench.end(), 0, bench.errors);
    assert.equal((JSON.parse(bench.lines[1] ?? "") as Record<string, number>)["events"], 3);
  });
});
