"""The commands of `pagoda` and their options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pagoda.cli import swift

app = typer.Typer(
    help="Pagoda serves large language models over gRPC.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option(envvar="PAGODA_URL", help="The gateway's gRPC address.")]
Scheduler = Annotated[str, typer.Option(help="The scheduler's gRPC address.")]
Token = Annotated[str | None, typer.Option(envvar="PAGODA_TOKEN", help="Bearer token.", show_default=False)]
ModelName = Annotated[str, typer.Option("--model", help="Model to ask; the one that is served by default.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the smallest set of this mass.")]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens of an answer.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Host = Annotated[str, typer.Option(help="Address of the gateway; others than loopback want a token.")]
Ranks = Annotated[
    int, typer.Option(min=1, help="GPUs that hold the model of each worker together; on a CPU, processes.")
]
Text = str | None
Number = int | None
Decimal = float | None
File = Path | None


class EarlyStopping(StrEnum):
    """When a beam search ends."""

    false = "false"
    true = "true"
    never = "never"


DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_SCHEDULER = "127.0.0.1:50051"


@app.command()
def serve(
    model: Annotated[
        Text, typer.Option(help="Name, folder or GGUF file; by default the embedded one.")
    ] = None,
    device: Annotated[Text, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[Text, typer.Option(help="auto, float32 or bfloat16.")] = None,
    model_impl: Annotated[
        Text, typer.Option(help="Whose layers to run: auto, native or transformers.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; on a CPU they share its cores.")] = 1,
    tensor_parallel: Ranks = 1,
    host: Host = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI routes; 0 takes any port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC service; 0 takes any port.")] = 8001,
    scheduler_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Scheduler; 0 takes any port.")
    ] = 50051,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65500, help="First port of /metrics; 0 takes any.")
    ] = 9400,
    metrics_alias: Annotated[Text, typer.Option(help="vllm: metrics under vLLM's names, too.")] = None,
    otlp_traces_endpoint: Annotated[
        Text, typer.Option(help="URL that traces are sent to, as http://127.0.0.1:4317.")
    ] = None,
    processes: Annotated[Number, typer.Option(min=1, help="Gateway processes that share its ports.")] = None,
    served_model_name: Annotated[Text, typer.Option(help="Name that clients ask for.")] = None,
    tool_call_parser: Annotated[
        Text, typer.Option(help="How the model writes calls: auto, hermes, llama3, mistral or json.")
    ] = None,
    max_inflight: Annotated[Number, typer.Option(help="Steps sent ahead of their results; 1 is off.")] = None,
    horizon_ms: Annotated[
        Decimal, typer.Option(help="Device time that one step may cover; 0 is off.")
    ] = None,
    stall_ms: Annotated[
        Decimal,
        typer.Option(help="How long prompts may make running streams wait for a step; 0 is no limit."),
    ] = None,
    preemption_mode: Annotated[
        Text, typer.Option(help="What becomes of a preempted request's KV: auto, swap or recompute.")
    ] = None,
    swap_space: Annotated[Decimal, typer.Option(help="GiB of host memory for preempted KV; 0: none.")] = None,
    max_batched_tokens: Annotated[
        Number, typer.Option(help="Token budget of one iteration, for scheduler and workers.")
    ] = None,
    max_waiting: Annotated[Number, typer.Option(help="Requests that may wait; more are refused.")] = None,
    prefix_cache: Annotated[
        bool | None, typer.Option(help="Reuse the KV of prompts that begin alike.")
    ] = None,
    record: Annotated[File, typer.Option(help="Write the scheduler's event record, for replay.")] = None,
    block_size: Annotated[Number, typer.Option(help="Tokens of one KV block.")] = None,
    num_blocks: Annotated[Number, typer.Option(help="KV blocks; by default what fits the memory.")] = None,
    gpu_memory_utilization: Annotated[
        Decimal, typer.Option(help="Share of a GPU's memory that its worker fills; 0.9 by default.")
    ] = None,
    max_slots: Annotated[
        Number,
        typer.Option(help="Most sequences at a time on a worker; by default 64 on a CPU, 512 on CUDA."),
    ] = None,
    max_model_len: Annotated[Number, typer.Option(help="Longest sequence, prompt and output.")] = None,
    threads: Annotated[Number, typer.Option(help="Threads of each CPU worker.")] = None,
    token: Token = None,
    insecure: Annotated[
        bool, typer.Option(help="Allow other addresses than loopback without a token.")
    ] = False,
    config: Annotated[File, typer.Option(help="TOML file with [scheduler], [worker] and [gateway].")] = None,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning or error.")] = None,
    run_dir: Annotated[File, typer.Option(help="Folder of logs and control socket; a temporary one.")] = None,
) -> None:
    """Run scheduler, workers and gateway on this machine until Ctrl-C; what dies is started again."""
    given = dict(locals())
    with reported():
        from rich.console import Console

        from pagoda.cli.serve import serve as run

        if token is not None:  # through the environment, because command lines can be read by everyone
            os.environ["PAGODA_TOKEN"] = token
        run(_spec(given), run_dir, Console(stderr=True))


def _spec(given: dict[str, Any]) -> Any:
    from pagoda.cli.cluster import ClusterSpec

    def flags(*names: str) -> tuple[str, ...]:
        """The options that were given, as the services take them."""
        pairs = [(f"--{n.replace('_', '-')}", str(given[n])) for n in names if given[n] is not None]
        return tuple(part for pair in pairs for part in pair)

    same = (
        "model",
        "device",
        "dtype",
        "workers",
        "tensor_parallel",
        "host",
        "http_port",
        "grpc_port",
        "scheduler_port",
        "metrics_port",
    )
    return ClusterSpec(
        **{name: given[name] for name in same},
        common_args=flags("config", "log_level", "metrics_alias", "otlp_traces_endpoint")
        + (("--insecure",) if given["insecure"] else ()),
        scheduler_args=flags("max_inflight", "horizon_ms", "stall_ms", "max_batched_tokens", "max_waiting")
        + flags("preemption_mode", "record")
        + {None: (), True: ("--prefix-cache",), False: ("--no-prefix-cache",)}[given["prefix_cache"]],
        worker_args=flags("served_model_name", "model_impl", "max_batched_tokens", "block_size", "num_blocks")
        + flags("swap_space", "gpu_memory_utilization", "max_slots", "max_model_len", "threads"),
        gateway_args=flags("served_model_name", "processes", "tool_call_parser"),
    )


@app.command()
def down(
    run_dir: Annotated[Path, typer.Option(help="The --run-dir that the cluster was started with.")] = Path(
        ".run"
    ),
) -> None:
    """Stop a cluster that was started with --run-dir, from another terminal."""
    with reported():
        from pagoda.cli.supervise import stop_running

        typer.echo("stopped" if stop_running(run_dir) else f"no cluster runs in {run_dir}")


@app.command()
def chat(
    system: Annotated[str, typer.Option(help="System message.")] = "",
    url: Url = DEFAULT_URL,
    token: Token = None,
    model: ModelName = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Talk to the model. /reset forgets the conversation, /exit ends; Ctrl-C stops an answer."""
    sampling = _sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    with reported():
        from pagoda.cli.chat import run

        run(url, token, system, {"model": model, **sampling})


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Ask it through the model's chat template.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print figures to standard error at the end.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; may be repeated.")] = None,
    n: Annotated[Number, typer.Option("--n", help="Answers; sample i draws with seed + i.")] = None,
    best_of: Annotated[
        Number, typer.Option(help="Draw so many, print the --n of the best mean logprob a token.")
    ] = None,
    beam_width: Annotated[
        Number, typer.Option(help="Search with so many beams instead of drawing; the --n best results.")
    ] = None,
    length_penalty: Annotated[
        Decimal, typer.Option(help="A beam's score is its logprob over its length to this power.")
    ] = None,
    early_stopping: Annotated[
        EarlyStopping | None,
        typer.Option(
            help="When a search that has enough results ends: true is at once, never is when none can be "
            "bettered, false (the default) is when it looks like that."
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    model: ModelName = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Continue one prompt, printing as it comes; several answers one below the other."""
    sampling = _sampling(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop or None,
        n=n,
        best_of=best_of,
        beam_width=beam_width,
        length_penalty=length_penalty,
        early_stopping={None: None, "false": False, "true": True}.get(early_stopping, "never"),
    )
    with reported():
        from pagoda.cli.generate import run

        run(url, token, prompt, as_chat, stats, {"model": model, **sampling})


@app.command()
def batch(
    file: Annotated[
        Path, typer.Argument(help="One JSON object a line: OpenAI's batch form, or prompt or messages.")
    ],
    output: Annotated[File, typer.Option(help="Results; by default FILE with .out.jsonl.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 32,
    url: Url = DEFAULT_URL,
    token: Token = None,
    model: Annotated[Text, typer.Option(help="Model to ask, whatever the lines say.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Run a file of requests; results in input order. Run it again to go on where it stopped."""
    sampling = _sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    with reported():
        from pagoda.cli.batch import run

        raise typer.Exit(run(file, output, concurrency, url, token, model, sampling))


@app.command()
def bench(
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    requests: Annotated[Number, typer.Option(min=1, help="Requests in all; four for each at a time.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 128,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    json_file: Annotated[File, typer.Option("--json", help="Write the figures to this file too.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Load the server with random prompts and print latencies and throughput."""
    with reported():
        from pagoda.cli.bench import Load, run

        load = Load(
            concurrency, requests or 4 * concurrency, prompt_tokens, output_tokens, shared_prefix, seed
        )
        run(load, url, token, json_file)


@app.command()
def top(
    scheduler: Scheduler = DEFAULT_SCHEDULER,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    token: Token = None,
) -> None:
    """Watch the scheduler: queue, running requests, blocks, tokens per second, and why a request waits."""
    with reported():
        from pagoda.cli.top import run

        run(scheduler, token, interval, once)


@app.command()
def replay(file: Annotated[Path, typer.Argument(help="What the scheduler wrote with --record.")]) -> None:
    """Run the scheduler's core on a record again; fails at the first plan that differs."""
    with reported():
        from pagoda.cli.replay import run

        typer.echo(run(file))


@app.command()
def models(url: Url = DEFAULT_URL, token: Token = None) -> None:
    """List the models that are served."""
    with reported():
        from pagoda.client import Client

        with Client(url, token) as client:
            for m in client.models():
                typer.echo(
                    f"{m.name}  context {m.max_model_len}  vocabulary {m.vocab_size}  {m.dtype} on {m.device}"
                )


app.command(context_settings=swift.SPELLING)(swift.infer)
app.command(context_settings=swift.SPELLING)(swift.deploy)


def _sampling(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def reported() -> Iterator[None]:
    """Errors that a user can mend are one line, not a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int | None:
    from pagoda.cli.cluster import ClusterError
    from pagoda.cli.replay import ReplayError
    from pagoda.errors import PagodaError

    if isinstance(error, ClusterError):
        return error.exit_code
    return 1 if isinstance(error, PagodaError | ReplayError | OSError) else None


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
