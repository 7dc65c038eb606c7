#include "options.h"

#include <getopt.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>

const char* const kHelp = R"(usage: pagoda-client chat [options] [MESSAGE]
       pagoda-client many [options] [MESSAGE]

chat   asks Pagoda and prints the answer as it comes. Without MESSAGE, every line of standard input is a
       turn of one conversation. How each answer ended goes to standard error.
many   streams many chats at once over one connection and checks that every one of them finished and that
       no token is missing. MESSAGE gets the chat's number at its end.

options
  --url HOST:PORT       gRPC address of the gateway [PAGODA_URL, else 127.0.0.1:8001]
  --model NAME          model to ask [the one that is served]
  --system TEXT         what the model is told before the conversation
  --temperature T       0 always takes the likeliest token [1]
  --max-tokens N        the most tokens of an answer [as many as fit]
  --seed N              the same seed draws the same tokens; chat i of many draws with N + i
  --ignore-eos          let no answer end before --max-tokens
  --deadline SECONDS    fail an answer that takes longer with DEADLINE_EXCEEDED; the server stops it
  --leave-after N       leave an answer after N messages: the call is cancelled, the server stops it
  --chats N             how many chats at once (many) [100]
  --help                this text

PAGODA_TOKEN is sent as a bearer token. The exit status is 1 when a call fails or a chat of many does not
finish, 2 when the command line is wrong.

  pagoda-client chat 'What is the capital of France?'
  pagoda-client chat --deadline 5 --max-tokens 64 'Tell me a story.'
  pagoda-client many --chats 200 --max-tokens 32 --ignore-eos
)";

namespace {

std::string Variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : otherwise;
}

// `given` as a number, all of it. Throws UsageError.
template <typename T>
T Number(const std::string& given) {
  std::istringstream in(given);
  T value;
  // A stream would take -1 for the largest unsigned number.
  const bool negative = std::numeric_limits<T>::is_integer && given.find('-') != std::string::npos;
  if (negative || !(in >> value) || !in.eof()) throw UsageError("not a number that fits: " + given);
  return value;
}

const option kOptions[] = {
    {"url", required_argument, nullptr, 'u'},         {"model", required_argument, nullptr, 'm'},
    {"system", required_argument, nullptr, 's'},      {"temperature", required_argument, nullptr, 't'},
    {"max-tokens", required_argument, nullptr, 'n'},  {"seed", required_argument, nullptr, 'r'},
    {"ignore-eos", no_argument, nullptr, 'e'},        {"deadline", required_argument, nullptr, 'd'},
    {"leave-after", required_argument, nullptr, 'l'}, {"chats", required_argument, nullptr, 'c'},
    {"help", no_argument, nullptr, 'h'},              {nullptr, 0, nullptr, 0}};

void Set(Options& options, int name, const std::string& given) {
  switch (name) {
    case 'u': options.url = given; break;
    case 'm': options.model = given; break;
    case 's': options.system = given; break;
    case 't': options.sampling.set_temperature(Number<float>(given)); break;
    case 'n': options.sampling.set_max_tokens(Number<std::uint32_t>(given)); break;
    case 'r': options.sampling.set_seed(Number<std::uint64_t>(given)); break;
    case 'e': options.sampling.set_ignore_eos(true); break;
    case 'd': options.deadline_seconds = Number<double>(given); break;
    case 'l': options.leave_after = Number<unsigned>(given); break;
    case 'c': options.chats = Number<unsigned>(given); break;
    case 'h': options.help = true; break;
    default: throw UsageError("an option is unknown or lacks its value");  // getopt has said which
  }
}

}  // namespace

Options Parse(int argc, char** argv) {
  Options options;
  options.url = Variable("PAGODA_URL", "127.0.0.1:8001");
  options.token = Variable("PAGODA_TOKEN", "");
  for (int name; (name = getopt_long(argc, argv, "", kOptions, nullptr)) != -1;) {
    Set(options, name, optarg != nullptr ? optarg : "");
  }
  if (options.help) return options;
  if (optind < argc) options.command = argv[optind++];
  if (options.command != "chat" && options.command != "many") {
    throw UsageError("the first word must be chat or many");
  }
  if (optind < argc) options.message = argv[optind++];
  if (optind < argc) {
    throw UsageError(std::string("one MESSAGE, please, in quotes: ") + argv[optind] + " is too much");
  }
  return options;
}
