/** The snapshots that match, page by page, as they are used. */

import { milliseconds, text, texts, whole } from "./arguments.js";
import { Bell, Turns } from "./bell.js";
import type { Connection } from "./connection.js";
import type { Info } from "./contract.js";
import { FailedPreconditionError, UnavailableError } from "./errors.js";
import { Repeats } from "./patience.js";
import { readWalkPage, walk, type WalkPage } from "./protocol.js";
import { checkContinues, PAGES_AT_ONCE, Stream, WALK_PAGE } from "./session.js";
import type { CallOptions, View } from "./view.js";

/** What to walk. */
export interface WalkOptions extends CallOptions {
  /** Those that at least one filter matches (RFC 1, 5.10); all without filters. */
  readonly filters?: readonly string[] | undefined;
  /** Infos asked for in one page, 1 to 10,000; 1,000 where absent. */
  readonly page?: number | undefined;
  /** Begin behind this name. */
  readonly after?: string | undefined;
}

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

/**
 * The snapshots that match, in the order of the bytes of their names: `for await` it, once.
 *
 * A walk is not one picture unless the events above `sequence` are applied to it, in their order.
 */
export class Walk implements AsyncIterableIterator<Info> {
  readonly #view: View;
  readonly #options: WalkOptions;
  readonly #filters: readonly string[];
  readonly #pageSize: number;
  readonly #bell = new Bell();
  readonly #turns = new Turns();
  #after: string;
  #sequence: bigint | undefined;
  #current: Pages<WalkPage> | undefined;
  #infos: readonly Info[] = [];
  #used = 0;
  #closed = false;

  /** @internal */
  constructor(view: View, options: WalkOptions) {
    this.#view = view;
    this.#options = options;
    this.#filters = texts(options.filters ?? [], "filters");
    this.#pageSize = whole(options.page ?? WALK_PAGE, "page");
    this.#after = text(options.after ?? "", "after");
    if (options.timeoutMs !== undefined) milliseconds(options.timeoutMs);
  }

  /** The newest event that the first page has seen; FailedPrecondition before that page has come. */
  get sequence(): bigint {
    if (this.#sequence === undefined) {
      throw new FailedPreconditionError("a walk has no sequence before its first page: iterate, or await first()");
    }
    return this.#sequence;
  }

  /** Wait for the first page; answers `sequence`. */
  async first(): Promise<bigint> {
    if (this.#sequence === undefined) {
      this.#infos = (await this.#nextPage())?.infos ?? [];
      this.#used = 0;
    }
    return this.sequence;
  }

  next(): Promise<IteratorResult<Info, undefined>> {
    if (!this.#turns.busy) {
      const info = this.#infos[this.#used];
      if (info !== undefined) {
        this.#used++;
        return Promise.resolve({ done: false, value: info });
      }
    }
    return this.#turns.take(() => this.#next());
  }

  async #next(): Promise<IteratorResult<Info, undefined>> {
    for (;;) {
      const info = this.#infos[this.#used++];
      if (info !== undefined) return { done: false, value: info };
      const page = await this.#nextPage();
      this.#infos = page?.infos ?? [];
      this.#used = 0;
      if (page === undefined) return { done: true, value: undefined };
    }
  }

  /** The pages themselves, instead of the infos one by one. */
  async *pages(): AsyncGenerator<WalkPage, undefined> {
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

  /** No more pages are wanted. */
  close(): void {
    this.#closed = true;
    this.#current?.close();
    this.#bell.ring();
  }

  return(): Promise<IteratorResult<Info, undefined>> {
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

  /** The next page; where the walk broke off it is asked for behind the last one, as a request is repeated. */
  async #nextPage(): Promise<WalkPage | undefined> {
    const { signal } = this.#options;
    signal?.throwIfAborted();
    const onAbort = () => {
      this.close();
    };
    signal?.addEventListener("abort", onAbort, { once: true });
    try {
      const page = await this.#nextOrAgain();
      signal?.throwIfAborted();
      return page;
    } catch (error) {
      this.close();
      throw error;
    } finally {
      signal?.removeEventListener("abort", onAbort);
    }
  }

  async #nextOrAgain(): Promise<WalkPage | undefined> {
    const { connection } = this.#view;
    const { patience } = connection;
    const deadline = patience.sources.clock() + (this.#options.timeoutMs ?? connection.timeoutMs);
    let repeats: Repeats | undefined;
    while (!this.#closed) {
      try {
        return await this.#pageOrEnd();
      } catch (error) {
        if (!(error instanceof UnavailableError)) throw error;
        if (repeats === undefined && (!this.#current?.sent || patience.ms === 0)) throw error;
        repeats ??= new Repeats(patience, deadline);
        const pause = repeats.pause(error);
        if (pause === undefined) throw error;
        await this.#bell.wait(pause);
      }
      connection.checkOpen();
      this.#current = undefined;
    }
    return undefined;
  }

  async #pageOrEnd(): Promise<WalkPage | undefined> {
    let page = await this.#fromCurrent();
    if (page === undefined && this.#after && !this.#closed) {
      this.#current = undefined;
      page = await this.#fromCurrent();
    }
    if (page === undefined) return undefined;
    checkContinues(page, this.#after);
    this.#after = page.next;
    this.#sequence ??= page.sequence;
    return page;
  }

  /** The next page of the request under way, which is sent where there is none; undefined at its end. */
  async #fromCurrent(): Promise<WalkPage | undefined> {
    const pages = (this.#current ??= await this.#ask());
    while (pages !== undefined) {
      const page = pages.take();
      if (page !== undefined || pages.over || this.#closed) return page;
      await this.#bell.wait();
    }
    return undefined;
  }

  /** Send a request; undefined where the walk was closed meanwhile. */
  async #ask(): Promise<Pages<WalkPage> | undefined> {
    const lane = await this.#view.resolved(this.#options.timeoutMs, this.#options.signal);
    if (this.#closed) return undefined;
    const call = walk(this.#filters, this.#after, this.#pageSize, PAGES_AT_ONCE);
    return new Pages(this.#view.connection, new Stream(lane, call, readWalkPage), this.#bell.ring);
  }
}
