/** The findings of an audit or a repair, page by page, as they are used. */

import { flag, milliseconds, whole } from "./arguments.js";
import type { Finding, Progress } from "./contract.js";
import { Paged } from "./pages.js";
import { audit, readAuditPage, repair, type AuditPage } from "./protocol.js";
import { AUDIT_MS, type Lane, PAGES_AT_ONCE, Stream, WALK_PAGE } from "./session.js";
import type { CallOptions, View } from "./view.js";

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
export class Audit extends Paged<AuditPage, Finding> {
  readonly #execute: boolean | undefined;
  readonly #pageSize: number;
  readonly #onProgress: ((progress: Progress) => void) | undefined;
  #looked = 0;

  /** `execute`: undefined for an audit. @internal */
  constructor(view: View, execute: boolean | undefined, options: AuditOptions) {
    super(view, milliseconds(options.timeoutMs ?? AUDIT_MS), options.signal);
    this.#execute = execute === undefined ? undefined : flag(execute, "execute");
    this.#pageSize = whole(options.page ?? WALK_PAGE, "page");
    this.#onProgress = options.onProgress;
  }

  /** How many records, directories, index entries, events and mounts were looked at, as far as known. */
  get looked(): number {
    return this.#looked;
  }

  protected stream(lane: Lane): Stream<AuditPage> {
    const [after, size] = [this.after, this.#pageSize];
    const call =
      this.#execute === undefined
        ? audit(after, size, PAGES_AT_ONCE)
        : repair(this.#execute, after, size, PAGES_AT_ONCE);
    return new Stream(lane, call, readAuditPage, this.#onProgress);
  }

  protected itemsOf(page: AuditPage): readonly Finding[] {
    return page.findings;
  }

  protected came(page: AuditPage): void {
    this.after = page.next;
    this.#looked = page.looked;
  }
}
