/** Calls that travel together in one request, in order. */

import * as calls from "./calls.js";
import type { Info, Labels, Mounts, Usage } from "./contract.js";
import { FailedPreconditionError, InvalidArgumentError, type SnapbrokerError } from "./errors.js";
import { CALLS_MAX, readInfo, readMounts, readNothing, readUsage, type Call } from "./protocol.js";
import { Answer, Exchange, firstError, Lane, type Read } from "./session.js";
import type { CallOptions, View } from "./view.js";

/** How a batch is executed. */
export interface BatchOptions extends CallOptions {
  /** All calls take effect, in their order, or none does. */
  readonly atomic?: boolean | undefined;
}

interface Gathered {
  readonly call: Call;
  readonly read: Read<never>;
  readonly answer: Answer<never>;
}

/**
 * Calls that travel together, 1 to 1,024 of them: add them, then `send()` the batch, then look at the answers.
 *
 *     const batch = broker.batch({ atomic: true });
 *     batch.commit("layer-1", "unpack-1");
 *     const job = batch.prepare("job-1", { parent: "layer-1" });
 *     await batch.send();
 *     job.result().mounts;
 */
export class Batch {
  readonly #view: View;
  readonly #options: BatchOptions;
  readonly #gathered: Gathered[] = [];
  #sent = false;
  #refusal: SnapbrokerError | undefined;

  /** @internal */
  constructor(view: View, options: BatchOptions) {
    this.#view = view;
    this.#options = options;
  }

  /** How many calls were added. */
  get length(): number {
    return this.#gathered.length;
  }

  /** Why the batch was refused as a whole, without an outcome for any of its calls; undefined where it was not. */
  get refusal(): SnapbrokerError | undefined {
    return this.#refusal;
  }

  /** An active snapshot; answers its mounts. */
  prepare(key: string, options: calls.CreateOptions = {}): Answer<Mounts> {
    return this.#add(calls.prepare(key, options), readMounts);
  }

  /** A read-only snapshot; answers its mounts. */
  view(key: string, options: calls.CreateOptions = {}): Answer<Mounts> {
    return this.#add(calls.view(key, options), readMounts);
  }

  /** The active `key` becomes the committed `name`. */
  commit(name: string, key: string, options: calls.CommitOptions = {}): Answer<void> {
    return this.#add(calls.commit(name, key, options), readNothing);
  }

  /** The snapshot goes. */
  remove(key: string, options: calls.FenceOptions = {}): Answer<void> {
    return this.#add(calls.remove(key, options), readNothing);
  }

  /** The mounts of an active snapshot or view. */
  mounts(key: string, options: calls.FenceOptions = {}): Answer<Mounts> {
    return this.#add(calls.mounts(key, options), readMounts);
  }

  /** What is known of a snapshot. */
  stat(key: string): Answer<Info> {
    return this.#add(calls.stat(key), readInfo);
  }

  /** Other labels; answers the snapshot with them. */
  update(name: string, labels: Labels, options: calls.UpdateOptions = {}): Answer<Info> {
    return this.#add(calls.update(name, labels, options), readInfo);
  }

  /** What a snapshot takes. */
  usage(key: string): Answer<Usage> {
    return this.#add(calls.usage(key), readUsage);
  }

  /**
   * Send the batch, once, and wait for all its outcomes. Rejects with the error of the first call that failed by itself;
   * without `atomic` the others may have succeeded: look at their answers.
   */
  async send(): Promise<void> {
    if (this.#sent) throw new FailedPreconditionError("the batch was sent: open another one");
    this.#sent = true;
    if (this.#gathered.length === 0) return;
    const { atomic, signal, timeoutMs } = this.#options;
    const lane: Lane = await this.#view.resolved(timeoutMs, signal);
    const exchange = new Exchange(lane, atomic ?? false);
    for (const { call, read, answer } of this.#gathered) exchange.add(call, read, answer);
    await this.#view.connection.run(exchange, signal);
    this.#refusal = exchange.refusal;
    const error = firstError(this.#gathered.map(({ answer }) => answer));
    if (error !== undefined) throw error;
  }

  #add<T>(call: Call, read: Read<T>): Answer<T> {
    if (this.#sent) throw new FailedPreconditionError("the batch was sent: open another one");
    if (this.#gathered.length >= CALLS_MAX) {
      throw new InvalidArgumentError(`a batch has at most ${CALLS_MAX} calls: send what is there first`);
    }
    const answer = new Answer<T>();
    this.#gathered.push({ call, read: read as Read<never>, answer: answer as Answer<never> });
    return answer;
  }
}
