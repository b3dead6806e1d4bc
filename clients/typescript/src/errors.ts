/**
 * What can go wrong, typed by blame: one table ties class, wire code and exit status together.
 *
 *     SnapbrokerError
 *     |-- the caller's doing      InvalidArgument NotFound AlreadyExists FailedPrecondition OutOfRange
 *     |                           PermissionDenied Unauthenticated Unimplemented Cancelled
 *     |-- the moment's doing      Unavailable ResourceExhausted DeadlineExceeded      (repeat later)
 *     `-- the broker's doing      Internal
 *
 * The codes are the gRPC words in lower case.
 */

/** The code of an error, as it travels (RFC 1, section 8). */
export type ErrorCode =
  | "internal"
  | "invalid_argument"
  | "not_found"
  | "already_exists"
  | "failed_precondition"
  | "unavailable"
  | "resource_exhausted"
  | "deadline_exceeded"
  | "permission_denied"
  | "unauthenticated"
  | "unimplemented"
  | "cancelled"
  | "out_of_range";

/** What a program can use of an error: plain values; integers beyond 2^32 are bigints. */
export type Details = Readonly<Record<string, unknown>>;

/** What is known of an error beyond its message. */
export interface ErrorFacts {
  readonly details?: Details;
  readonly inDoubt?: boolean;
}

/** An error of the contract: its `code`, a message that says what to do, and `details` for programs. */
export abstract class SnapbrokerError extends Error {
  /** The code as it travels. */
  abstract readonly code: ErrorCode;
  /** What a program ends with because of it, as the command `snapbroker` does. */
  abstract readonly exitStatus: number;
  /** What a program can use: `retry_after_ms`, `oldest`, `newest`, `fence`, `snapshotters` and others. */
  readonly details: Details;
  /** Whether the call may have taken effect all the same: no answer came, and a repeat brought none either. */
  readonly inDoubt: boolean;

  constructor(message: string, facts: ErrorFacts = {}) {
    super(message);
    this.details = facts.details ?? {};
    this.inDoubt = facts.inDoubt ?? false;
    this.name = new.target.name;
  }
}

/** The broker failed; its log says why. */
export class InternalError extends SnapbrokerError {
  readonly code = "internal";
  readonly exitStatus = 1;
}

/** The request itself is wrong and will stay wrong. */
export class InvalidArgumentError extends SnapbrokerError {
  readonly code = "invalid_argument";
  readonly exitStatus = 2;
}

/** No such snapshot, parent or snapshotter. */
export class NotFoundError extends SnapbrokerError {
  readonly code = "not_found";
  readonly exitStatus = 3;
}

/** The key or name is taken. */
export class AlreadyExistsError extends SnapbrokerError {
  readonly code = "already_exists";
  readonly exitStatus = 4;
}

/** The snapshot is not in a state that allows this. */
export class FailedPreconditionError extends SnapbrokerError {
  readonly code = "failed_precondition";
  readonly exitStatus = 5;
}

/** The snapshotter or the broker is not there at the moment: repeat the call. */
export class UnavailableError extends SnapbrokerError {
  readonly code = "unavailable";
  readonly exitStatus = 6;
}

/** A limit is reached; `details.retry_after_ms`, where given, says when to repeat. */
export class ResourceExhaustedError extends SnapbrokerError {
  readonly code = "resource_exhausted";
  readonly exitStatus = 7;
}

/** The deadline passed; without a reply it is unknown whether the call took effect. */
export class DeadlineExceededError extends SnapbrokerError {
  readonly code = "deadline_exceeded";
  readonly exitStatus = 8;
}

/** The caller may not do this. */
export class PermissionDeniedError extends SnapbrokerError {
  readonly code = "permission_denied";
  readonly exitStatus = 9;
}

/** The caller did not say who it is. */
export class UnauthenticatedError extends SnapbrokerError {
  readonly code = "unauthenticated";
  readonly exitStatus = 10;
}

/** The broker, or this snapshotter, does not know the verb, version or option. */
export class UnimplementedError extends SnapbrokerError {
  readonly code = "unimplemented";
  readonly exitStatus = 11;
}

/** The call was taken back, or the atomic batch that it was part of failed. */
export class CancelledError extends SnapbrokerError {
  readonly code = "cancelled";
  readonly exitStatus = 12;
}

/** The sequence asked for is no longer, or not yet, in the journal: walk again. */
export class OutOfRangeError extends SnapbrokerError {
  readonly code = "out_of_range";
  readonly exitStatus = 13;
}

type ErrorClass = new (message: string, facts?: ErrorFacts) => SnapbrokerError;

/** Wire code to class. */
export const ERRORS: Readonly<Record<ErrorCode, ErrorClass>> = {
  internal: InternalError,
  invalid_argument: InvalidArgumentError,
  not_found: NotFoundError,
  already_exists: AlreadyExistsError,
  failed_precondition: FailedPreconditionError,
  unavailable: UnavailableError,
  resource_exhausted: ResourceExhaustedError,
  deadline_exceeded: DeadlineExceededError,
  permission_denied: PermissionDeniedError,
  unauthenticated: UnauthenticatedError,
  unimplemented: UnimplementedError,
  cancelled: CancelledError,
  out_of_range: OutOfRangeError,
};

/** The error with this code; a code that is not known is read as `internal` (RFC 1, section 8). */
export function errorOf(code: string, message: string, facts?: ErrorFacts): SnapbrokerError {
  const known = Object.hasOwn(ERRORS, code) ? ERRORS[code as ErrorCode] : InternalError;
  return new known(message, facts);
}

/** The same error with another message or doubt. */
export function retold(error: SnapbrokerError, message: string, inDoubt: boolean): SnapbrokerError {
  return errorOf(error.code, message, { details: error.details, inDoubt });
}
