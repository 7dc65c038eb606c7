package main

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// names of the codes as gRPC's documents and all other languages write them.
var names = map[codes.Code]string{
	codes.Canceled:           "CANCELLED",
	codes.Unknown:            "UNKNOWN",
	codes.InvalidArgument:    "INVALID_ARGUMENT",
	codes.DeadlineExceeded:   "DEADLINE_EXCEEDED",
	codes.NotFound:           "NOT_FOUND",
	codes.AlreadyExists:      "ALREADY_EXISTS",
	codes.PermissionDenied:   "PERMISSION_DENIED",
	codes.ResourceExhausted:  "RESOURCE_EXHAUSTED",
	codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.Aborted:            "ABORTED",
	codes.OutOfRange:         "OUT_OF_RANGE",
	codes.Unimplemented:      "UNIMPLEMENTED",
	codes.Internal:           "INTERNAL",
	codes.Unavailable:        "UNAVAILABLE",
	codes.DataLoss:           "DATA_LOSS",
	codes.Unauthenticated:    "UNAUTHENTICATED",
}

// failure is what a failed call says: its status, and the google.rpc details in grpc-status-details-bin.
type failure struct {
	code    string
	message string
	// fields of the request that are wrong (google.rpc.BadRequest).
	fields []*errdetails.BadRequest_FieldViolation
	// reason is a word for programs (google.rpc.ErrorInfo), empty when there is none.
	reason string
	// retryAfter says when a later try may succeed (google.rpc.RetryInfo); nil when the server did not.
	retryAfter *time.Duration
}

// explain reads the status and the details of a failed call.
func explain(err error) failure {
	st := status.Convert(err)
	f := failure{code: names[st.Code()], message: st.Message()}
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.BadRequest:
			f.fields = append(f.fields, d.GetFieldViolations()...)
		case *errdetails.ErrorInfo:
			f.reason = d.GetReason()
		case *errdetails.RetryInfo:
			delay := d.GetRetryDelay().AsDuration()
			f.retryAfter = &delay
		}
	}
	return f
}

// String is the failure in lines for people.
func (f failure) String() string {
	lines := []string{fmt.Sprintf("%s: %s", f.code, f.message)}
	for _, v := range f.fields {
		lines = append(lines, fmt.Sprintf("  field %s: %s", v.GetField(), v.GetDescription()))
	}
	if f.reason != "" {
		lines = append(lines, "  reason "+f.reason)
	}
	if f.retryAfter != nil {
		lines = append(lines, fmt.Sprintf("  try again in %g s", f.retryAfter.Seconds()))
	}
	return strings.Join(lines, "\n")
}
