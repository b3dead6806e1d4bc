/** The snapshots that match, page by page, as they are used. */

import { milliseconds, text, texts, whole } from "./arguments.js";
import type { Info } from "./contract.js";
import { FailedPreconditionError, UnavailableError } from "./errors.js";
import { Paged } from "./pages.js";
import { Repeats } from "./patience.js";
import { readWalkPage, walk, type WalkPage } from "./protocol.js";
import { checkContinues, type Lane, PAGES_AT_ONCE, Stream, WALK_PAGE } from "./session.js";
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

/**
 * The snapshots that match, in the order of the bytes of their names: `for await` it, once.
 *
 * A walk is not one picture unless the events above `sequence` are applied to it, in their order.
 */
export class Walk extends Paged<WalkPage, Info> {
  readonly #filters: readonly string[];
  readonly #pageSize: number;
  #sequence: bigint | undefined;

  /** @internal */
  constructor(view: View, options: WalkOptions) {
    super(view, options.timeoutMs === undefined ? undefined : milliseconds(options.timeoutMs), options.signal);
    this.#filters = texts(options.filters ?? [], "filters");
    this.#pageSize = whole(options.page ?? WALK_PAGE, "page");
    this.after = text(options.after ?? "", "after");
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
    if (this.#sequence === undefined) await this.fetch();
    return this.sequence;
  }

  protected stream(lane: Lane): Stream<WalkPage> {
    return new Stream(lane, walk(this.#filters, this.after, this.#pageSize, PAGES_AT_ONCE), readWalkPage);
  }

  protected itemsOf(page: WalkPage): readonly Info[] {
    return page.infos;
  }

  protected came(page: WalkPage): void {
    checkContinues(page, this.after);
    this.after = page.next;
    this.#sequence ??= page.sequence;
  }

  /** Where the walk broke off it is asked for behind the last page, as a request is repeated. */
  protected override async pageOrEnd(): Promise<WalkPage | undefined> {
    const { connection } = this.view;
    const { patience } = connection;
    const deadline = patience.sources.clock() + (this.timeoutMs ?? connection.timeoutMs);
    let repeats: Repeats | undefined;
    while (!this.closed) {
      try {
        return await this.nextOfRequest();
      } catch (error) {
        if (!(error instanceof UnavailableError)) throw error;
        if (repeats === undefined && (!this.current?.sent || patience.ms === 0)) throw error;
        repeats ??= new Repeats(patience, deadline);
        const pause = repeats.pause(error);
        if (pause === undefined) throw error;
        await this.bell.wait(pause);
      }
      connection.checkOpen();
      this.current = undefined;
    }
    return undefined;
  }
}
