/** The keys of a client, from two small files (RFC 3, section 3): read line by line, never printed, never too open. */

import { createPrivateKey, createPublicKey } from "node:crypto";
import { open } from "node:fs/promises";

import { text } from "./arguments.js";
import { orVariable } from "./endpoints.js";
import { InvalidArgumentError } from "./errors.js";
import { reason } from "./msgpack.js";

export const CLIENT_KEY_VARIABLE = "SNAPBROKER_CLIENT_KEY";
export const SERVER_KEY_VARIABLE = "SNAPBROKER_SERVER_KEY";

/** What CURVE needs of a client: keys of 40 characters of Z85. */
export interface Keys {
  readonly publicKey: string;
  readonly secretKey: string;
  readonly serverKey: string;
}

const Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
const KEY_CHARACTERS = 40;
const KEY_FILE_BYTES_MAX = 65_536;
const OTHERS = 0o077;
const LINE = /^[ \t]*(?:([A-Za-z0-9_]+)[ \t]*=[ \t]*"([\x20\x21\x23-\x5b\x5d-\x7e]*)"[ \t]*)?(?:#.*)?$/;
/** What stands before the 32 bytes of a raw X25519 secret key in PKCS #8, and of a public key in SPKI. */
const PKCS8 = Buffer.from("302e020100300506032b656e04220420", "hex");
const SPKI_LENGTH = 12;

/**
 * The keys for `endpoint`, undefined where CURVE is not used: without a client key, and on ipc.
 *
 * `clientKey` is a path, else SNAPBROKER_CLIENT_KEY; `serverKey` a key or a path, else SNAPBROKER_SERVER_KEY, else that of
 * the client key file. InvalidArgument where a file is not as it must be, or the server key is missing.
 */
export async function keysFor(endpoint: string, clientKey?: string, serverKey?: string): Promise<Keys | undefined> {
  if (endpoint.startsWith("ipc://")) return undefined;
  const path = orVariable(clientKey, CLIENT_KEY_VARIABLE);
  if (path === undefined) return undefined;
  const own = await readKeyFile(text(path, "clientKey"));
  const publicKey = keyOf(own, "public_key", path);
  const secretKey = keyOf(own, "secret_key", path);
  if (publicOf(secretKey) !== publicKey) {
    throw new InvalidArgumentError(`${path}: public_key is not that of secret_key: ask for the file again`);
  }
  const server = orVariable(serverKey, SERVER_KEY_VARIABLE);
  if (server !== undefined) {
    const told = isKey(server) ? server : keyOf(await readKeyFile(text(server, "serverKey")), "public_key", server);
    return { publicKey, secretKey, serverKey: told };
  }
  if (!own.has("server_key")) {
    throw new InvalidArgumentError(
      `${path} has no server_key: pass serverKey or set ${SERVER_KEY_VARIABLE}, the broker's public key or its file`,
    );
  }
  return { publicKey, secretKey, serverKey: keyOf(own, "server_key", path) };
}

/** Whether `value` is a key, and not a path. */
export function isKey(value: string): boolean {
  return value.length === KEY_CHARACTERS && Array.from(value).every((character) => Z85.includes(character));
}

function keyOf(file: ReadonlyMap<string, string>, field: string, path: string): string {
  const key = file.get(field);
  if (key === undefined) throw new InvalidArgumentError(`${path} has no ${field}`);
  if (!isKey(key))
    throw new InvalidArgumentError(`${path}: ${field} is not a key of ${KEY_CHARACTERS} characters of Z85`);
  return key;
}

async function readKeyFile(path: string): Promise<ReadonlyMap<string, string>> {
  let content: string;
  let mode: number;
  try {
    const file = await open(path);
    try {
      const stat = await file.stat();
      if (!stat.isFile()) throw new Error("not a regular file");
      if (stat.size > KEY_FILE_BYTES_MAX) throw new Error(`longer than ${KEY_FILE_BYTES_MAX} bytes`);
      mode = stat.mode;
      content = await file.readFile("utf8");
    } finally {
      await file.close();
    }
  } catch (error) {
    throw new InvalidArgumentError(`the key file ${path} cannot be read: ${reason(error)}`);
  }
  const fields = parseKeyFile(content, path);
  if (fields.has("secret_key") && process.platform !== "win32" && (mode & OTHERS) !== 0) {
    throw new InvalidArgumentError(`${path} holds a secret key and is open to others: chmod 600 ${path}`);
  }
  return fields;
}

/** The fields of a key file; InvalidArgument, with the line's number and not its content, where it is malformed. */
export function parseKeyFile(content: string, path: string): ReadonlyMap<string, string> {
  const fields = new Map<string, string>();
  content.split("\n").forEach((line, index) => {
    const found = LINE.exec(line.endsWith("\r") ? line.slice(0, -1) : line);
    if (found === null) throw new InvalidArgumentError(`${path}, line ${index + 1}: not a line of a key file`);
    const [, field, value] = found;
    if (field === undefined || value === undefined) return;
    if (fields.has(field)) throw new InvalidArgumentError(`${path}, line ${index + 1}: ${field} appears twice`);
    fields.set(field, value);
  });
  return fields;
}

/** The public key of a secret one: a CURVE pair is one of X25519. */
export function publicOf(secretKey: string): string {
  const secret = createPrivateKey({
    key: Buffer.concat([PKCS8, fromZ85(secretKey)]),
    format: "der",
    type: "pkcs8",
  });
  return toZ85(createPublicKey(secret).export({ format: "der", type: "spki" }).subarray(SPKI_LENGTH));
}

function fromZ85(key: string): Buffer {
  const bytes = Buffer.alloc((key.length / 5) * 4);
  for (let at = 0; at < key.length; at += 5) {
    let value = 0;
    for (const character of key.slice(at, at + 5)) value = value * 85 + Z85.indexOf(character);
    if (value > 0xffff_ffff) throw new InvalidArgumentError("a key holds five characters that stand for no four bytes");
    bytes.writeUInt32BE(value, (at / 5) * 4);
  }
  return bytes;
}

function toZ85(bytes: Buffer): string {
  let key = "";
  for (let at = 0; at < bytes.length; at += 4) {
    let value = bytes.readUInt32BE(at);
    let group = "";
    for (let index = 0; index < 5; index++) {
      group = Z85.charAt(value % 85) + group;
      value = Math.floor(value / 85);
    }
    key += group;
  }
  return key;
}
