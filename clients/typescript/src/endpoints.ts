/** Where the broker is and whose snapshots are meant: arguments first, then the environment, then the defaults. */

import { homedir } from "node:os";
import { dirname, join, resolve } from "node:path";

import { text } from "./arguments.js";
import { checkNamespace, type Status } from "./contract.js";
import { FailedPreconditionError, InvalidArgumentError, NotFoundError } from "./errors.js";
import { TARGET_BYTES_MAX } from "./protocol.js";

export const ENDPOINT_VARIABLE = "SNAPBROKER_ENDPOINT";
export const EVENTS_ENDPOINT_VARIABLE = "SNAPBROKER_EVENTS_ENDPOINT";
export const NAMESPACE_VARIABLE = "SNAPBROKER_NAMESPACE";
export const SNAPSHOTTER_VARIABLE = "SNAPBROKER_SNAPSHOTTER";
/** The namespace where none is named. */
export const NAMESPACE = "default";

const IPC = "ipc://";
/** Hosts in a broker's answer that mean every host. */
const ANY_HOST = ["*", "0.0.0.0", "[::]"];

/** `given`, else the variable's value; what is empty is not set. */
export function orVariable(given: string | undefined, name: string): string | undefined {
  return [given, process.env[name]].find((value) => value !== undefined && value !== "");
}

/** Where a broker of this user keeps its sockets: `/run/snapbroker` for root, else in the runtime directory. */
function runtimeDirectory(): string {
  const user = process.geteuid?.() ?? 0;
  if (user === 0) return "/run/snapbroker";
  return join(orVariable(undefined, "XDG_RUNTIME_DIR") ?? `/run/user/${user}`, "snapbroker");
}

/** The ROUTER's endpoint: `given`, else SNAPBROKER_ENDPOINT, else the default socket; a path becomes `ipc://`. */
export function routerEndpoint(given?: string): string {
  return asEndpoint(orVariable(given, ENDPOINT_VARIABLE) ?? join(runtimeDirectory(), "router.sock"));
}

/**
 * The publisher's endpoint, undefined where only the broker's status can tell it: `given`, else
 * SNAPBROKER_EVENTS_ENDPOINT, else `events.sock` beside an ipc router's socket.
 */
export function eventsEndpoint(given: string | undefined, router: string): string | undefined {
  const chosen = orVariable(given, EVENTS_ENDPOINT_VARIABLE);
  if (chosen !== undefined) return asEndpoint(chosen);
  if (!router.startsWith(IPC) || router.startsWith(`${IPC}@`)) return undefined;
  return IPC + join(dirname(router.slice(IPC.length)), "events.sock");
}

/** The publisher's endpoint as the status tells it; on the router's host where it is bound to every host. */
export function reachableEventsEndpoint(status: Status, router: string): string {
  const sent = status.eventsEndpoint;
  if (!sent) {
    throw new FailedPreconditionError(
      `the broker at ${router} names no endpoint of events; ` +
        `pass eventsEndpoint or set ${EVENTS_ENDPOINT_VARIABLE}`,
    );
  }
  const wild = ANY_HOST.some((host) => sent.startsWith(`tcp://${host}:`));
  if (!wild || !router.startsWith("tcp://")) return sent;
  return router.slice(0, router.lastIndexOf(":")) + sent.slice(sent.lastIndexOf(":"));
}

/** `given`, else SNAPBROKER_NAMESPACE, else `default`; InvalidArgument where it is malformed. */
export function namespaceOrDefault(given?: string): string {
  const chosen = text(orVariable(given, NAMESPACE_VARIABLE) ?? NAMESPACE, "namespace");
  checkNamespace(chosen);
  return chosen;
}

/** `given`, else SNAPBROKER_SNAPSHOTTER, else undefined: the broker is asked for its only one. */
export function snapshotterOrNone(given?: string): string | undefined {
  return orVariable(given, SNAPSHOTTER_VARIABLE);
}

/** The target frame that names `snapshotter`; InvalidArgument where no snapshotter can have that name. */
export function targetFrame(snapshotter: string): Buffer {
  const target = Buffer.from(text(snapshotter, "snapshotter"));
  if (target.length === 0 || target.length > TARGET_BYTES_MAX || snapshotter.includes("/")) {
    throw new InvalidArgumentError(
      `snapshotter '${snapshotter.slice(0, 80)}' must be 1 to ${TARGET_BYTES_MAX} bytes without a '/'`,
    );
  }
  return target;
}

/** The broker's one snapshotter; InvalidArgument naming them where there are several, NotFound where none is. */
export function onlySnapshotter(status: Status, router: string): string {
  const names = status.snapshotters.map((snapshotter) => snapshotter.name);
  const [only] = names;
  if (only === undefined) {
    throw new NotFoundError(`the broker at ${router} has no snapshotter; \`snapbrokerd doctor\` says why`);
  }
  if (names.length > 1) {
    throw new InvalidArgumentError(
      `which snapshotter? pass one of ${names.join(", ")}, or set ${SNAPSHOTTER_VARIABLE}`,
      { details: { snapshotters: names } },
    );
  }
  return only;
}

/** A bare path is a socket of this machine. */
function asEndpoint(given: string): string {
  if (text(given, "endpoint").includes("://")) return given;
  const home = given === "~" || given.startsWith("~/");
  return IPC + resolve(home ? join(homedir(), given.slice(1)) : given);
}
