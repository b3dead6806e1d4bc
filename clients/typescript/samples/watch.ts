/** A live mirror of what exists in the namespace, printed as it changes. */

import { connect, SnapbrokerError, toJson, type Info, type SnapshotEvent } from "snapbroker";

const USAGE = "usage: watch";

/** `committed "layer-1" on "base"` */
function described({ kind, name, parent }: Info): string {
  return `${kind} ${toJson(name)}${parent && ` on ${toJson(parent)}`}`;
}

/** Names are ordered by their bytes, not by UTF-16 as JavaScript does. */
function byBytes(one: string, other: string): number {
  return Buffer.compare(Buffer.from(one), Buffer.from(other));
}

function labels(info: Info): string {
  return toJson(Object.fromEntries(Object.entries(info.labels).sort(([one], [other]) => byBytes(one, other))));
}

/** The line for an event; none for a cleanup. */
function line({ verb, key, info }: SnapshotEvent): string[] {
  if (verb === "remove") return [`- ${toJson(key)}`];
  if (info === undefined) return [];
  if (verb === "commit") return [`> ${described(info)} from ${toJson(key)}`];
  if (verb === "update") return [`~ ${described(info)} ${labels(info)}`];
  return [`+ ${described(info)}`];
}

/** The lines that make one picture of another. */
function differences(before: ReadonlyMap<string, Info>, after: ReadonlyMap<string, Info>): string[] {
  const names = [...new Set([...before.keys(), ...after.keys()])].sort(byBytes);
  const gone: string[] = [];
  const come: string[] = [];
  const changed: string[] = [];
  for (const name of names) {
    const [old, current] = [before.get(name), after.get(name)];
    if (current === undefined) gone.push(`- ${toJson(name)}`);
    else if (old === undefined) come.push(`+ ${described(current)}`);
    else if (described(old) !== described(current) || labels(old) !== labels(current)) {
      changed.push(`~ ${described(current)} ${labels(current)}`);
    }
  }
  return [...gone, ...come, ...changed];
}

async function watch(signal: AbortSignal): Promise<void> {
  await using broker = await connect();
  const mirror = broker.mirror({ signal, timeoutMs: Infinity });
  let first = true;
  for await (const change of mirror) {
    if (change.type === "changed") {
      for (const text of line(change.event)) console.log(text);
      continue;
    }
    const { snapshots } = mirror;
    if (first) for (const info of snapshots.values()) console.log(`= ${described(info)}`);
    else for (const text of differences(change.before, snapshots)) console.log(text);
    console.log(`-- ${snapshots.size} snapshots at ${change.sequence.toString()}`);
    first = false;
  }
}

const stop = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"]) {
  process.on(signal, () => {
    stop.abort();
  });
}

const [argument] = process.argv.slice(2);
if (argument === "--help") {
  console.log(USAGE);
} else if (argument !== undefined) {
  console.error(USAGE);
  process.exitCode = 2;
} else {
  try {
    await watch(stop.signal);
  } catch (error) {
    if (!stop.signal.aborted) {
      const known = error instanceof SnapbrokerError;
      console.error(`watch: ${known ? error.code : "internal"}: ${(error as Error).message}`);
      process.exitCode = known ? error.exitStatus : 1;
    }
  }
}
