/**
 * The arguments of callers, looked at before they are sent.
 *
 * A wrong type, or text that is none, is found here: at the broker it would spoil the whole request, in which other
 * callers' calls travel too.
 */

import { SEQUENCE_MAX, type Labels } from "./contract.js";
import { DeadlineExceededError, InvalidArgumentError } from "./errors.js";
import { integer, type WireInteger } from "./msgpack.js";

/** `value` if it is text that can be sent; InvalidArgument else. */
export function text(value: unknown, what = "key"): string {
  if (typeof value !== "string") throw new InvalidArgumentError(`${what} must be a string, not ${kindOf(value)}`);
  if (!value.isWellFormed()) throw new InvalidArgumentError(`${what} is not text: it holds a lone surrogate`);
  return value;
}

/** `values` if it is a list of text; a single string is a mistake. */
export function texts(values: unknown, what: string): readonly string[] {
  if (!Array.isArray(values))
    throw new InvalidArgumentError(`${what} must be a list of strings, not ${kindOf(values)}`);
  return values.map((value) => text(value, what));
}

const NO_LABELS: Labels = Object.freeze({});

/** A copy of `labels`, all text. */
export function labelMap(labels: unknown): Labels {
  if (labels === undefined) return NO_LABELS;
  if (typeof labels !== "object" || labels === null || Array.isArray(labels)) {
    throw new InvalidArgumentError(`labels must be an object of strings, not ${kindOf(labels)}`);
  }
  const entries = Object.entries(labels).map(
    ([key, value]) => [text(key, "a label's key"), text(value, `label '${key}'`)] as const,
  );
  return Object.fromEntries(entries);
}

/** `value` if it can be a fencing number, 0 for any. */
export function fenceNumber(value: unknown): WireInteger {
  if (value === undefined) return 0;
  if (typeof value === "bigint" || (typeof value === "number" && Number.isSafeInteger(value))) {
    if (0 <= value && value <= SEQUENCE_MAX) return integer(value);
  }
  throw new InvalidArgumentError(`fence must be the number that prepare or view answered, or 0, not ${shown(value)}`);
}

/** `value` if it can be a sequence. */
export function sequenceNumber(value: unknown, what: string): bigint {
  if (typeof value === "bigint" || (typeof value === "number" && Number.isSafeInteger(value))) {
    if (0 <= value && value <= SEQUENCE_MAX) return BigInt(value);
  }
  throw new InvalidArgumentError(`${what} must be a sequence, 0n to 2n**63n-1n, not ${shown(value)}`);
}

/** `value` if it is an integer; the broker says which it allows. */
export function whole(value: unknown, what: string): number {
  if (Number.isSafeInteger(value)) return value as number;
  throw new InvalidArgumentError(`${what} must be an integer, not ${shown(value)}`);
}

/** `timeoutMs` if it can be waited for; DeadlineExceeded where it is over. */
export function milliseconds(timeoutMs: unknown, what = "timeoutMs"): number {
  if (typeof timeoutMs !== "number" || Number.isNaN(timeoutMs)) {
    throw new InvalidArgumentError(`${what} must be a number of milliseconds, not ${shown(timeoutMs)}`);
  }
  if (timeoutMs <= 0) {
    throw new DeadlineExceededError(`no time was left for the call (${what} ${timeoutMs}): it was not sent`);
  }
  return timeoutMs;
}

/** `value` if it is a boolean. */
export function flag(value: unknown, what: string): boolean {
  if (typeof value === "boolean") return value;
  throw new InvalidArgumentError(`${what} must be a boolean, not ${kindOf(value)}`);
}

function shown(value: unknown): string {
  return typeof value === "number" || typeof value === "bigint" ? value.toString() : kindOf(value);
}

function kindOf(value: unknown): string {
  return value === null ? "null" : Array.isArray(value) ? "an array" : typeof value;
}
