package pagoda.client;

import io.grpc.StatusRuntimeException;
import java.io.BufferedReader;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import pagoda.v1.Inference.Chat;
import pagoda.v1.Inference.ChatMessage;
import pagoda.v1.Scheduler.SamplingParams;

/** A conversation with Pagoda, or many at once; --help explains. */
public final class Main {
  // Of Java's own making they would write in the locale's charset.
  private static final PrintStream OUT = utf8(FileDescriptor.out);
  private static final PrintStream ERR = utf8(FileDescriptor.err);

  private Main() {}

  public static void main(String[] args) throws Exception {
    int status;
    try {
      status = run(Options.parse(args, System.getenv()));
    } catch (Options.UsageException wrong) {
      ERR.println("error: " + wrong.getMessage() + "\ntry --help");
      status = 2;
    } catch (StatusRuntimeException failed) {
      ERR.println("error: " + Failure.of(failed));
      status = 1;
    }
    System.exit(status);
  }

  private static int run(Options options) throws Exception {
    if (options.help) {
      OUT.print(Options.HELP);
      return 0;
    }
    try (PagodaClient client = new PagodaClient(options.url, options.token)) {
      if (options.command.equals("many")) {
        return many(client, options) ? 0 : 1;
      }
      chat(client, options);
      return 0;
    }
  }

  /** Asks one turn after the other: the message, or every line of standard input. */
  private static void chat(PagodaClient client, Options options) throws IOException {
    Chat.Builder conversation = opening(options);
    if (options.message != null) {
      turn(client, options, conversation, options.message);
      return;
    }
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      turn(client, options, conversation, line);
    }
  }

  private static void turn(PagodaClient client, Options options, Chat.Builder conversation, String said) {
    conversation.addMessages(message("user", said));
    Answer answer;
    try {
      answer = Answer.ask(client, options, options.sampling.build(), conversation.build(), text -> {
        OUT.print(text);
        OUT.flush();
      });
    } finally {
      OUT.println();
    }
    conversation.addMessages(message("assistant", answer.text.toString()));
    ERR.println("[" + answer.requestId + ": " + answer.end() + "]");
  }

  /** Streams many chats at once, a thread for each. Returns whether all finished. */
  private static boolean many(PagodaClient client, Options options)
      throws InterruptedException, ExecutionException {
    String about = options.message == null ? "Tell me something about the number" : options.message;
    long started = System.nanoTime();
    ExecutorService threads = Executors.newCachedThreadPool();
    List<Future<Answer>> answers = new ArrayList<>();
    for (int i = 0; i < options.chats; i++) {
      Chat chat = opening(options).addMessages(message("user", about + " " + i)).build();
      SamplingParams.Builder sampling = options.sampling.build().toBuilder();
      if (sampling.hasSeed()) {
        sampling.setSeed(sampling.getSeed() + i);
      }
      answers.add(threads.submit(() -> Answer.ask(client, options, sampling.build(), chat, text -> {})));
    }
    threads.shutdown();
    int finished = 0;
    int numTokens = 0;
    for (int i = 0; i < options.chats; i++) {
      String flaw;
      try {
        Answer answer = answers.get(i).get();
        numTokens += answer.numTokens;
        flaw = answer.flaw();
      } catch (ExecutionException failed) {
        if (!(failed.getCause() instanceof StatusRuntimeException error)) {
          throw failed;
        }
        flaw = Failure.of(error).toString();
      }
      if (flaw.isEmpty()) {
        finished++;
      } else {
        ERR.println("chat " + i + ": " + flaw);
      }
    }
    double seconds = (System.nanoTime() - started) / 1e9;
    String said = "%d of %d chats finished, %d tokens in %.1f s%n";
    OUT.printf(Locale.ROOT, said, finished, options.chats, numTokens, seconds);
    return finished == options.chats;
  }

  private static Chat.Builder opening(Options options) {
    Chat.Builder chat = Chat.newBuilder();
    return options.system.isEmpty() ? chat : chat.addMessages(message("system", options.system));
  }

  private static ChatMessage message(String role, String content) {
    return ChatMessage.newBuilder().setRole(role).setContent(content).build();
  }

  private static PrintStream utf8(FileDescriptor descriptor) {
    return new PrintStream(new FileOutputStream(descriptor), true, StandardCharsets.UTF_8);
  }
}
