package pagoda.client;

import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import pagoda.v1.Scheduler.SamplingParams;

/** The command line. */
final class Options {
  static final String HELP = """
    usage: pagoda-client chat [options] [MESSAGE]
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
    """;

  /** The command line is wrong. */
  static final class UsageException extends Exception {
    UsageException(String message) {
      super(message);
    }
  }

  String command = "";
  String url;
  String token;
  String model = "";
  String system = "";
  final SamplingParams.Builder sampling = SamplingParams.newBuilder();
  /** Null is none. */
  Duration deadline;
  /** Messages; 0 is never. */
  int leaveAfter;
  int chats = 100;
  /** Null is none. */
  String message;
  boolean help;

  /** Reads the arguments and the environment. */
  static Options parse(String[] args, Map<String, String> env) throws UsageException {
    Options options = new Options();
    options.url = env.getOrDefault("PAGODA_URL", "").isEmpty() ? "127.0.0.1:8001" : env.get("PAGODA_URL");
    options.token = env.getOrDefault("PAGODA_TOKEN", "");
    List<String> words = new ArrayList<>();
    for (int i = 0; i < args.length; i++) {
      if (!args[i].startsWith("--")) {
        words.add(args[i]);
        continue;
      }
      String[] option = args[i].split("=", 2); // --name=value or --name value
      if (option[0].equals("--help")) {
        options.help = true;
      } else if (option[0].equals("--ignore-eos")) {
        options.sampling.setIgnoreEos(true);
      } else if (option.length == 2) {
        options.set(option[0], option[1]);
      } else if (i + 1 < args.length) {
        options.set(option[0], args[++i]);
      } else {
        throw new UsageException(option[0] + ": unknown, or lacks its value");
      }
    }
    options.setWords(words);
    return options;
  }

  private void set(String name, String value) throws UsageException {
    try {
      switch (name) {
        case "--url" -> url = value;
        case "--model" -> model = value;
        case "--system" -> system = value;
        case "--temperature" -> sampling.setTemperature(Float.parseFloat(value));
        case "--max-tokens" -> sampling.setMaxTokens(Integer.parseUnsignedInt(value));
        case "--seed" -> sampling.setSeed(Long.parseUnsignedLong(value));
        case "--deadline" -> deadline = Duration.ofNanos((long) (Double.parseDouble(value) * 1e9));
        case "--leave-after" -> leaveAfter = Integer.parseUnsignedInt(value);
        case "--chats" -> chats = Integer.parseUnsignedInt(value);
        default -> throw new UsageException(name + ": unknown");
      }
    } catch (NumberFormatException wrong) {
      throw new UsageException(name + " " + value + ": not a number that fits");
    }
  }

  private void setWords(List<String> words) throws UsageException {
    if (help) {
      return;
    }
    if (words.isEmpty() || !List.of("chat", "many").contains(words.get(0))) {
      throw new UsageException("the first word must be chat or many");
    }
    if (words.size() > 2) {
      String more = String.join(" ", words.subList(2, words.size()));
      throw new UsageException("one MESSAGE, please, in quotes: " + more + " is too much");
    }
    command = words.get(0);
    message = words.size() == 2 ? words.get(1) : null;
  }
}
