// What a failed call says: the status, and the google.rpc details in its trailer grpc-status-details-bin.

import { fileURLToPath } from 'node:url';

import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';

import type { BadRequest__Output } from '../build/types/google/rpc/BadRequest.js';
import type { ErrorInfo__Output } from '../build/types/google/rpc/ErrorInfo.js';
import type { RetryInfo__Output } from '../build/types/google/rpc/RetryInfo.js';
import type { Status__Output } from '../build/types/google/rpc/Status.js';
import type { ProtoGrpcType } from '../build/types/status.js';

const PROTOS = fileURLToPath(new URL('../../../protos', import.meta.url));
// With `json`, every google.protobuf.Any comes unpacked, its type's name beside its fields.
const definition = protoLoader.loadSync(['google/rpc/status.proto', 'google/rpc/error_details.proto'], {
  includeDirs: [PROTOS],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
  json: true,
});
const { google } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
const PREFIX = 'type.googleapis.com/google.rpc.';

export interface Failure {
  /** Name of the gRPC status code. */
  code: string;
  message: string;
  /** What is wrong with the request, field by field (google.rpc.BadRequest). */
  fields: { field: string; description: string }[];
  /** A word for programs (google.rpc.ErrorInfo), empty when there is none. */
  reason: string;
  /** When a later try may succeed (google.rpc.RetryInfo). */
  retryAfterSeconds?: number;
}

/** Reads a failed call's status and details. */
export function explain(error: grpc.ServiceError): Failure {
  const failure: Failure = { code: grpc.status[error.code], message: error.details, fields: [], reason: '' };
  const [packed] = error.metadata.get('grpc-status-details-bin');
  if (!(packed instanceof Buffer)) return failure;
  const status: Status__Output = google.rpc.Status.deserialize(packed);
  for (const detail of status.details) {
    if (!protoLoader.isAnyExtension(detail)) continue; // of a type that we do not know
    switch (detail['@type']) {
      case `${PREFIX}BadRequest`:
        failure.fields.push(...(detail as unknown as BadRequest__Output).fieldViolations);
        break;
      case `${PREFIX}ErrorInfo`:
        failure.reason = (detail as unknown as ErrorInfo__Output).reason;
        break;
      case `${PREFIX}RetryInfo`: {
        const delay = (detail as unknown as RetryInfo__Output).retryDelay;
        if (delay) failure.retryAfterSeconds = delay.seconds + delay.nanos / 1e9;
      }
    }
  }
  return failure;
}

/** The failure in lines for people. */
export function describe(failure: Failure): string {
  const lines = [`${failure.code}: ${failure.message}`];
  for (const { field, description } of failure.fields) lines.push(`  field ${field}: ${description}`);
  if (failure.reason) lines.push(`  reason ${failure.reason}`);
  if (failure.retryAfterSeconds !== undefined) lines.push(`  try again in ${failure.retryAfterSeconds} s`);
  return lines.join('\n');
}

/** Whether `error` is a failed call. */
export function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && 'code' in error && 'details' in error && 'metadata' in error;
}
