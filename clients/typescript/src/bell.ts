/** Waiting: a bell that one waits for and many ring, and turns in which what is called at once is done one by one. */

/** Longest time a timer can be set to: 24 days. */
const TIMER_MS_MAX = 2 ** 31 - 1;

export class Bell {
  #wake: (() => void) | undefined;

  /** Return when it is rung, or after `ms`. */
  wait(ms = Infinity): Promise<void> {
    return new Promise((resolve) => {
      const timer = ms <= TIMER_MS_MAX ? setTimeout(this.ring, Math.max(0, ms)) : undefined;
      this.#wake = () => {
        this.#wake = undefined;
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Wake who waits, if somebody does. */
  ring = (): void => {
    this.#wake?.();
  };
}

export class Turns {
  #last: Promise<unknown> = Promise.resolve();
  #waiting = 0;

  /** Whether something is at work. */
  get busy(): boolean {
    return this.#waiting > 0;
  }

  /** Do `work` when what was taken before is done. */
  take<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#waiting++ === 0 ? work() : this.#last.then(work);
    this.#last = done.then(this.#next, this.#next);
    return done;
  }

  readonly #next = (): void => {
    this.#waiting--;
  };
}

/** Let the event loop do whatever else there is, once. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    setImmediate(resolve);
  });
}
