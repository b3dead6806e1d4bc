/** JSON lines in and out, integers exact. */

import { createInterface } from "node:readline";

import { toJson } from "snapbroker";

/** What an integer too large for a number is called on its way through JSON.parse: half a surrogate pair and its digits. */
const MARK = "\uD800";
const STRING_OR_INTEGER = /"(?:[^"\\]|\\.)*"|(?<![\d.eE+-])-?\d{16,}(?![\d.eE])/g;

/** The value of a line; an integer that a number does not hold is a bigint. */
export function parse(line: string): unknown {
  const marked = line.replace(STRING_OR_INTEGER, (found) => (found.startsWith('"') ? found : `"\\ud800${found}"`));
  return JSON.parse(marked, (_, value: unknown) =>
    typeof value === "string" && value.startsWith(MARK) ? BigInt(value.slice(1)) : value,
  );
}

/** Write one line. */
export function write(value: unknown): void {
  process.stdout.write(`${toJson(value)}\n`);
}

/** The lines of stdin. */
export function lines(): AsyncIterable<string> {
  return createInterface({ input: process.stdin, crlfDelay: Infinity });
}
