// A thin client of pagoda.v1.InferenceService over one channel.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "pagoda/v1/inference.grpc.pb.h"

class Client {
 public:
  // `address` is host:port of the gateway's gRPC; `token` is sent as a bearer token unless empty.
  Client(const std::string& address, std::string token);

  // Runs one request and hands what comes to `take`, until the end or until `take` returns false: then the
  // request is cancelled at the server. After `deadline_seconds`, counted from here, the call ends with
  // DEADLINE_EXCEEDED. May be called by many threads at once.
  //
  // Returns OK also when `take` ended it; `Explain` of errors.h reads the details of another status.
  grpc::Status Generate(const pagoda::v1::GenerateRequest& request, std::optional<double> deadline_seconds,
                        const std::function<bool(const pagoda::v1::GenerateResponse&)>& take) const;

 private:
  std::unique_ptr<pagoda::v1::InferenceService::Stub> stub_;
  std::string token_;
};
