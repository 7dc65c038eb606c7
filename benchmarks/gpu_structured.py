"""What grammars cost: 64 rows decode, 8 of them follow a JSON schema, beside the same run without grammars.

    python -m benchmarks.gpu_structured --tokenizer FOLDER --out structured.json          # both shapes, a GPU
    python -m benchmarks.gpu_structured --model FOLDER --tokenizer FOLDER --load-format auto \\
        --device cpu --rows 8 --constrained 2 --answer-len 48 --settle-s 0                # to try it

Scheduler and worker are processes of their own; this one is their client by token ids over one Session, and
tells the vocabulary as a gateway does: the tokenizer's in FOLDER, or one made up. A row's time per output
token is from its first token's arrival to its last one's. Runs with and without grammars take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from benchmarks.gpu_flags import add_service_flags, described, start, worker_command
from benchmarks.gpu_models import PRESETS, config_folder
from benchmarks.gpu_services import ServiceError, Services, reporting
from benchmarks.workload import END_ID, LOWEST_ID, fixed
from gateway_svc.text.grammars import ModelGrammars, json_schema_grammar
from gateway_svc.text.tokenizer import load_tokenizer
from pagoda import transport
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

OTHERS_BAR, CONSTRAINED_BAR = 1.05, 1.15
PACKAGES = ("torch", "triton", "llguidance", "grpcio", "numpy")
# Never done before any answer's last token, and made of everything that makes masks: names, strings, numbers.
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 2000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 24},
            "kind": {"enum": ["harbour", "mountain", "market", "museum"]},
            "visitors": {"type": "integer", "minimum": 0, "maximum": 100000},
            "rating": {"type": "number", "minimum": 0, "maximum": 5},
            "opened": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "visitors", "rating", "opened", "tags"],
        "additionalProperties": False,
    },
}


class RunError(Exception):
    """A run did not go as it must."""


class Judge:
    """Knows whether an output follows the grammar."""

    bos_token_id = None

    def __init__(self, vocabulary: pb.Vocabulary, grammar: str) -> None:
        self.vocabulary, self.grammar = vocabulary, grammar
        self.tokens, self.special_token_ids = list(vocabulary.tokens), list(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_id
        self._tokenizer = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.greedy_tokenize(text)

    def check(self, output: Sequence[int]) -> None:
        """Raises RunError unless a fresh matcher takes every token."""
        matcher = LLMatcher(self._tokenizer, self.grammar)
        taken = matcher.try_consume_tokens(list(output))
        if taken != len(output):
            raise RunError(f"token {taken} of an output does not follow the grammar: {matcher.get_error()}")


def made_up(vocab_size: int, eos: int) -> pb.Vocabulary:
    """A vocabulary where there is no tokenizer: single bytes, then words, and some signs and numbers."""
    generator = random.Random(0)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        letters = generator.choices(("etaoinshrdlucmfw", '{}[]":, \n', "0123456789"), (92, 6, 2))[0]
        word = "".join(generator.choices(letters, k=generator.randint(2, 9)))
        tokens.append((generator.choice(("", " ")) + word).encode())
    tokens[eos] = b"<eos>"
    return pb.Vocabulary(tokens=tokens[:vocab_size], special_token_ids=[eos], eos_token_id=eos)


class Client:
    """A session with the scheduler at `address`."""

    def __init__(self, address: str, limit_s: float) -> None:
        self._address, self._limit_s = address, limit_s
        self._next_handle = 1

    async def __aenter__(self) -> Client:
        self._channel = grpc.aio.insecure_channel(self._address, options=transport.CHANNEL_OPTIONS)
        stub: Any = rpc.SchedulerServiceStub(self._channel)
        self._call = stub.Session()
        await self._call.write(pb.SessionRequest(hello=pb.SessionHello(client_name="benchmark")))
        self.model = (await self._read()).start.model
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        await self._channel.close()

    async def tell(self, vocabulary: pb.Vocabulary) -> None:
        """Tell what tokens stand for."""
        await self._call.write(pb.SessionRequest(vocabulary=vocabulary))

    async def _read(self) -> pb.SessionResponse:
        try:
            async with asyncio.timeout(self._limit_s):
                reply = await self._call.read()
        except TimeoutError:
            raise RunError(f"nothing came for {self._limit_s:g} s") from None
        if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise RunError(f"the session ended: {await self._call.details()}")
        return reply

    async def run(
        self, prompts: Sequence[list[int]], answer_len: int, grammars: Sequence[str]
    ) -> tuple[list[float], list[list[int]]]:
        """Run all at once; each row's seconds per output token, and its tokens."""
        handles = range(self._next_handle, self._next_handle + len(prompts))
        self._next_handle += len(prompts)
        batch = pb.SubmitBatch(handles=handles)
        for i, (prompt, grammar) in enumerate(zip(prompts, grammars, strict=True)):
            low, high = LOWEST_ID, min(END_ID, self.model.vocab_size)
            sampling = pb.SamplingParams(
                temperature=1, seed=i, max_tokens=answer_len, ignore_eos=True, grammar=grammar
            )
            ids = [low + token % (high - low) for token in prompt]
            batch.requests.append(pb.GenerateTokensRequest(prompt_token_ids=ids, sampling=sampling))
        first, last = [0.0] * len(handles), [0.0] * len(handles)
        tokens: list[list[int]] = [[] for _ in handles]
        await self._call.write(pb.SessionRequest(submit=batch))
        num_open = len(handles)
        while num_open:
            out = (await self._read()).output
            now = time.perf_counter()
            if out.failures:
                raise RunError(f"{len(out.failures)} requests failed: {out.failures[0].message}")
            start = 0
            for row, handle in enumerate(out.handles):
                place, count = handle - handles.start, out.num_tokens[row] if out.num_tokens else 1
                first[place] = first[place] or now
                last[place] = now
                tokens[place] += out.tokens[start : start + count]
                start += count
            num_open -= len(out.usage_handles)
        if short := [len(output) for output in tokens if len(output) != answer_len]:
            raise RunError(f"{len(short)} answers have another length than {answer_len}: {short[0]}")
        return [(b - a) / (answer_len - 1) for a, b in zip(first, last, strict=True)], tokens


def spread(num_rows: int, num_constrained: int) -> list[bool]:
    """Which rows follow the grammar: spread evenly."""
    return [i * num_constrained // num_rows != (i + 1) * num_constrained // num_rows for i in range(num_rows)]


async def measure(address: str, o: argparse.Namespace) -> dict[str, Any]:
    """One shape: both kinds of runs, in turn."""
    async with Client(address, o.limit_s) as client:
        if o.tokenizer:
            grammars = ModelGrammars(load_tokenizer(o.tokenizer))
            grammar, vocabulary = grammars.compile(lambda: json_schema_grammar(SCHEMA), "", client.model)
        else:
            grammar = json_schema_grammar(SCHEMA)
            vocabulary = made_up(client.model.vocab_size, client.model.eos_token_ids[0])
        judge = Judge(vocabulary, grammar)
        await client.tell(vocabulary)
        which = spread(o.rows, o.constrained)
        kinds = {"without": [""] * o.rows, "with": [grammar if constrained else "" for constrained in which]}
        groups = {"others": False, "constrained": True}
        times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in groups} for kind in kinds}
        for repeat in range(o.warm + o.repeat):
            for kind, asked in kinds.items():
                prompts = [prompt for prompt, _ in fixed(o.rows, o.prompt_len, 1, seed=repeat)]
                taken, tokens = await client.run(prompts, o.answer_len, asked)
                for output, given in zip(tokens, asked, strict=True):
                    if given:
                        judge.check(output)
                if repeat >= o.warm:
                    for group, wanted in groups.items():
                        mine = [t for t, follows in zip(taken, which, strict=True) if follows == wanted]
                        times[kind][group].append(statistics.median(mine))
    medians = {
        k: {group: 1e3 * statistics.median(values) for group, values in by.items()} for k, by in times.items()
    }
    ratios = {g: medians["with"][g] / medians["without"]["others"] for g in ("others", "constrained")}
    return {
        "rows": o.rows,
        "constrained": o.constrained,
        "ms_per_token": medians,
        "ratios": ratios,
        "within_bars": ratios["others"] <= OTHERS_BAR and ratios["constrained"] <= CONSTRAINED_BAR,
        "repeats": times,
        "vocabulary": str(o.tokenizer or "made up"),
    }


def services_for(model: Path, o: argparse.Namespace) -> dict[str, Any]:
    """Start scheduler and worker over one model, measure, and end them."""
    services = Services(o.logs / model.name)
    with services:
        start(o, services, worker_command(o, model), "--no-prefix-cache")
        time.sleep(o.settle_s)
        with reporting(services):
            row = asyncio.run(measure(services.address, o))
        services.check()
    return row


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="what grammars cost", epilog=__doc__)
    p.add_argument("--presets", default="qwen2.5-7b,qwen2.5-0.5b", help=",".join(PRESETS))
    p.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json")
    add_service_flags(p, logs=Path("/tmp/pagoda-structured"), slots=64, ready_s=300.0, settle_s=15.0)
    p.add_argument("--rows", type=int, default=64)
    p.add_argument("--constrained", type=int, default=8)
    p.add_argument("--prompt-len", type=int, default=128)
    p.add_argument("--answer-len", type=int, default=256)
    p.add_argument("--warm", type=int, default=2, help="runs of each kind before those that count")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--limit-s", type=float, default=300.0, help="longest time without anything coming")
    options = p.parse_args()
    options.slots = max(options.rows, options.slots)
    return options


def main() -> int:
    """Run it; 1 where a run failed, 2 where a bar was missed."""
    o = parse()
    result: dict[str, Any] = described(o, PACKAGES) | {"shapes": {}}
    models = [o.model] if o.model else [config_folder(name, o.base) for name in o.presets.split(",")]
    for model in models:
        try:
            row = services_for(model, o)
        except (ServiceError, RunError) as error:
            print(f"{model.name}: {error}", file=sys.stderr)
            return 1
        result["shapes"][model.name] = row
        if o.out:
            o.out.write_text(json.dumps(result, indent=1))
        shown = {k: {g: round(ms, 3) for g, ms in by.items()} for k, by in row["ms_per_token"].items()}
        print(
            f"{model.name}: ms per token {shown}; others x{row['ratios']['others']:.3f} (at most "
            f"{OTHERS_BAR}), constrained x{row['ratios']['constrained']:.3f} (at most {CONSTRAINED_BAR})",
            flush=True,
        )
    return 0 if all(row["within_bars"] for row in result["shapes"].values()) else 2


if __name__ == "__main__":
    raise SystemExit(main())
