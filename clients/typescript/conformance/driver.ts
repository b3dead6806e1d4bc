/** Calls the broker as the harness tells it: steps on stdin, an answer to each on stdout. */

import { connect, SnapbrokerError, type Answer, type Batch, type Broker } from "snapbroker";

import { lines, parse, write } from "./lines.js";

type Step = Readonly<Record<string, unknown>>;
interface Failure {
  readonly error: unknown;
}
type Result = { readonly ok: unknown } | Failure;

/** The step's fields, each of a type that this program trusts the harness to give; one that is not known ends it. */
class Fields {
  readonly #step: Step;
  readonly #known = new Set(["id", "do", "snapshotter", "namespace", "timeout_ms"]);

  constructor(step: Step) {
    this.#step = step;
  }

  get do(): string {
    return this.#step["do"] as string;
  }

  // eslint-disable-next-line @typescript-eslint/no-unnecessary-type-parameters -- the caller knows what the harness sends
  get<T>(name: string): T {
    this.#known.add(name);
    return this.#step[name] as T;
  }

  check(): void {
    const unknown = Object.keys(this.#step).filter((name) => !this.#known.has(name));
    if (unknown.length > 0) throw new Error(`unknown fields of ${this.do}: ${unknown.join(", ")}`);
  }
}

function failure(error: unknown): Failure {
  if (!(error instanceof SnapbrokerError)) throw error;
  return { error: { code: error.code, details: error.details, in_doubt: error.inDoubt } };
}

async function outcome(work: Promise<unknown>): Promise<Result> {
  try {
    return { ok: (await work) ?? {} };
  } catch (error) {
    return failure(error);
  }
}

let broker = await connect();

async function open(fields: Fields): Promise<void> {
  await broker.close();
  broker = await connect({
    endpoint: fields.get("endpoint"),
    eventsEndpoint: fields.get("events_endpoint"),
    namespace: fields.get("namespace"),
    snapshotter: fields.get("snapshotter"),
    timeoutMs: fields.get("timeout_ms"),
    connectTimeoutMs: fields.get("connect_timeout_ms"),
    patienceMs: fields.get("patience_ms"),
  });
  fields.check();
}

/** The connection's view that a step is for. */
async function viewOf(fields: Fields): Promise<Broker> {
  const snapshotter = fields.get<string | undefined>("snapshotter");
  const namespace = fields.get<string | undefined>("namespace");
  if (snapshotter === undefined && namespace === undefined) return broker;
  return broker.snapshotter(snapshotter ?? (await broker.snapshotterName()), namespace);
}

interface Timeout {
  readonly timeoutMs: number | undefined;
}

/** One call of the verbs that a batch has as well. */
function call(on: Broker | Batch, fields: Fields, timeout: Timeout): Promise<unknown> | Answer<unknown> {
  const key = fields.get<string>("key");
  const name = fields.get<string>("name");
  const parent = fields.get<string>("parent");
  const labels = fields.get<Record<string, string>>("labels");
  const fence = fields.get<bigint | number>("fence");
  const sync = fields.get<boolean>("sync");
  const fieldpaths = fields.get<string[]>("fieldpaths");
  fields.check();
  switch (fields.do) {
    case "prepare":
      return on.prepare(key, { parent, labels, ...timeout });
    case "view":
      return on.view(key, { parent, labels, ...timeout });
    case "commit":
      return on.commit(name, key, { parent, labels, sync, fence, ...timeout });
    case "remove":
      return on.remove(key, { fence, ...timeout });
    case "mounts":
      return on.mounts(key, { fence, ...timeout });
    case "stat":
      return on.stat(key, timeout);
    case "update":
      return on.update(name, labels, { fieldpaths, ...timeout });
    case "usage":
      return on.usage(key, timeout);
    default:
      throw new Error(`unknown step ${fields.do}`);
  }
}

async function batch(view: Broker, fields: Fields, timeout: Timeout): Promise<unknown> {
  const calls = fields.get<Step[]>("calls");
  const gathered = view.batch({ atomic: fields.get("atomic"), ...timeout });
  fields.check();
  const answers = calls.map((step) => call(gathered, new Fields(step), timeout) as Answer<unknown>);
  try {
    await gathered.send();
  } catch (error) {
    if (gathered.refusal !== undefined || answers.every((answer) => !answer.settled)) throw error;
  }
  return {
    results: answers.map((answer) =>
      answer.error === undefined ? { ok: answer.result() ?? {} } : failure(answer.error),
    ),
  };
}

async function together(view: Broker, fields: Fields, timeout: Timeout): Promise<unknown> {
  const calls = fields.get<Step[]>("calls");
  fields.check();
  const made = calls.map((step) => outcome(call(view, new Fields(step), timeout) as Promise<unknown>));
  return { results: await Promise.all(made) };
}

async function churn(view: Broker, fields: Fields, timeout: Timeout): Promise<unknown> {
  const prefix = fields.get<string>("prefix");
  const parent = fields.get<string>("parent");
  const count = fields.get<number>("count");
  const callers = fields.get<number>("callers");
  fields.check();
  let next = 0;
  let answered = 0;
  const caller = async () => {
    while (next < count) {
      const index = next++;
      const key = `${prefix}-${index}`;
      const { fence } = await view.prepare(key, { parent, ...timeout });
      answered++;
      if (index % 3 === 0) {
        await view.remove(key, { fence, ...timeout });
        answered++;
        continue;
      }
      await view.commit(`${key}-made`, key, { fence, ...timeout });
      answered++;
      if (index % 3 === 2) {
        await view.remove(`${key}-made`, timeout);
        answered++;
      }
    }
  };
  const ends = await Promise.allSettled(Array.from({ length: callers }, caller));
  for (const end of ends) if (end.status === "rejected") throw end.reason;
  return { calls: answered };
}

async function walk(view: Broker, fields: Fields, timeout: Timeout): Promise<unknown> {
  const walked = view.walk({ filters: fields.get("filters"), page: fields.get("page"), ...timeout });
  fields.check();
  const infos = [];
  for await (const info of walked) infos.push(info);
  return { infos, sequence: walked.sequence };
}

async function events(view: Broker, fields: Fields, timeout: Timeout): Promise<unknown> {
  const count = fields.get<number | undefined>("count");
  const since = fields.get<bigint | number>("since");
  const stream = view.events({ since, topics: fields.get("topics"), follow: count !== undefined, ...timeout });
  fields.check();
  const found = [];
  if (count !== 0) {
    for await (const event of stream) {
      found.push(event);
      if (found.length === count) break;
    }
  }
  return { events: found };
}

async function status(view: Broker, timeout: Timeout): Promise<unknown> {
  const names = (await view.status(timeout)).snapshotters.map(({ name }) => name);
  return { snapshotters: names.sort((one, other) => Buffer.compare(Buffer.from(one), Buffer.from(other))) };
}

async function execute(fields: Fields): Promise<unknown> {
  if (fields.do === "open") return open(fields);
  const timeout = { timeoutMs: fields.get<number | undefined>("timeout_ms") };
  const view = await viewOf(fields);
  switch (fields.do) {
    case "walk":
      return walk(view, fields, timeout);
    case "events":
      return events(view, fields, timeout);
    case "batch":
      return batch(view, fields, timeout);
    case "together":
      return together(view, fields, timeout);
    case "churn":
      return churn(view, fields, timeout);
    case "status":
      fields.check();
      return status(view, timeout);
    case "cleanup":
      fields.check();
      return view.cleanup(timeout);
    default:
      return call(view, fields, timeout);
  }
}

write({ ready: "typescript" });
for await (const line of lines()) {
  const step = parse(line) as Step;
  write({ id: step["id"], ...(await outcome(execute(new Fields(step)))) });
}
await broker.close();
