package pagoda.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.math.BigDecimal;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;

/**
 * What a failed call says: its status, and the google.rpc details in its trailer grpc-status-details-bin.
 *
 * @param code name of the gRPC status code
 * @param message for people
 * @param fields of the request that are wrong (google.rpc.BadRequest)
 * @param reason a word for programs (google.rpc.ErrorInfo), empty when there is none
 * @param retryAfter when a later try may succeed (google.rpc.RetryInfo); null when the server did not say
 */
record Failure(
    String code,
    String message,
    List<BadRequest.FieldViolation> fields,
    String reason,
    Duration retryAfter) {

  /** Reads the status and the details of a failed call. */
  static Failure of(StatusRuntimeException error) {
    Status status = error.getStatus();
    List<BadRequest.FieldViolation> fields = new ArrayList<>();
    String reason = "";
    Duration retryAfter = null;
    com.google.rpc.Status rich = StatusProto.fromThrowable(error);
    try {
      for (Any detail : rich.getDetailsList()) {
        if (detail.is(BadRequest.class)) {
          fields.addAll(detail.unpack(BadRequest.class).getFieldViolationsList());
        } else if (detail.is(ErrorInfo.class)) {
          reason = detail.unpack(ErrorInfo.class).getReason();
        } else if (detail.is(RetryInfo.class)) {
          com.google.protobuf.Duration delay = detail.unpack(RetryInfo.class).getRetryDelay();
          retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
        }
      }
    } catch (InvalidProtocolBufferException malformed) {
      throw new IllegalStateException("the server's error details are malformed", malformed);
    }
    return new Failure(status.getCode().name(), message(status), fields, reason, retryAfter);
  }

  private static String message(Status status) {
    String message = status.getDescription() == null ? "" : status.getDescription();
    // Where the connection failed, gRPC's description is "io exception" and the cause says what happened.
    return status.getCause() == null ? message : message + ": " + status.getCause().getMessage();
  }

  /** The failure in lines for people. */
  @Override
  public String toString() {
    StringBuilder lines = new StringBuilder(code).append(": ").append(message);
    for (BadRequest.FieldViolation violation : fields) {
      lines.append("\n  field ").append(violation.getField()).append(": ").append(violation.getDescription());
    }
    if (!reason.isEmpty()) {
      lines.append("\n  reason ").append(reason);
    }
    if (retryAfter != null) {
      BigDecimal seconds = BigDecimal.valueOf(retryAfter.toMillis(), 3).stripTrailingZeros();
      lines.append("\n  try again in ").append(seconds.toPlainString()).append(" s");
    }
    return lines.toString();
  }
}
