/** JSON with integers of 64 bits: text that `JSON.stringify` cannot write and `JSON.parse` would round. */

/** `value` as JSON text without spaces; a bigint is a number, undefined is null. */
export function toJson(value: unknown): string {
  if (value === undefined || value === null) return "null";
  if (typeof value === "bigint") return value.toString();
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(toJson).join(",")}]`;
  const members = Object.entries(value).map(([key, member]) => `${JSON.stringify(key)}:${toJson(member)}`);
  return `{${members.join(",")}}`;
}
