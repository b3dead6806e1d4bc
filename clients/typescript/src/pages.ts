/** What comes page by page, as it is used: the base of walks and audits. */

import { Bell } from "./bell.js";
import type { Connection } from "./connection.js";
import type { Lane, Stream } from "./session.js";
import { Steps } from "./steps.js";
import type { View } from "./view.js";

/** The pages of one request; closing it early tells the broker. */
export class Pages<T> {
  readonly #connection: Connection;
  readonly #stream: Stream<T>;

  /** `wake` is called whenever something has come. */
  constructor(connection: Connection, stream: Stream<T>, wake: () => void) {
    connection.checkOpen();
    this.#connection = connection;
    this.#stream = stream;
    stream.wake = wake;
    // What was called before in this turn goes first.
    connection.flush();
    connection.launch(stream);
  }

  /** Whether the broker was there to be asked. */
  get sent(): boolean {
    return this.#stream.sent;
  }

  /** Whether nothing more will come. */
  get over(): boolean {
    return this.#stream.over;
  }

  /** The next page; undefined where it has not come or there is none, and then the stream's error is thrown. */
  take(): T | undefined {
    return this.#stream.take();
  }

  /** Pages still to come are not wanted. */
  close(): void {
    this.#stream.giveUp();
    if (!this.#connection.closed) this.#connection.takeBackIfForsaken(this.#stream);
  }
}

/** What lies in the pages, one by one: `for await` it, once. */
export abstract class Paged<Page, Item> extends Steps<Item> {
  /** @internal */
  protected readonly view: View;
  /** @internal */
  protected readonly bell = new Bell();
  /** Where the next request begins; "" is the beginning, and after a page the end. @internal */
  protected after = "";
  /** @internal */
  protected current: Pages<Page> | undefined;
  /** @internal */
  protected closed = false;
  /** @internal */
  protected readonly timeoutMs: number | undefined;
  readonly #signal: AbortSignal | undefined;

  /** `timeoutMs`: the view's where absent. @internal */
  protected constructor(view: View, timeoutMs: number | undefined, signal: AbortSignal | undefined) {
    super();
    this.view = view;
    this.timeoutMs = timeoutMs;
    this.#signal = signal;
  }

  /** The request for the pages behind `after`. @internal */
  protected abstract stream(lane: Lane): Stream<Page>;

  /** What lies in a page. @internal */
  protected abstract itemsOf(page: Page): readonly Item[];

  /** A page has come: where to go on. @internal */
  protected abstract came(page: Page): void;

  /** The next page, however often it has to be asked for; undefined at the end. @internal */
  protected pageOrEnd(): Promise<Page | undefined> {
    return this.nextOfRequest();
  }

  protected async following(): Promise<Item | undefined> {
    for (;;) {
      const item = this.ready[this.used++];
      if (item !== undefined || !(await this.fetch())) return item;
    }
  }

  /** Have the next page's items for `next`; whether there was one. @internal */
  protected async fetch(): Promise<boolean> {
    const page = await this.#nextPage();
    this.ready = page === undefined ? [] : this.itemsOf(page);
    this.used = 0;
    return page !== undefined;
  }

  /** The pages themselves, instead of what lies in them one by one. */
  async *pages(): AsyncGenerator<Page, undefined> {
    try {
      for (;;) {
        const page = await this.#nextPage();
        if (page === undefined) return;
        yield page;
      }
    } finally {
      this.close();
    }
  }

  /** No more is wanted. */
  close(): void {
    this.closed = true;
    this.current?.close();
    this.bell.ring();
  }

  async #nextPage(): Promise<Page | undefined> {
    const signal = this.#signal;
    signal?.throwIfAborted();
    const onAbort = () => {
      this.close();
    };
    signal?.addEventListener("abort", onAbort, { once: true });
    try {
      const page = await this.pageOrEnd();
      signal?.throwIfAborted();
      return page;
    } catch (error) {
      this.close();
      throw error;
    } finally {
      signal?.removeEventListener("abort", onAbort);
    }
  }

  /** The next page of this request or, where it is over before everything was told, of the next. @internal */
  protected async nextOfRequest(): Promise<Page | undefined> {
    let page = await this.#fromCurrent();
    if (page === undefined && this.after && !this.closed) {
      this.current = undefined;
      page = await this.#fromCurrent();
    }
    if (page !== undefined) this.came(page);
    return page;
  }

  /** The next page of the request under way, which is sent where there is none; undefined at its end. */
  async #fromCurrent(): Promise<Page | undefined> {
    const pages = (this.current ??= await this.#ask());
    while (pages !== undefined) {
      const page = pages.take();
      if (page !== undefined || pages.over || this.closed) return page;
      await this.bell.wait();
    }
    return undefined;
  }

  /** Send a request; undefined where no more was wanted meanwhile. */
  async #ask(): Promise<Pages<Page> | undefined> {
    const lane = await this.view.resolved(this.timeoutMs, this.#signal);
    return this.closed ? undefined : new Pages(this.view.connection, this.stream(lane), this.bell.ring);
  }
}
