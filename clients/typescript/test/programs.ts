/** The package's programs, run as a user runs them. */

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { createInterface, type Interface } from "node:readline";

import { home } from "./places.js";

/** A program of `dist` under way, and the lines that it writes. */
export class Program {
  readonly process: ChildProcess;
  readonly lines: string[] = [];
  errors = "";
  #changed: (() => void) | undefined;
  readonly #ended: Promise<unknown[]>;
  readonly #reader: Interface;

  constructor(path: string, words: readonly string[], environment: NodeJS.ProcessEnv) {
    const child = spawn(process.execPath, [join(home, "dist", path), ...words], { env: environment });
    this.process = child;
    this.#ended = once(child, "close");
    child.stderr.on("data", (data: Buffer) => (this.errors += data.toString()));
    this.#reader = createInterface({ input: child.stdout }).on("line", (line) => {
      this.lines.push(line);
      this.#changed?.();
    });
    this.#reader.on("close", () => this.#changed?.());
    child.on("close", () => this.#changed?.());
  }

  /** Return when `condition` holds for what was written; an error where the program ends before. */
  async until(condition: (lines: readonly string[]) => boolean): Promise<void> {
    while (!condition(this.lines)) {
      if (this.process.exitCode !== null) throw new Error(`it ended with ${this.process.exitCode}: ${this.errors}`);
      await new Promise<void>((resolve) => (this.#changed = resolve));
    }
  }

  /** Wait for its end; answers the exit status. */
  async end(signal?: NodeJS.Signals): Promise<unknown> {
    if (signal !== undefined) this.process.kill(signal);
    const [status] = await this.#ended;
    return status;
  }

  [Symbol.dispose](): void {
    this.process.kill("SIGKILL");
  }
}
