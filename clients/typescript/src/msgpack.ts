/**
 * MessagePack as the wire wants it: integers in their shortest form, 64 bits without loss, text that is text.
 *
 * The library is `@msgpack/msgpack`. What it leaves to its user is done here. A bigint is written in nine bytes whatever its
 * value, and a number above 2^32 as a float: `integer` chooses the type by the value. A float is decoded as a number like an
 * integer, and text without looking whether it is UTF-8: `prepared` makes other things of them before, which are malformed
 * where an integer or text is asked for, and ignored in a field that nobody knows. And a map's key `__proto__`, a legal label, is refused, and one that is no text as well: they
 * travel through the decoder under names which no text can have.
 */

import { isUtf8 } from "node:buffer";

import { Decoder, Encoder, ExtData, type DecoderOptions } from "@msgpack/msgpack";

import { InternalError } from "./errors.js";

/** An integer as the encoder writes it shortest: a number below 2^32, a bigint above. */
export type WireInteger = number | bigint;

const UINT32_END = 2n ** 32n;
const INT32_BEGIN = -(2n ** 31n);

/** `value` in the type that is written shortest. */
export function integer(value: bigint | number): WireInteger {
  const large = BigInt(value);
  return INT32_BEGIN <= large && large < UINT32_END ? Number(large) : large;
}

/** Most levels of nesting in what is written (RFC 1, section 4). */
const DEPTH_MAX = 32;
/** Longest array or map that is read: what a body of 16 MiB holds, without believing a length that it does not. */
const ENTRIES_MAX = 2 ** 20;

const encoder = new Encoder({ useBigInt64: true, maxDepth: DEPTH_MAX });

/** The body that `message`, a tree of plain values, is sent as. */
export function encode(message: unknown): Uint8Array {
  return encoder.encode(message);
}

/** What the key `__proto__` is called between decoder and reader; half a surrogate pair is in no UTF-8. */
export const PROTO = "\uD800__proto__";
/** What a key that is no text is called. */
export const ODD = "\uD801";

type KeyDecoder = NonNullable<DecoderOptions["keyDecoder"]>;

/** The names of fields are few: they are remembered by length, so that none is decoded twice. */
class FieldNames implements KeyDecoder {
  static readonly LENGTH_MAX = 16;
  static readonly PER_LENGTH_MAX = 24;
  readonly #known: { bytes: Uint8Array; text: string }[][] = [];

  canBeCached(length: number): boolean {
    return length <= FieldNames.LENGTH_MAX;
  }

  decode(bytes: Uint8Array, offset: number, length: number): string {
    const known = (this.#known[length] ??= []);
    next: for (const name of known) {
      for (let index = 0; index < length; index++) {
        if (name.bytes[index] !== bytes[offset + index]) continue next;
      }
      return name.text;
    }
    const own = Uint8Array.prototype.slice.call(bytes, offset, offset + length);
    let text = Buffer.from(own.buffer, own.byteOffset, length).toString();
    if (text === "__proto__") text = PROTO;
    // Labels have names of every kind; the first ones are those of the fields, and stay.
    if (known.length < FieldNames.PER_LENGTH_MAX) known.push({ bytes: own, text });
    return text;
  }
}

/** A float: not an integer, whatever its value. */
export class Float {
  constructor(readonly value: number) {}
}

const decoder = new Decoder({
  useBigInt64: true,
  keyDecoder: new FieldNames(),
  mapKeyConverter: (key) => (typeof key === "string" ? key : ODD),
  // No field has a value of an extension type. A float comes as one, see `prepared`.
  extensionCodec: {
    tryToEncode: () => null,
    decode: (data, type) => (type === FLOAT ? new Float(floatIn(data)) : new ExtData(type, data)),
  },
  maxArrayLength: ENTRIES_MAX,
  maxMapLength: ENTRIES_MAX,
});

/** The one value that `body` is; an exception of any kind where it is none. */
export function decode(body: Uint8Array): unknown {
  return decoder.decode(prepared(body));
}

/**
 * The body as the decoder is given it: with a `bin` in place of every text that is not UTF-8, and an extension type in
 * place of every float. Mostly there is neither, and it is the body itself.
 *
 * Maps and arrays stand before what is in them, so one pass over the bytes meets every value without keeping count.
 */
function prepared(body: Uint8Array): Uint8Array {
  const end = body.length;
  const parts: Uint8Array[] = [];
  let copied = 0;
  let at = 0;
  while (at < end) {
    const start = at;
    const head = body[at++] ?? 0;
    let length = 0;
    let text = false;
    if (head >= 0xa0 && head < 0xc0) {
      length = head - 0xa0;
      text = true;
    } else if (head >= 0xc4 && head <= 0xdb) {
      const form = FORMS[head - 0xc4] ?? NO_FORM;
      for (let size = form.size; size > 0; size--) length = length * 256 + (body[at++] ?? 0);
      length += form.more;
      text = form.text;
    } else if (head >= 0xdc && head <= 0xdf) {
      length = head & 1 ? 4 : 2;
    }
    const content = at;
    at = Math.min(at + length, end);
    let instead = 0;
    if (text) {
      for (let index = content; index < at; index++) {
        if ((body[index] ?? 0) < 0x80) continue;
        if (!isUtf8(body.subarray(content, at))) instead = BIN_32;
        break;
      }
    } else if (head === 0xca || head === 0xcb) {
      instead = EXT_32;
    }
    if (instead !== 0) {
      parts.push(body.subarray(copied, start), headOf(instead, at - content), body.subarray(content, at));
      copied = at;
    }
  }
  return parts.length === 0 ? body : Buffer.concat([...parts, body.subarray(copied)]);
}

const BIN_32 = 0xc6;
const EXT_32 = 0xc9;
/** The extension type that a float comes as. */
const FLOAT = 0x7f;

function headOf(head: number, length: number): Buffer {
  const bytes = Buffer.of(head, 0, 0, 0, 0, ...(head === EXT_32 ? [FLOAT] : []));
  bytes.writeUInt32BE(length, 1);
  return bytes;
}

function floatIn(data: Uint8Array): number {
  const view = new DataView(data.buffer, data.byteOffset, data.length);
  return data.length === 4 ? view.getFloat32(0) : view.getFloat64(0);
}

interface Form {
  /** Bytes that the length takes. */
  readonly size: number;
  /** Bytes beyond what the length says. */
  readonly more: number;
  readonly text: boolean;
}

const NO_FORM: Form = { size: 0, more: 0, text: false };
/** What follows the head bytes c4 to db: bin, ext, float, int, fixext, str. */
const FORMS: readonly Form[] = [
  ...[1, 2, 4].map((size) => ({ size, more: 0, text: false })),
  ...[1, 2, 4].map((size) => ({ size, more: 1, text: false })),
  ...[4, 8].map((more) => ({ size: 0, more, text: false })),
  ...[1, 2, 4, 8, 1, 2, 4, 8].map((more) => ({ size: 0, more, text: false })),
  ...[2, 3, 5, 9, 17].map((more) => ({ size: 0, more, text: false })),
  ...[1, 2, 4].map((size) => ({ size, more: 0, text: true })),
];

/** `read(body)`, and InternalError where `body` is not what it should be. */
export function reading<T>(what: string, body: Uint8Array, read: (value: unknown) => T): T {
  let value: unknown;
  try {
    value = decode(body);
  } catch (error) {
    throw new InternalError(`the broker's ${what} is malformed: ${reason(error)}`);
  }
  return checking(what, value, read);
}

/** `read(value)`, and InternalError where `value` is not what it should be. */
export function checking<T>(what: string, value: unknown, read: (value: unknown) => T): T {
  try {
    return read(value);
  } catch (error) {
    throw new InternalError(`the broker's ${what} is malformed: ${reason(error)}`);
  }
}

/** The message of whatever was thrown. */
export function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
