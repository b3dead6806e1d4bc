/** Why a handshake failed, as an error of the contract (RFC 3, 3.5). */

import { UnauthenticatedError } from "./errors.js";

/** What the socket monitor tells of a handshake that failed. */
export interface Failure {
  readonly type: string;
  readonly code: string;
  readonly status: number;
}

/** What a failed handshake means for the calls that wait. */
export interface Refusal {
  readonly error: UnauthenticatedError;
  /** Whether they end at once, or when the time to connect is over. */
  readonly atOnce: boolean;
}

/** The refusal that a failure is; undefined where it only says that nothing was agreed on yet. */
export function refusalOf(failure: Failure, endpoint: string, withKeys: boolean): Refusal | undefined {
  if (failure.type === "handshake:error:auth" && failure.status === 400) {
    const message = `the broker at ${endpoint} refused the key: it was revoked, or never given to this broker`;
    return { error: new UnauthenticatedError(message), atOnce: true };
  }
  if (failure.type === "handshake:error:protocol" && failure.code.includes("MECHANISM_MISMATCH")) {
    const why = withKeys
      ? "it has no CURVE: connect without keys, or to the broker's remote endpoint"
      : "it needs a key: pass clientKey or set SNAPBROKER_CLIENT_KEY";
    return { error: new UnauthenticatedError(`no handshake with the broker at ${endpoint}: ${why}`), atOnce: true };
  }
  if (!withKeys) return undefined;
  const message = `no handshake with the broker at ${endpoint}: the server key is not this broker's`;
  return { error: new UnauthenticatedError(message), atOnce: false };
}
