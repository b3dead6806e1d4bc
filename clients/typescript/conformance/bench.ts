/** Measures the client: one figure, as the harness asks. */

import { parseArgs } from "node:util";

import { connect, type Broker } from "snapbroker";

import { write } from "./lines.js";

const KEY = "bench";
const END = "bench-end";
const SILENCE_MS = 60_000;

const { values } = parseArgs({
  options: {
    endpoint: { type: "string", default: "" },
    "events-endpoint": { type: "string", default: "" },
    snapshotter: { type: "string", default: "" },
    namespace: { type: "string", default: "" },
    work: { type: "string", default: "" },
    seconds: { type: "string", default: "" },
    callers: { type: "string", default: "" },
  },
});
const durationMs = Number(values.seconds) * 1000;

/** Call as long as `until` is not reached; answers the milliseconds of each call. */
async function caller(broker: Broker, until: number): Promise<number[]> {
  const times: number[] = [];
  let now = performance.now();
  while (now < until) {
    const begin = now;
    await broker.stat(KEY);
    now = performance.now();
    times.push(now - begin);
  }
  return times;
}

async function latency(broker: Broker): Promise<object> {
  await caller(broker, performance.now() + durationMs / 10);
  const begin = performance.now();
  const times = await caller(broker, begin + durationMs);
  const seconds = (performance.now() - begin) / 1000;
  times.sort((one, other) => one - other);
  const at = (part: number) => times[Math.min(times.length - 1, Math.floor(times.length * part))];
  return { calls: times.length, seconds, p50_ms: at(0.5), p99_ms: at(0.99) };
}

async function throughput(broker: Broker): Promise<object> {
  const callers = Number(values.callers);
  const warm = performance.now() + durationMs / 10;
  const until = warm + durationMs;
  let calls = 0;
  let last = 0;
  await Promise.all(
    Array.from({ length: callers }, async () => {
      for (let now = 0; now < until;) {
        await broker.stat(KEY);
        now = performance.now();
        if (now >= warm) {
          calls++;
          last = now;
        }
      }
    }),
  );
  const seconds = (last - warm) / 1000;
  return { calls, seconds, per_second: calls / seconds };
}

async function events(broker: Broker): Promise<object> {
  const stream = broker.events();
  await stream.start();
  write({ ready: true });
  let count = 0;
  let begin = 0;
  let seen = 0;
  const watchdog = setInterval(() => {
    if (count === seen) {
      console.error(`no event within ${SILENCE_MS} ms`);
      process.exit(1);
    }
    seen = count;
  }, SILENCE_MS);
  for await (const event of stream) {
    if (count++ === 0) begin = performance.now();
    if (event.key === END) break;
  }
  const seconds = (performance.now() - begin) / 1000;
  clearInterval(watchdog);
  return { events: count, seconds, per_second: count / seconds, gaps: stream.statistics().gaps };
}

const WORKS: Readonly<Record<string, (broker: Broker) => Promise<object>>> = { latency, throughput, events };
const work = WORKS[values.work];
if (work === undefined) throw new Error(`unknown work ${values.work}`);
await using broker = await connect({
  endpoint: values.endpoint,
  eventsEndpoint: values["events-endpoint"],
  snapshotter: values.snapshotter,
  namespace: values.namespace,
});
write({ work: values.work, ...(await work(broker)) });
