package pagoda.client;

import java.util.Locale;
import java.util.function.Consumer;
import pagoda.v1.Inference.Chat;
import pagoda.v1.Inference.GenerateRequest;
import pagoda.v1.Inference.GenerateResponse;
import pagoda.v1.Scheduler.FinishReason;
import pagoda.v1.Scheduler.SamplingParams;
import pagoda.v1.Scheduler.Usage;

/** What came of one chat. */
final class Answer {
  final StringBuilder text = new StringBuilder();
  String requestId = "";
  int numMessages;
  int numTokens;
  /** Null when the answer was left before its end. */
  Usage usage;
  private FinishReason finishReason = FinishReason.FINISH_REASON_UNSPECIFIED;

  /** Streams the answer to a conversation and hands each piece of text to {@code print} as it comes. */
  static Answer ask(
      PagodaClient client, Options options, SamplingParams sampling, Chat chat, Consumer<String> print) {
    GenerateRequest request = GenerateRequest.newBuilder()
        .setModel(options.model)
        .setChat(chat)
        .setSampling(sampling)
        .build();
    Answer answer = new Answer();
    client.generate(request, options.deadline, response -> {
      answer.add(response);
      print.accept(response.getText());
      return answer.usage != null || answer.numMessages != options.leaveAfter; // false cancels the call
    });
    return answer;
  }

  private void add(GenerateResponse response) {
    numMessages++;
    if (!response.getRequestId().isEmpty()) {
      requestId = response.getRequestId();
    }
    text.append(response.getText());
    numTokens += response.getTokenIdsCount();
    if (response.getFinishReason() != FinishReason.FINISH_REASON_UNSPECIFIED) {
      finishReason = response.getFinishReason();
    }
    if (response.hasUsage()) {
      usage = response.getUsage();
    }
  }

  /** How it ended, in words. */
  String end() {
    return usage == null
        ? "left after " + numMessages + " messages"
        : numMessages + " messages, " + usage.getCompletionTokens() + " tokens, " + reason();
  }

  /** Why the answer is not whole; empty when it is. */
  String flaw() {
    if (usage == null) {
      return "ended by leaving";
    }
    if (finishReason != FinishReason.FINISH_REASON_STOP
        && finishReason != FinishReason.FINISH_REASON_LENGTH) {
      return "ended by " + reason();
    }
    return numTokens == usage.getCompletionTokens()
        ? ""
        : numTokens + " of " + usage.getCompletionTokens() + " tokens came";
  }

  private String reason() {
    return finishReason.name().replace("FINISH_REASON_", "").toLowerCase(Locale.ROOT);
  }
}
