/** Workspaces from one base, used and committed, the way a build farm does it. */

import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { mkdtemp, readFile, rmdir, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs, promisify } from "node:util";

import { connect, InternalError, NotFoundError, SnapbrokerError, toJson, type Broker, type Mount } from "snapbroker";

const USAGE = "usage: farm [--count 100] [--callers 16] [--base NAME] [--prefix P] [--keep] [--json]";

interface Plan {
  readonly count: number;
  readonly callers: number;
  readonly prefix: string;
  readonly base: string;
  readonly ownBase: boolean;
  readonly keep: boolean;
  readonly json: boolean;
}

const run = promisify(execFile);
/** Only root mounts. */
const mounting = process.geteuid?.() === 0;

/** Do `work` in the mounted directory, and unmount it, whatever happens. */
async function mounted(mounts: readonly Mount[], work: (path: string) => Promise<void>): Promise<void> {
  const place = await mkdtemp(join(tmpdir(), "farm-"));
  const made: string[] = [];
  try {
    for (const { type, source, options, target } of mounts) {
      const point = join(place, target);
      const words = type === "bind" ? [] : ["-t", type];
      await run("mount", [...words, ...(options.length > 0 ? ["-o", options.join(",")] : []), source, point]);
      made.unshift(point);
    }
    await work(place);
  } finally {
    for (const point of made) await run("umount", [point]);
    await rmdir(place);
  }
}

/** The names that this run has made, and not those that were there before. */
type Made = Set<string>;

async function makeBase(broker: Broker, { base, prefix }: Plan, made: Made): Promise<void> {
  const key = `${base}-making`;
  const { mounts, fence } = await broker.prepare(key);
  made.add(key);
  if (mounting) await mounted(mounts, (path) => writeFile(join(path, "base.txt"), `the base of ${prefix}\n`));
  await broker.commit(base, key, { sync: true, fence });
  made.delete(key);
  made.add(base);
}

async function use(plan: Plan, index: number, mounts: readonly Mount[]): Promise<void> {
  await mounted(mounts, async (path) => {
    if (plan.ownBase) {
      const content = await readFile(join(path, "base.txt"), "utf8");
      if (content !== `the base of ${plan.prefix}\n`) throw new InternalError(`base.txt holds ${toJson(content)}`);
    }
    await writeFile(join(path, "result.txt"), `workspace ${index}\n`);
  });
}

/** Milliseconds of each step of each workspace. */
class Times {
  readonly prepare: number[] = [];
  readonly use: number[] = [];
  readonly commit: number[] = [];

  async of<T>(step: "prepare" | "use" | "commit", work: Promise<T>): Promise<T> {
    const begin = performance.now();
    const result = await work;
    this[step].push(performance.now() - begin);
    return result;
  }
}

async function workspace(broker: Broker, plan: Plan, index: number, times: Times, made: Made): Promise<void> {
  const key = `${plan.prefix}-${index}`;
  const labels = { farm: plan.prefix };
  const { mounts, fence } = await times.of("prepare", broker.prepare(key, { parent: plan.base, labels }));
  made.add(key);
  if (mounting) await times.of("use", use(plan, index, mounts));
  await times.of("commit", broker.commit(`${key}-done`, key, { labels, fence }));
  made.delete(key);
  made.add(`${key}-done`);
}

/** All workspaces, `callers` at a time; the first error ends them, when those under way are done. */
async function work(broker: Broker, plan: Plan, times: Times, made: Made): Promise<void> {
  let next = 0;
  let failed = false;
  const caller = async () => {
    while (!failed && next < plan.count) {
      try {
        stop.signal.throwIfAborted();
        await workspace(broker, plan, next++, times, made);
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  const ends = await Promise.allSettled(Array.from({ length: plan.callers }, caller));
  for (const end of ends) if (end.status === "rejected") throw end.reason;
}

async function check(broker: Broker, { prefix, count }: Plan): Promise<void> {
  const done = [];
  for await (const info of broker.walk({ filters: [`labels.farm=="${prefix}",kind==committed`] })) done.push(info);
  if (done.length !== count) throw new InternalError(`${done.length} of ${count} workspaces are committed`);
}

/** Take away what this run has made, the base last, and wait until it is gone from disk. */
async function discard(broker: Broker, { base }: Plan, made: Made): Promise<void> {
  const remove = async (name: string) => {
    await broker.remove(name).catch((error: unknown) => {
      if (!(error instanceof NotFoundError)) throw error;
    });
  };
  await Promise.all([...made].filter((name) => name !== base).map(remove));
  if (made.has(base)) await remove(base);
  await broker.cleanup();
}

function figures(times: readonly number[]): { median: number; max: number } {
  const sorted = times.toSorted((one, other) => one - other);
  const middle = sorted.length >> 1;
  const upper = sorted[middle] ?? 0;
  return { median: sorted.length % 2 ? upper : ((sorted[middle - 1] ?? 0) + upper) / 2, max: sorted.at(-1) ?? 0 };
}

function rounded(value: number, digits: number): number {
  return Number(value.toFixed(digits));
}

function report(plan: Plan, times: Times, seconds: number): void {
  const steps = (["prepare", "use", "commit"] as const).map((step) => [step, figures(times[step])] as const);
  const perSecond = plan.count / seconds;
  if (plan.json) {
    const told = steps.map(([step, { median, max }]) => {
      return [`${step}_ms`, { median: rounded(median, 2), max: rounded(max, 2) }] as const;
    });
    const { count: workspaces, callers, base } = plan;
    const line = { workspaces, callers, base, mounted: mounting, ...Object.fromEntries(told) };
    console.log(toJson({ ...line, seconds: rounded(seconds, 2), per_second: rounded(perSecond, 1) }));
    return;
  }
  const how = mounting ? "mounted" : "not mounted (needs root)";
  console.log(`workspaces  ${plan.count} from ${toJson(plan.base)}, ${plan.callers} at a time, ${how}`);
  for (const [step, { median, max }] of steps) {
    console.log(`${step.padEnd(12)}median ${median.toFixed(2)} ms, slowest ${max.toFixed(2)} ms`);
  }
  console.log(`total       ${seconds.toFixed(2)} s, ${perSecond.toFixed(1)} workspaces a second`);
}

async function farm(plan: Plan): Promise<void> {
  await using broker = await connect();
  const times = new Times();
  const made: Made = new Set();
  let seconds: number;
  try {
    if (plan.ownBase) await makeBase(broker, plan, made);
    const begin = performance.now();
    await work(broker, plan, times, made);
    seconds = (performance.now() - begin) / 1000;
    await check(broker, plan);
  } finally {
    if (!plan.keep) await discard(broker, plan, made);
  }
  report(plan, times, seconds);
}

/** What is to be done; undefined where the arguments are wrong, null where help was asked for. */
function read(): Plan | undefined | null {
  try {
    const { values } = parseArgs({
      options: {
        count: { type: "string", default: "100" },
        callers: { type: "string", default: "16" },
        base: { type: "string" },
        prefix: { type: "string" },
        keep: { type: "boolean", default: false },
        json: { type: "boolean", default: false },
        help: { type: "boolean", default: false },
      },
    });
    if (values.help) return null;
    const [count, callers] = [values.count, values.callers].map((value) => (/^[0-9]{1,9}$/.test(value) ? +value : 0));
    if (!count || !callers) return undefined;
    const prefix = values.prefix ?? `farm-${randomBytes(4).toString("hex")}`;
    if (!/^[A-Za-z0-9._-]+$/.test(prefix)) return undefined;
    const base = values.base ?? `${prefix}-base`;
    return { count, callers, prefix, base, ownBase: values.base === undefined, keep: values.keep, json: values.json };
  } catch {
    return undefined;
  }
}

const stop = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"]) {
  process.on(signal, () => {
    stop.abort(new Error(`it was told to stop by ${signal}`));
  });
}

const plan = read();
if (plan === null) {
  console.log(USAGE);
} else if (plan === undefined) {
  console.error(USAGE);
  process.exitCode = 2;
} else {
  try {
    await farm(plan);
  } catch (error) {
    const known = error instanceof SnapbrokerError;
    console.error(`farm: ${known ? error.code : "internal"}: ${(error as Error).message}`);
    process.exitCode = known ? error.exitStatus : 1;
  }
}
