/**
 * The client's ZeroMQ sockets: one place for their options.
 *
 * A DEALER with `immediate` set holds no message for a broker that is not there: a send without a connection says so at
 * once, and what was queued when a connection broke is dropped, not delivered to the next broker minutes later. The
 * socket's monitor tells when a connection broke: replies that were under way then will never come.
 *
 * `sendTimeout` 0 makes `send` do its work before it answers its promise, never later.
 */

import { Dealer, Subscriber } from "zeromq";

import { InvalidArgumentError } from "./errors.js";
import type { Keys } from "./keys.js";
import { reason } from "./msgpack.js";
import { BODY_BYTES_MAX } from "./protocol.js";

/** How long a call waits for a broker that is not there: longer than a restart takes, short for somebody who waits. */
export const CONNECT_MS = 3_000;
/** First pause between attempts to connect. */
export const RECONNECT_MS = 50;
/** Longest pause between attempts to connect. */
export const RECONNECT_MS_MAX = 1_000;
/** How long closing waits for the last messages, such as a Cancel, to leave. */
const LINGER_MS = 100;
/** Most events a subscriber's socket holds; what comes above is dropped and healed from the journal. */
const EVENTS_QUEUED_MAX = 100_000;
/** Pause between ZMTP pings over tcp, where a dead peer would not be noticed otherwise. */
const ALIVE_MS = 10_000;

function common(endpoint: string, keys: Keys | undefined) {
  return {
    linger: LINGER_MS,
    reconnectInterval: RECONNECT_MS,
    reconnectMaxInterval: RECONNECT_MS_MAX,
    maxMessageSize: BODY_BYTES_MAX + 4096,
    ...(endpoint.startsWith("tcp://") && {
      ipv6: true,
      heartbeatInterval: ALIVE_MS,
      heartbeatTimeout: 3 * ALIVE_MS,
    }),
    ...(keys && {
      curvePublicKey: keys.publicKey,
      curveSecretKey: keys.secretKey,
      curveServerKey: keys.serverKey,
    }),
  };
}

/** A DEALER that is not connected yet, so that its monitor misses nothing. */
export function dealer(endpoint: string, keys: Keys | undefined): Dealer {
  return new Dealer({
    ...common(endpoint, keys),
    immediate: true,
    sendTimeout: 0,
    // A ROUTER drops what does not fit a peer's queue. The queue is bounded by what this client asked for.
    receiveHighWaterMark: 0,
  });
}

/** A SUB connected to the broker's publisher, subscribed to `prefixes`. */
export function subscriber(endpoint: string, keys: Keys | undefined, prefixes: readonly string[]): Subscriber {
  const socket = new Subscriber({ ...common(endpoint, keys), receiveHighWaterMark: EVENTS_QUEUED_MAX });
  for (const prefix of prefixes) socket.subscribe(prefix);
  connectTo(socket, endpoint);
  return socket;
}

/** Connect; where `endpoint` is none the socket is closed and InvalidArgument thrown. */
export function connectTo(socket: Dealer | Subscriber, endpoint: string): void {
  try {
    socket.connect(endpoint);
  } catch (error) {
    socket.close();
    throw new InvalidArgumentError(`'${endpoint}' is no endpoint to connect to: ${reason(error)}`);
  }
}

/** Connect once more, and never twice at the same time. */
export function connectAnew(socket: Dealer | Subscriber, endpoint: string): void {
  try {
    socket.disconnect(endpoint);
  } catch {
    // ZeroMQ has given the connection up already.
  }
  socket.connect(endpoint);
}
