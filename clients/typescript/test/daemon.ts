/** A private snapbrokerd: started as a user starts it, gone without a trace. */

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { connect, type Broker, type ConnectOptions, type Status } from "../src/index.js";
import { snapbrokerd } from "./places.js";

/** On a disk, and short: an ipc path ends at 107 bytes. */
const SCRATCH = "/var/tmp";
/** How long a start may take on a busy machine. */
const READY_MS = 60_000;

export class Daemon {
  readonly place = mkdtempSync(join(SCRATCH, "snb-ts-"));
  readonly endpoint = `ipc://${this.place}/run/router.sock`;
  readonly #names: readonly string[];
  #process: ChildProcess | undefined;

  /** `sections`: what stands in the configuration behind `root` and `runtime`; `names`: its snapshotters. */
  constructor(names: readonly string[], sections = "") {
    this.#names = names;
    const own = names.filter((name) => !sections.includes(`[snapshotters.${name}]`));
    const tables = own.map((name) => `[snapshotters.${name}]\n`).join("");
    const places = `root = "${this.place}/root"\nruntime = "${this.place}/run"\nlog_format = "json"\n`;
    writeFileSync(join(this.place, "config.toml"), places + sections + tables);
  }

  /** Run it; return when every snapshotter is ready. */
  async start(): Promise<this> {
    const log = openSync(join(this.place, "log"), "a");
    const child = spawn(snapbrokerd(), ["--config", join(this.place, "config.toml")], { stdio: ["ignore", log, log] });
    closeSync(log);
    this.#process = child;
    await once(child, "spawn");
    await this.until(({ snapshotters }) => this.#names.every((name) => isReady(snapshotters, name)));
    return this;
  }

  /** Ask for the status until it is as wanted. */
  async until(condition: (status: Status) => boolean): Promise<Status> {
    await using broker = await this.client(this.#names[0] ?? "", { connectTimeoutMs: READY_MS, patienceMs: READY_MS });
    for (const end = performance.now() + READY_MS; performance.now() < end;) {
      if (this.#process?.exitCode !== null) break;
      const status = await broker.status();
      if (condition(status)) return status;
      // Nothing is expected here: it paces the questions.
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    throw new Error(`snapbrokerd is not as wanted:\n${readFileSync(join(this.place, "log"), "utf8")}`);
  }

  /** kill -9, and return when it is dead. */
  async kill(): Promise<void> {
    await this.#end("SIGKILL");
  }

  /** SIGTERM; it must end by itself with status 0. */
  async stop(): Promise<void> {
    const status = await this.#end("SIGTERM");
    if (status !== 0) throw new Error(`snapbrokerd ended with ${String(status)}`);
  }

  async #end(signal: "SIGKILL" | "SIGTERM"): Promise<unknown> {
    const child = this.#process;
    if (child === undefined) return 0;
    this.#process = undefined;
    const exit = once(child, "exit");
    child.kill(signal);
    const [status] = (await exit) as unknown[];
    return status;
  }

  /** The process of one snapshotter. */
  async pid(name: string): Promise<number> {
    const { snapshotters } = await this.until(({ snapshotters }) => isReady(snapshotters, name));
    return snapshotters.find((snapshotter) => snapshotter.name === name)?.pid ?? 0;
  }

  client(snapshotter: string, options: ConnectOptions = {}): Promise<Broker> {
    return connect({ endpoint: this.endpoint, snapshotter, namespace: "default", ...options });
  }

  /** What a program of the client needs to find it. */
  environment(snapshotter: string, namespace = "default"): NodeJS.ProcessEnv {
    return {
      ...process.env,
      SNAPBROKER_ENDPOINT: this.endpoint,
      SNAPBROKER_SNAPSHOTTER: snapshotter,
      SNAPBROKER_NAMESPACE: namespace,
    };
  }

  /** Take away everything that is left of it. */
  async remove(): Promise<void> {
    await this.#end("SIGTERM");
    rmSync(this.place, { recursive: true, force: true });
  }
}

function isReady(snapshotters: Status["snapshotters"], name: string): boolean {
  return snapshotters.some((snapshotter) => snapshotter.name === name && snapshotter.state === "ready");
}
