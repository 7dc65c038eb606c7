"""`pagoda infer` and `pagoda deploy`: ms-swift's two commands, with its options, dashes or underscores."""

from __future__ import annotations

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# Options are found by either spelling: --model_type and --model-type.
SPELLING: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("_", "-")}


class Switch(StrEnum):
    """ms-swift's switches take a value."""

    true = "true"
    false = "false"


ModelTypeOption = Annotated[
    str, typer.Option(help="A model type such as qwen-7b-chat, or any model's name or path.")
]
IdOrPath = Annotated[str | None, typer.Option(help="Where the model is, if not where its type says.")]
Revision = Annotated[
    str | None, typer.Option("--model-revision", "--revision", help="Branch, tag or commit at the hub.")
]
Backend = Annotated[
    str | None, typer.Option(help="Accepted for the sake of old command lines: Pagoda is the engine.")
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16; fp32, bf16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where a GPU is visible.")]
Utilization = Annotated[float, typer.Option(help="Share of a GPU's memory to fill.")]
TensorParallel = Annotated[int, typer.Option(help="GPUs that hold the model together; on a CPU, processes.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, prompt and output.")]
Token = Annotated[str | None, typer.Option(envvar="PAGODA_TOKEN", help="Bearer token.", show_default=False)]


def infer(
    model_type: ModelTypeOption,
    infer_backend: Backend = None,
    model_id_or_path: IdOrPath = None,
    revision: Revision = None,
    template_type: Annotated[
        str | None, typer.Option(help="Name of a template; by default the type's own.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; by default the template's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 2048,
    do_sample: Annotated[Switch, typer.Option(help="false is greedy.")] = Switch.true,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.3,
    top_k: Annotated[int, typer.Option(help="Keep the k best; 0 keeps all.")] = 20,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of this mass.")] = 0.7,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, max=16, help="Above 1: search instead of drawing.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")] = None,
    stream: Annotated[Switch, typer.Option(help="Print an answer as it comes.")] = Switch.true,
    dtype: Dtype = None,
    device: Device = None,
    gpu_memory_utilization: Utilization = 0.9,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
) -> None:
    """Talk to a model, as with `swift infer`: starts what it needs and ends it, or asks PAGODA_URL."""
    from pagoda.cli.main import reported

    with reported():
        from pagoda.cli.infer import Settings, run

        _explain(infer_backend)
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature if do_sample == Switch.true else 0.0,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "num_beams": num_beams,
            "seed": seed,
        }
        engine: dict[str, Any] = {
            "torch_dtype": dtype,
            "device": device,
            "model_id_or_path": model_id_or_path,
            "revision": revision,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
        }
        run(Settings(model_type, template_type, system, stream == Switch.true, sampling, engine))


def deploy(
    model_type: ModelTypeOption,
    infer_backend: Backend = None,
    model_id_or_path: IdOrPath = None,
    revision: Revision = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that clients ask for; by default the model type.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address of the gateway; others than loopback want an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI routes; 0 takes any port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC service; 0 takes any port.")] = 8001,
    scheduler_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Scheduler; 0 takes any port.")
    ] = 50051,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65500, help="First port of /metrics; 0 takes any.")
    ] = 9400,
    api_key: Token = None,
    dtype: Dtype = None,
    device: Device = None,
    gpu_memory_utilization: Utilization = 0.9,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of logs and control socket; a temporary one.")
    ] = None,
) -> None:
    """Serve a model over the OpenAI routes until Ctrl-C, as with `swift deploy`."""
    from pagoda.cli.main import reported

    with reported():
        from rich.console import Console

        from pagoda.cli.serve import run_folder, serve
        from pagoda.swift.private import spec_of, with_template
        from pagoda.swift.where import folder_of

        _explain(infer_backend)
        if api_key is not None:  # through the environment, because command lines can be read by everyone
            os.environ["PAGODA_TOKEN"] = api_key
        ports: dict[str, Any] = {
            "http_port": port,
            "grpc_port": grpc_port,
            "scheduler_port": scheduler_port,
            "metrics_port": metrics_port,
        }
        spec = spec_of(
            served_model_name or model_type,
            Path(),
            dtype=dtype,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            host=host,
            **ports,
        )
        spec = replace(spec, model=str(folder_of(model_type, model_id_or_path, revision)))
        with run_folder(run_dir) as folder:
            serve(with_template(spec, model_type, folder), folder, Console(stderr=True))


def _explain(backend: str | None) -> None:
    if backend is not None:
        typer.echo(f"infer_backend {backend}: accepted; the engine is Pagoda whatever it says", err=True)
