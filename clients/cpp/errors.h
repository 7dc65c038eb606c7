// What a failed call says: its status, and the google.rpc details in its trailer grpc-status-details-bin.
#pragma once

#include <grpcpp/grpcpp.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

struct Failure {
  std::string code;  // name of the gRPC status code
  std::string message;
  // Names of the request's fields that are wrong, and what is (google.rpc.BadRequest).
  std::vector<std::pair<std::string, std::string>> fields;
  std::string reason;                         // a word for programs (google.rpc.ErrorInfo), if any
  std::optional<double> retry_after_seconds;  // when a later try may succeed (google.rpc.RetryInfo)
};

// Reads the status and the details of a failed call.
Failure Explain(const grpc::Status& status);

// The failure in lines for people.
std::string Describe(const Failure& failure);
