#!/usr/bin/env node
// A conversation with Pagoda, or many at once; --help explains.

import { createInterface } from 'node:readline/promises';

import type { ChatMessage } from '../build/types/pagoda/v1/ChatMessage.js';
import { PagodaClient } from './client.js';
import { describe, explain, isServiceError } from './errors.js';
import { type Options, UsageError, parse } from './options.js';

/** What came of one chat. */
interface Answer {
  text: string;
  requestId: string;
  numMessages: number;
  numTokens: number;
  /** As the server counts; undefined when the answer was left before its end. */
  completionTokens?: number;
  finishReason: string;
}

/** Streams the answer to a conversation and hands each piece of text to `print` as it comes. */
async function ask(
  client: PagodaClient,
  options: Options,
  messages: ChatMessage[],
  print: (text: string) => void,
): Promise<Answer> {
  const answer: Answer = { text: '', requestId: '', numMessages: 0, numTokens: 0, finishReason: '' };
  const request = { model: options.model, chat: { messages }, sampling: options.sampling };
  for await (const message of client.generate(request, options.deadlineSeconds)) {
    answer.numMessages += 1;
    answer.requestId ||= message.requestId;
    answer.text += message.text;
    answer.numTokens += message.tokenIds.length;
    print(message.text);
    if (message.finishReason !== 'FINISH_REASON_UNSPECIFIED') {
      answer.finishReason = message.finishReason.replace('FINISH_REASON_', '').toLowerCase();
    }
    if (message.usage) answer.completionTokens = message.usage.completionTokens;
    else if (answer.numMessages === options.leaveAfter) break; // which cancels the call
  }
  return answer;
}

function opening(options: Options): ChatMessage[] {
  return options.system ? [{ role: 'system', content: options.system }] : [];
}

async function chat(client: PagodaClient, options: Options): Promise<void> {
  const turns = options.message === undefined ? createInterface({ input: process.stdin }) : [options.message];
  const messages = opening(options);
  for await (const turn of turns) {
    messages.push({ role: 'user', content: turn });
    let answer: Answer;
    try {
      answer = await ask(client, options, messages, (text) => process.stdout.write(text));
    } finally {
      process.stdout.write('\n');
    }
    messages.push({ role: 'assistant', content: answer.text });
    const end =
      answer.completionTokens === undefined
        ? `left after ${answer.numMessages} messages`
        : `${answer.numMessages} messages, ${answer.completionTokens} tokens, ${answer.finishReason}`;
    console.error(`[${answer.requestId}: ${end}]`);
  }
}

/** Why an answer is not whole; empty when it is. */
function flaw({ finishReason, numTokens, completionTokens }: Answer): string {
  if (finishReason !== 'stop' && finishReason !== 'length') return `ended by ${finishReason || 'leaving'}`;
  if (numTokens !== completionTokens) return `${numTokens} of ${completionTokens} tokens came`;
  return '';
}

async function many(client: PagodaClient, options: Options): Promise<boolean> {
  const about = options.message ?? 'Tell me something about the number';
  const started = performance.now();
  let numTokens = 0;
  const one = async (i: number): Promise<string> => {
    const messages = [...opening(options), { role: 'user', content: `${about} ${i}` }];
    const { seed } = options.sampling;
    const sampling = { ...options.sampling, seed: seed === undefined ? undefined : seed + i };
    try {
      const answer = await ask(client, { ...options, sampling }, messages, () => {});
      numTokens += answer.numTokens;
      return flaw(answer);
    } catch (error) {
      if (!isServiceError(error)) throw error;
      return describe(explain(error));
    }
  };
  const flaws = await Promise.all(Array.from({ length: options.chats }, (_, i) => one(i)));
  flaws.forEach((text, i) => text && console.error(`chat ${i}: ${text}`));
  const finished = flaws.filter((text) => !text).length;
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.log(`${finished} of ${options.chats} chats finished, ${numTokens} tokens in ${seconds} s`);
  return finished === options.chats;
}

async function main(): Promise<number> {
  const options = parse(process.argv.slice(2), process.env);
  if (typeof options === 'string') {
    process.stdout.write(options);
    return 0;
  }
  const client = new PagodaClient(options.url, options.token);
  try {
    if (options.command === 'many') return (await many(client, options)) ? 0 : 1;
    await chat(client, options);
    return 0;
  } finally {
    client.close();
  }
}

try {
  process.exitCode = await main();
} catch (error) {
  if (error instanceof UsageError) {
    console.error(`error: ${error.message}\ntry --help`);
    process.exitCode = 2;
  } else if (isServiceError(error)) {
    console.error(`error: ${describe(explain(error))}`);
    process.exitCode = 1;
  } else {
    throw error;
  }
}
