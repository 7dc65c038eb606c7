// A conversation with Pagoda, or many at once; --help explains.

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "client.h"
#include "errors.h"
#include "options.h"

using pagoda::v1::Chat;
using pagoda::v1::FinishReason;
using pagoda::v1::GenerateRequest;
using pagoda::v1::GenerateResponse;

namespace {

// What came of one chat.
struct Answer {
  std::string text;
  std::string request_id;
  unsigned num_messages = 0;
  unsigned num_tokens = 0;
  std::optional<unsigned> completion_tokens;  // as the server counts; none when the answer was left
  FinishReason finish_reason = FinishReason::FINISH_REASON_UNSPECIFIED;
};

void Add(Chat& chat, const std::string& role, const std::string& content) {
  pagoda::v1::ChatMessage& message = *chat.add_messages();
  message.set_role(role);
  message.set_content(content);
}

// A request with the options' sampling and, when there is one, their system message.
GenerateRequest Opening(const Options& options) {
  GenerateRequest request;
  request.set_model(options.model);
  *request.mutable_sampling() = options.sampling;
  if (!options.system.empty()) Add(*request.mutable_chat(), "system", options.system);
  return request;
}

// Streams the answer to a conversation and hands each piece of text to `print` as it comes.
grpc::Status Ask(const Client& client, const Options& options, const GenerateRequest& request, Answer& answer,
                 const std::function<void(const std::string&)>& print) {
  return client.Generate(request, options.deadline_seconds, [&](const GenerateResponse& response) {
    ++answer.num_messages;
    if (!response.request_id().empty()) answer.request_id = response.request_id();
    answer.text += response.text();
    answer.num_tokens += response.token_ids_size();
    print(response.text());
    if (response.finish_reason() != FinishReason::FINISH_REASON_UNSPECIFIED) {
      answer.finish_reason = response.finish_reason();
    }
    if (response.has_usage()) answer.completion_tokens = response.usage().completion_tokens();
    return response.has_usage() || answer.num_messages != options.leave_after;  // false cancels the call
  });
}

std::string Reason(const Answer& answer) {
  std::string name = pagoda::v1::FinishReason_Name(answer.finish_reason).substr(sizeof("FINISH_REASON_") - 1);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name;
}

// Why an answer is not whole; empty when it is.
std::string Flaw(const Answer& answer) {
  if (!answer.completion_tokens) return "ended by leaving";
  if (answer.finish_reason != FinishReason::FINISH_REASON_STOP &&
      answer.finish_reason != FinishReason::FINISH_REASON_LENGTH) {
    return "ended by " + Reason(answer);
  }
  const unsigned counted = *answer.completion_tokens;
  if (answer.num_tokens == counted) return "";
  return std::to_string(answer.num_tokens) + " of " + std::to_string(counted) + " tokens came";
}

// Asks one turn after the other: the message, or every line of standard input. Returns whether all succeeded.
bool RunChat(const Client& client, const Options& options) {
  GenerateRequest request = Opening(options);
  std::string turn = options.message.value_or("");
  while (options.message || std::getline(std::cin, turn)) {
    Add(*request.mutable_chat(), "user", turn);
    Answer answer;
    const grpc::Status status = Ask(client, options, request, answer,
                                    [](const std::string& text) { std::cout << text << std::flush; });
    std::cout << std::endl;
    if (!status.ok()) {
      std::cerr << "error: " << Describe(Explain(status)) << std::endl;
      return false;
    }
    Add(*request.mutable_chat(), "assistant", answer.text);
    std::cerr << "[" << answer.request_id << ": ";
    if (answer.completion_tokens) {
      std::cerr << answer.num_messages << " messages, " << *answer.completion_tokens << " tokens, "
                << Reason(answer) << "]" << std::endl;
    } else {
      std::cerr << "left after " << answer.num_messages << " messages]" << std::endl;
    }
    if (options.message) break;
  }
  return true;
}

// Streams many chats at once, a thread for each. Returns whether all finished.
bool RunMany(const Client& client, const Options& options) {
  const std::string about = options.message.value_or("Tell me something about the number");
  const auto started = std::chrono::steady_clock::now();
  std::vector<Answer> answers(options.chats);
  std::vector<std::string> flaws(options.chats);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < options.chats; ++i) {
    threads.emplace_back([&, i] {
      GenerateRequest request = Opening(options);
      Add(*request.mutable_chat(), "user", about + " " + std::to_string(i));
      if (options.sampling.has_seed()) request.mutable_sampling()->set_seed(options.sampling.seed() + i);
      const grpc::Status status = Ask(client, options, request, answers[i], [](const std::string&) {});
      flaws[i] = status.ok() ? Flaw(answers[i]) : Describe(Explain(status));
    });
  }
  for (std::thread& thread : threads) thread.join();
  unsigned finished = 0, num_tokens = 0;
  for (unsigned i = 0; i < options.chats; ++i) {
    num_tokens += answers[i].num_tokens;
    if (flaws[i].empty()) ++finished;
    else std::cerr << "chat " << i << ": " << flaws[i] << "\n";
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  std::printf("%u of %u chats finished, %u tokens in %.1f s\n", finished, options.chats, num_tokens,
              took.count());
  return finished == options.chats;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = Parse(argc, argv);
    if (options.help) {
      std::cout << kHelp;
      return 0;
    }
    const Client client(options.url, options.token);
    const bool good = options.command == "many" ? RunMany(client, options) : RunChat(client, options);
    return good ? 0 : 1;
  } catch (const UsageError& error) {
    std::cerr << "error: " << error.what() << "\ntry --help" << std::endl;
    return 2;
  }
}
