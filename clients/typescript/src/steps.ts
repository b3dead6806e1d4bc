/** What is iterated once, step by step, and may be closed early: the base of walks, audits and events. */

import { Turns } from "./bell.js";

export abstract class Steps<T> implements AsyncIterableIterator<T> {
  /** @internal */
  protected readonly turns = new Turns();
  /** What lies there to be given out, from `used` on. @internal */
  protected ready: readonly T[] = [];
  /** @internal */
  protected used = 0;

  /** The next one, waited for where none lies there; undefined at the end. @internal */
  protected abstract following(): Promise<T | undefined>;

  /** No more is wanted. */
  abstract close(): void;

  next(): Promise<IteratorResult<T, undefined>> {
    if (!this.turns.busy) {
      const value = this.ready[this.used];
      if (value !== undefined) {
        this.used++;
        return Promise.resolve({ done: false, value });
      }
    }
    return this.turns.take(() => this.following().then(step));
  }

  return(): Promise<IteratorResult<T, undefined>> {
    this.close();
    return Promise.resolve({ done: true, value: undefined });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.close();
    return Promise.resolve();
  }
}

function step<T>(value: T | undefined): IteratorResult<T, undefined> {
  return value === undefined ? { done: true, value: undefined } : { done: false, value };
}
