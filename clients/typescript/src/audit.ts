/** The findings of an audit or a repair, page by page, as they are used. */

import { flag, milliseconds, whole } from "./arguments.js";
import { Bell, Turns } from "./bell.js";
import type { Finding, Progress } from "./contract.js";
import { audit, readAuditPage, repair, type AuditPage } from "./protocol.js";
import { AUDIT_MS, PAGES_AT_ONCE, Stream, WALK_PAGE } from "./session.js";
import type { CallOptions, View } from "./view.js";
import { Pages } from "./walk.js";

/** How to audit. `timeoutMs` is an hour where absent: all there is has to be read. */
export interface AuditOptions extends CallOptions {
  /** Told how much was looked at, now and then. */
  readonly onProgress?: ((progress: Progress) => void) | undefined;
  /** Findings asked for in one page, 1 to 10,000; 1,000 where absent. */
  readonly page?: number | undefined;
}

/** How to repair. */
export interface RepairOptions extends AuditOptions {
  /** Mend it; where absent or false the findings only say what would be done. */
  readonly execute?: boolean | undefined;
}

/**
 * The findings, in the order in which they are made: `for await` it, once.
 *
 * It is not repeated by itself: where it breaks off, a repair has mended what it told.
 */
export class Audit implements AsyncIterableIterator<Finding> {
  readonly #view: View;
  readonly #options: AuditOptions;
  readonly #execute: boolean | undefined;
  readonly #pageSize: number;
  readonly #timeoutMs: number;
  readonly #bell = new Bell();
  readonly #turns = new Turns();
  #after = "";
  #looked = 0;
  #current: Pages<AuditPage> | undefined;
  #findings: readonly Finding[] = [];
  #used = 0;
  #closed = false;

  /** `execute`: undefined for an audit. @internal */
  constructor(view: View, execute: boolean | undefined, options: AuditOptions) {
    this.#view = view;
    this.#options = options;
    this.#execute = execute === undefined ? undefined : flag(execute, "execute");
    this.#pageSize = whole(options.page ?? WALK_PAGE, "page");
    this.#timeoutMs = milliseconds(options.timeoutMs ?? AUDIT_MS);
  }

  /** How many records, directories, index entries, events and mounts were looked at, as far as known. */
  get looked(): number {
    return this.#looked;
  }

  next(): Promise<IteratorResult<Finding, undefined>> {
    return this.#turns.take(async () => {
      for (;;) {
        const finding = this.#findings[this.#used++];
        if (finding !== undefined) return { done: false, value: finding };
        const page = await this.#nextPage();
        this.#findings = page?.findings ?? [];
        this.#used = 0;
        if (page === undefined) return { done: true, value: undefined };
      }
    });
  }

  /** The pages themselves, instead of the findings one by one. */
  async *pages(): AsyncGenerator<AuditPage, undefined> {
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

  /** No more findings are wanted: the audit ends. */
  close(): void {
    this.#closed = true;
    this.#current?.close();
    this.#bell.ring();
  }

  return(): Promise<IteratorResult<Finding, undefined>> {
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

  async #nextPage(): Promise<AuditPage | undefined> {
    const { signal } = this.#options;
    signal?.throwIfAborted();
    const onAbort = () => {
      this.close();
    };
    signal?.addEventListener("abort", onAbort, { once: true });
    try {
      const page = await this.#pageOrEnd();
      signal?.throwIfAborted();
      return page;
    } catch (error) {
      this.close();
      throw error;
    } finally {
      signal?.removeEventListener("abort", onAbort);
    }
  }

  async #pageOrEnd(): Promise<AuditPage | undefined> {
    let page = await this.#fromCurrent();
    if (page === undefined && this.#after && !this.#closed) {
      this.#current = undefined;
      page = await this.#fromCurrent();
    }
    if (page !== undefined) {
      this.#after = page.next;
      this.#looked = page.looked;
    }
    return page;
  }

  /** The next page of the request under way, which is sent where there is none; undefined at its end. */
  async #fromCurrent(): Promise<AuditPage | undefined> {
    const pages = (this.#current ??= await this.#ask());
    while (pages !== undefined) {
      const page = pages.take();
      if (page !== undefined || pages.over || this.#closed) return page;
      await this.#bell.wait();
    }
    return undefined;
  }

  /** Send a request; undefined where the audit was closed meanwhile. */
  async #ask(): Promise<Pages<AuditPage> | undefined> {
    const lane = await this.#view.resolved(this.#timeoutMs, this.#options.signal);
    if (this.#closed) return undefined;
    const [after, size] = [this.#after, this.#pageSize];
    const call =
      this.#execute === undefined
        ? audit(after, size, PAGES_AT_ONCE)
        : repair(this.#execute, after, size, PAGES_AT_ONCE);
    return new Pages(
      this.#view.connection,
      new Stream(lane, call, readAuditPage, this.#options.onProgress),
      this.#bell.ring,
    );
  }
}
