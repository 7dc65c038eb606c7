#include "client.h"

#include <chrono>
#include <utility>

using pagoda::v1::GenerateRequest;
using pagoda::v1::GenerateResponse;
using pagoda::v1::InferenceService;

Client::Client(const std::string& address, std::string token)
    : stub_(InferenceService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))),
      token_(std::move(token)) {}

grpc::Status Client::Generate(const GenerateRequest& request, std::optional<double> deadline_seconds,
                              const std::function<bool(const GenerateResponse&)>& take) const {
  grpc::ClientContext context;
  if (!token_.empty()) context.AddMetadata("authorization", "Bearer " + token_);
  if (deadline_seconds) {
    const auto allowed = std::chrono::duration<double>(*deadline_seconds);
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::duration_cast<std::chrono::system_clock::duration>(allowed));
  }
  const auto reader = stub_->Generate(&context, request);
  GenerateResponse response;
  while (reader->Read(&response)) {
    if (take(response)) continue;
    context.TryCancel();
    while (reader->Read(&response)) continue;  // what was on its way
    reader->Finish();                          // CANCELLED, as we wished
    return grpc::Status::OK;
  }
  return reader->Finish();
}
