// The command line.

import { parseArgs } from 'node:util';

const HELP = `usage: pagoda-client chat [options] [MESSAGE]
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
`;

export interface Options {
  command: 'chat' | 'many';
  url: string;
  token: string;
  model: string;
  system: string;
  sampling: { temperature?: number; maxTokens?: number; seed?: number; ignoreEos?: boolean };
  deadlineSeconds?: number;
  leaveAfter?: number;
  chats: number;
  message?: string;
}

export class UsageError extends Error {}

/** Reads the arguments; a string is the help that was asked for. Throws UsageError. */
export function parse(args: string[], env: NodeJS.ProcessEnv): Options | string {
  const text = { type: 'string' } as const;
  const { values, positionals } = strict(() =>
    parseArgs({
      args,
      allowPositionals: true,
      options: {
        url: text,
        model: text,
        system: text,
        temperature: text,
        'max-tokens': text,
        seed: text,
        'ignore-eos': { type: 'boolean' },
        deadline: text,
        'leave-after': text,
        chats: text,
        help: { type: 'boolean' },
      },
    }),
  );
  if (values.help) return HELP;
  const [command, message, ...more] = positionals;
  if (command !== 'chat' && command !== 'many') throw new UsageError('the first word must be chat or many');
  if (more.length) throw new UsageError(`one MESSAGE, please, in quotes: ${more.join(' ')} is too much`);
  return {
    command,
    url: values.url ?? (env['PAGODA_URL'] || '127.0.0.1:8001'),
    token: env['PAGODA_TOKEN'] ?? '',
    model: values.model ?? '',
    system: values.system ?? '',
    sampling: {
      temperature: number('temperature', values.temperature),
      maxTokens: whole('max-tokens', values['max-tokens']),
      seed: whole('seed', values.seed),
      ignoreEos: values['ignore-eos'],
    },
    deadlineSeconds: number('deadline', values.deadline),
    leaveAfter: whole('leave-after', values['leave-after']),
    chats: whole('chats', values.chats) ?? 100,
    message,
  };
}

function strict<T>(read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

function number(name: string, given: string | undefined): number | undefined {
  if (given === undefined) return undefined;
  const value = Number(given);
  if (given.trim() === '' || !Number.isFinite(value)) {
    throw new UsageError(`--${name} ${given}: not a number`);
  }
  return value;
}

function whole(name: string, given: string | undefined): number | undefined {
  const value = number(name, given);
  if (value === undefined || (Number.isSafeInteger(value) && value >= 0)) return value;
  throw new UsageError(`--${name} ${given}: not a whole number`);
}
