/** The calls, from a caller's arguments; what is wrong with them is InvalidArgument. */

import { fenceNumber, flag, labelMap, text, texts } from "./arguments.js";
import type { Labels } from "./contract.js";
import * as protocol from "./protocol.js";
import type { Call } from "./protocol.js";

/** What a new snapshot is made of. */
export interface CreateOptions {
  /** The committed snapshot to stand on; none where absent. */
  readonly parent?: string | undefined;
  readonly labels?: Labels | undefined;
}

/** Which snapshot is meant, where its key may stand for another one meanwhile. */
export interface FenceOptions {
  /** The `fence` that prepare or view answered; 0 or absent: whatever the key stands for. */
  readonly fence?: bigint | number | undefined;
}

/** What a commit makes. */
export interface CommitOptions extends CreateOptions, FenceOptions {
  /** The files are on disk before the name exists. */
  readonly sync?: boolean | undefined;
}

/** Which labels an update touches. */
export interface UpdateOptions {
  /** `labels` or `labels.<key>`; all labels are replaced where absent. */
  readonly fieldpaths?: readonly string[] | undefined;
}

export function prepare(key: string, { parent = "", labels }: CreateOptions): Call {
  return protocol.creation("prepare", text(key), text(parent, "parent"), labelMap(labels));
}

export function view(key: string, { parent = "", labels }: CreateOptions): Call {
  return protocol.creation("view", text(key), text(parent, "parent"), labelMap(labels));
}

export function commit(name: string, key: string, options: CommitOptions): Call {
  const { parent = "", labels, sync = false, fence } = options;
  return protocol.commit(
    text(name, "name"),
    text(key),
    text(parent, "parent"),
    labelMap(labels),
    flag(sync, "sync"),
    fenceNumber(fence),
  );
}

export function remove(key: string, { fence }: FenceOptions): Call {
  return protocol.fencedCall("remove", text(key), fenceNumber(fence));
}

export function mounts(key: string, { fence }: FenceOptions): Call {
  return protocol.fencedCall("mounts", text(key), fenceNumber(fence));
}

export function stat(key: string): Call {
  return { verb: "stat", key: text(key) };
}

export function usage(key: string): Call {
  return { verb: "usage", key: text(key) };
}

export function why(key: string): Call {
  return { verb: "why", key: text(key) };
}

export function update(name: string, labels: Labels, { fieldpaths = [] }: UpdateOptions): Call {
  return protocol.update(text(name, "name"), labelMap(labels), texts(fieldpaths, "fieldpaths"));
}
