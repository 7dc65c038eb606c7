// A thin client of pagoda.v1.InferenceService: one channel, answers as async iterators.

import { fileURLToPath } from 'node:url';

import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';

import type { ProtoGrpcType } from '../build/types/inference.js';
import type { GenerateRequest } from '../build/types/pagoda/v1/GenerateRequest.js';
import type { GenerateResponse__Output } from '../build/types/pagoda/v1/GenerateResponse.js';
import type { InferenceServiceClient } from '../build/types/pagoda/v1/InferenceService.js';

export type Message = GenerateResponse__Output;

const PROTOS = fileURLToPath(new URL('../../../../protos', import.meta.url));
// The same options as in package.json, where the types are generated.
const definition = protoLoader.loadSync('pagoda/v1/inference.proto', {
  includeDirs: [PROTOS],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { pagoda } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;

export class PagodaClient {
  readonly #stub: InferenceServiceClient;
  readonly #token: string;

  /** `address` is host:port of the gateway's gRPC; `token` is sent as a bearer token unless empty. */
  constructor(address: string, token = '') {
    this.#stub = new pagoda.v1.InferenceService(address, grpc.credentials.createInsecure());
    this.#token = token;
  }

  /**
   * Runs one request and yields what comes. Leaving the loop (break, return, throw) cancels the request at
   * the server. After `deadlineSeconds`, counted from here, the call fails with DEADLINE_EXCEEDED.
   *
   * Throws grpc.ServiceError; `explain` of errors.ts reads its details.
   */
  async *generate(request: GenerateRequest, deadlineSeconds?: number): AsyncGenerator<Message, void> {
    const metadata = new grpc.Metadata();
    if (this.#token) metadata.set('authorization', `Bearer ${this.#token}`);
    const deadline = deadlineSeconds === undefined ? Infinity : Date.now() + deadlineSeconds * 1000;
    const call = this.#stub.Generate(request, metadata, { deadline });
    try {
      yield* call as AsyncIterable<Message>;
    } finally {
      call.cancel(); // nothing happens where the call has ended
    }
  }

  close(): void {
    this.#stub.close();
  }
}
