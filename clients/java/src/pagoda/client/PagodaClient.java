package pagoda.client;

import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.Iterator;
import java.util.concurrent.TimeUnit;
import java.util.function.Predicate;
import pagoda.v1.Inference.GenerateRequest;
import pagoda.v1.Inference.GenerateResponse;
import pagoda.v1.InferenceServiceGrpc;
import pagoda.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;

/** A thin client of pagoda.v1.InferenceService over one channel; many threads may use it at once. */
final class PagodaClient implements AutoCloseable {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  private final ManagedChannel channel;
  private final InferenceServiceBlockingStub stub;

  /**
   * @param address host:port of the gateway's gRPC
   * @param token sent as a bearer token unless empty
   */
  PagodaClient(String address, String token) {
    channel = ManagedChannelBuilder.forTarget(address).usePlaintext().build();
    Metadata headers = new Metadata();
    if (!token.isEmpty()) {
      headers.put(AUTHORIZATION, "Bearer " + token);
    }
    stub = InferenceServiceGrpc.newBlockingStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }

  /**
   * Runs one request and hands what comes to {@code take}, until the end or until {@code take} returns
   * false or throws: then the request is cancelled at the server.
   *
   * @param deadline from now on, after which the call fails with DEADLINE_EXCEEDED; null for none
   * @throws StatusRuntimeException when the call fails; {@link Failure#of} reads its details
   */
  void generate(GenerateRequest request, Duration deadline, Predicate<GenerateResponse> take) {
    // The call lives in this context: when the context is cancelled, the call is.
    Context.CancellableContext context = Context.current().withCancellation();
    Context before = context.attach();
    try {
      InferenceServiceBlockingStub call = deadline == null
          ? stub
          : stub.withDeadlineAfter(deadline.toNanos(), TimeUnit.NANOSECONDS);
      Iterator<GenerateResponse> responses = call.generate(request);
      while (responses.hasNext() && take.test(responses.next())) {
        continue;
      }
    } finally {
      context.detach(before);
      context.cancel(null); // nothing happens where the call has ended
    }
  }

  @Override
  public void close() {
    channel.shutdownNow();
  }
}
