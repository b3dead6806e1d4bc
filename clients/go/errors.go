package snapbroker

import (
	"context"
	"errors"
	"fmt"
)

// A Code says what went wrong: one of the gRPC words in lower case (1/SNBR section 8).
type Code string

// The codes of the contract. A code of the wire that is none of these is read as CodeInternal.
const (
	CodeInternal           Code = "internal"
	CodeInvalidArgument    Code = "invalid_argument"
	CodeNotFound           Code = "not_found"
	CodeAlreadyExists      Code = "already_exists"
	CodeFailedPrecondition Code = "failed_precondition"
	CodeUnavailable        Code = "unavailable"
	CodeResourceExhausted  Code = "resource_exhausted"
	CodeDeadlineExceeded   Code = "deadline_exceeded"
	CodePermissionDenied   Code = "permission_denied"
	CodeUnauthenticated    Code = "unauthenticated"
	CodeUnimplemented      Code = "unimplemented"
	CodeCancelled          Code = "cancelled"
	CodeOutOfRange         Code = "out_of_range"
)

// ExitStatus is what a command that ends with this code exits with (1/SNBR section 8).
func (c Code) ExitStatus() int {
	switch c {
	case CodeInvalidArgument:
		return 2
	case CodeNotFound:
		return 3
	case CodeAlreadyExists:
		return 4
	case CodeFailedPrecondition:
		return 5
	case CodeUnavailable:
		return 6
	case CodeResourceExhausted:
		return 7
	case CodeDeadlineExceeded:
		return 8
	case CodePermissionDenied:
		return 9
	case CodeUnauthenticated:
		return 10
	case CodeUnimplemented:
		return 11
	case CodeCancelled:
		return 12
	case CodeOutOfRange:
		return 13
	}
	return 1
}

// One error for each code, for errors.Is. What a call returns is an *Error, which has the message and the details.
var (
	ErrInternal           = sentinel(CodeInternal)           // the broker failed; its log says why
	ErrInvalidArgument    = sentinel(CodeInvalidArgument)    // the request is wrong and will stay wrong
	ErrNotFound           = sentinel(CodeNotFound)           // no such snapshot, parent or snapshotter
	ErrAlreadyExists      = sentinel(CodeAlreadyExists)      // the key or name is taken
	ErrFailedPrecondition = sentinel(CodeFailedPrecondition) // the snapshot is not in a state that allows this
	ErrUnavailable        = sentinel(CodeUnavailable)        // not there at the moment: repeat later
	ErrResourceExhausted  = sentinel(CodeResourceExhausted)  // a limit is reached: repeat later
	ErrDeadlineExceeded   = sentinel(CodeDeadlineExceeded)   // the deadline passed
	ErrPermissionDenied   = sentinel(CodePermissionDenied)   // the caller may not do this
	ErrUnauthenticated    = sentinel(CodeUnauthenticated)    // the caller did not say who it is
	ErrUnimplemented      = sentinel(CodeUnimplemented)      // a verb, version or combination that is not known
	ErrCancelled          = sentinel(CodeCancelled)          // the caller took the call back
	ErrOutOfRange         = sentinel(CodeOutOfRange)         // the sequence is not, or no longer, in the journal
)

var sentinels = map[Code]error{}

type sentinelError Code

func (e sentinelError) Error() string { return "snapbroker: " + string(e) }

func sentinel(code Code) error {
	err := sentinelError(code)
	sentinels[code] = err
	return err
}

// An Error is what every call of this package returns when it fails.
//
// errors.Is finds the sentinel of its code; a call that its context ended is also context.Canceled or
// context.DeadlineExceeded.
type Error struct {
	// Code says what went wrong.
	Code Code
	// Message is a sentence for people that may change at any time. It says what to do.
	Message string
	// Details has what a program can use, such as "retry_after_ms". Integers are int64, or uint64
	// where they are larger.
	Details map[string]any
	// InDoubt: the call may have taken effect all the same, for no answer came, and a repeat brought none either.
	// Without it a call that failed had no effect.
	InDoubt bool

	cause error
}

func (e *Error) Error() string { return string(e.Code) + ": " + e.Message }

// Is reports whether target is the sentinel of the code.
func (e *Error) Is(target error) bool { return sentinels[e.Code] == target }

// Unwrap answers the context's error where the context ended the call.
func (e *Error) Unwrap() error { return e.cause }

func (e *Error) normalise() {
	if _, known := sentinels[e.Code]; !known {
		e.Code = CodeInternal
	}
}

func fault(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) *Error { return fault(CodeInvalidArgument, format, args...) }

func malformed(what string, err error) *Error {
	return fault(CodeInternal, "the broker's %s is malformed: %v", what, err)
}

// ended is the error of a call whose context ended it. sent: whether the broker has the call.
func ended(ctx context.Context, sent, change bool) *Error {
	cause := context.Cause(ctx)
	err := &Error{Code: CodeCancelled, Message: "the call was taken back", cause: cause}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err.Code = CodeDeadlineExceeded
		err.Message = "the context's deadline passed"
	}
	if !errors.Is(cause, ctx.Err()) {
		err.cause = errors.Join(cause, ctx.Err())
	}
	if !sent {
		err.Message += ": it was not sent"
	}
	if sent && change {
		err.InDoubt = true
		err.Message += doubtful
	}
	return err
}

const doubtful = "; it is unknown whether the call took effect: look with stat"

// asError makes an *Error of whatever a function of the caller's returned.
func asError(err error) *Error {
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	return &Error{Code: CodeInternal, Message: err.Error(), cause: err}
}

// number is an integer among the details, however it is written.
func number(value any) (int64, bool) {
	switch n := value.(type) {
	case int64:
		return n, true
	case uint64:
		return int64(min(n, 1<<63-1)), true
	case float64:
		return int64(n), n == n && n > -1e18 && n < 1e18
	}
	return 0, false
}
