/** The events above a sequence as JSON lines. */

import { parseArgs } from "node:util";

import { connect, OutOfRangeError, SnapbrokerError, toJson, type Broker, type EventsOptions } from "snapbroker";

const USAGE = "usage: tail [--since N] [--follow] [TOPIC...]";

async function print(broker: Broker, options: EventsOptions): Promise<void> {
  for await (const event of broker.events(options)) console.log(toJson(event));
}

async function tail(since: bigint | undefined, options: EventsOptions): Promise<void> {
  await using broker = await connect();
  // A broker that is not there at the start is an error; one that goes away later is waited for.
  await broker.status();
  try {
    await print(broker, { ...options, since: since ?? 0n });
  } catch (error) {
    const oldest =
      error instanceof OutOfRangeError && error.details["since"] === 0n ? error.details["oldest"] : undefined;
    if (since !== undefined || (typeof oldest !== "number" && typeof oldest !== "bigint")) throw error;
    // The journal has forgotten how it began: all that it still has.
    await print(broker, { ...options, since: BigInt(oldest) - 1n });
  }
}

/** The arguments; undefined where they are wrong. */
function read() {
  try {
    const { values, positionals } = parseArgs({
      options: { since: { type: "string" }, follow: { type: "boolean" }, help: { type: "boolean" } },
      allowPositionals: true,
    });
    if (values.since !== undefined && !/^[0-9]{1,19}$/.test(values.since)) return undefined;
    const since = values.since === undefined ? undefined : BigInt(values.since);
    return { since, follow: values.follow ?? false, help: values.help ?? false, topics: positionals };
  } catch {
    return undefined;
  }
}

const stop = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"]) {
  process.on(signal, () => {
    stop.abort();
  });
}

const given = read();
if (given === undefined) {
  console.error(USAGE);
  process.exitCode = 2;
} else if (given.help) {
  console.log(USAGE);
} else {
  try {
    const { since, follow, topics } = given;
    await tail(since, { follow, topics, signal: stop.signal, ...(follow && { timeoutMs: Infinity }) });
  } catch (error) {
    if (!stop.signal.aborted) {
      const known = error instanceof SnapbrokerError;
      console.error(`tail: ${known ? error.code : "internal"}: ${(error as Error).message}`);
      process.exitCode = known ? error.exitStatus : 1;
    }
  }
}
