#include "errors.h"

#include <grpcpp/support/error_details.h>

#include <sstream>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace {

const char* const kNames[] = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

}  // namespace

Failure Explain(const grpc::Status& status) {
  Failure failure;
  failure.code = kNames[status.error_code()];
  failure.message = status.error_message();
  google::rpc::Status rich;
  if (!grpc::ExtractErrorDetails(status, &rich).ok()) return failure;  // not details that we can read
  for (const google::protobuf::Any& detail : rich.details()) {
    google::rpc::BadRequest bad;
    google::rpc::ErrorInfo info;
    google::rpc::RetryInfo retry;
    if (detail.UnpackTo(&bad)) {
      for (const auto& violation : bad.field_violations()) {
        failure.fields.emplace_back(violation.field(), violation.description());
      }
    } else if (detail.UnpackTo(&info)) {
      failure.reason = info.reason();
    } else if (detail.UnpackTo(&retry)) {
      failure.retry_after_seconds = retry.retry_delay().seconds() + retry.retry_delay().nanos() / 1e9;
    }
  }
  return failure;
}

std::string Describe(const Failure& failure) {
  std::ostringstream lines;
  lines << failure.code << ": " << failure.message;
  for (const auto& [field, description] : failure.fields) {
    lines << "\n  field " << field << ": " << description;
  }
  if (!failure.reason.empty()) lines << "\n  reason " << failure.reason;
  if (failure.retry_after_seconds) lines << "\n  try again in " << *failure.retry_after_seconds << " s";
  return lines.str();
}
