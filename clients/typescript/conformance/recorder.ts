/** Keeps a mirror of each namespace named, and writes down what it hears. */

import { connect, type Broker, type Change, type Info, type Mirror } from "snapbroker";

import { write } from "./lines.js";

const END = "conformance-end";
/** A restart of the broker is no end, for as long as this. */
const PATIENCE_MS = 120_000;

process.on("SIGTERM", () => process.exit(0));

function byName(snapshots: ReadonlyMap<string, Info>): Info[] {
  return [...snapshots.values()].sort((one, other) => Buffer.compare(Buffer.from(one.name), Buffer.from(other.name)));
}

/** One namespace: its first state when it is begun, the rest when it is followed. */
class Record {
  readonly #namespace: string;
  readonly #mirror: Mirror;
  readonly #changes: AsyncIterator<Change, undefined>;

  constructor(broker: Broker, namespace: string) {
    this.#namespace = namespace;
    this.#mirror = broker.mirror({ timeoutMs: PATIENCE_MS });
    this.#changes = this.#mirror[Symbol.asyncIterator]();
  }

  /** Take one change; whether there may be more. */
  async step(): Promise<boolean> {
    const { value: change } = await this.#changes.next();
    if (change === undefined) throw new Error(`the mirror of ${this.#namespace} ended`);
    const { snapshots } = this.#mirror;
    const namespace = this.#namespace;
    if (change.type === "walked") write({ namespace, state: byName(snapshots), sequence: change.sequence });
    else write({ namespace, event: change.event });
    if (!snapshots.has(END)) return true;
    write({ namespace, mirror: byName(snapshots), gaps: this.#mirror.gaps });
    this.#mirror.close();
    return false;
  }
}

const namespaces = process.argv.slice(2);
const broker = await connect({ connectTimeoutMs: PATIENCE_MS, patienceMs: PATIENCE_MS, timeoutMs: PATIENCE_MS });
const name = await broker.snapshotterName();
const records = namespaces.map((namespace) => new Record(broker.snapshotter(name, namespace), namespace));

const open: Record[] = [];
for (const record of records) if (await record.step()) open.push(record);
write({ ready: true });
await Promise.all(
  open.map(async (record) => {
    while (await record.step());
  }),
);
await broker.close();
