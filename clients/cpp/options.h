// The command line.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "pagoda/v1/scheduler.pb.h"

extern const char* const kHelp;

struct Options {
  std::string command;  // chat or many
  std::string url;
  std::string token;
  std::string model;
  std::string system;
  pagoda::v1::SamplingParams sampling;
  std::optional<double> deadline_seconds;
  std::optional<unsigned> leave_after;
  unsigned chats = 100;
  std::optional<std::string> message;
  bool help = false;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Reads the arguments and the environment. Throws UsageError.
Options Parse(int argc, char** argv);
