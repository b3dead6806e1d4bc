/** The client of snapbrokerd, the snapshot broker. */

export { Audit, type AuditOptions, type RepairOptions } from "./audit.js";
export { Batch, type BatchOptions } from "./batch.js";
export { Broker, connect, type ConnectOptions, type LongCallOptions } from "./broker.js";
export type { CommitOptions, CreateOptions, FenceOptions, UpdateOptions } from "./calls.js";
export type { ConnectionStatistics } from "./connection.js";
export type {
  EventVerb,
  Figures,
  Finding,
  Info,
  Kind,
  Labels,
  Mount,
  MountUse,
  Mounts,
  Progress,
  Severity,
  SnapshotEvent,
  SnapshotterStatus,
  Status,
  Usage,
  Why,
} from "./contract.js";
export {
  AlreadyExistsError,
  CancelledError,
  DeadlineExceededError,
  FailedPreconditionError,
  InternalError,
  InvalidArgumentError,
  NotFoundError,
  OutOfRangeError,
  PermissionDeniedError,
  ResourceExhaustedError,
  SnapbrokerError,
  UnauthenticatedError,
  UnavailableError,
  UnimplementedError,
  type Details,
  type ErrorCode,
} from "./errors.js";
export { Events, type EventsOptions } from "./events.js";
export { toJson } from "./json.js";
export { Mirror, type Change, type Changed, type MirrorOptions, type Walked } from "./mirror.js";
export type { AuditPage, WalkPage } from "./protocol.js";
export type { Answer } from "./session.js";
export type { EventStatistics } from "./tracker.js";
export type { CallOptions } from "./view.js";
export { Walk, type WalkOptions } from "./walk.js";
