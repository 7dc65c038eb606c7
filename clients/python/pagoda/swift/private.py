"""A cluster of one's own: what `pagoda serve` runs, on free ports, for as long as it is wanted."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pagoda.cli.cluster import ClusterError, ClusterSpec
from pagoda.cli.serve import Cluster
from pagoda.errors import InvalidRequest
from pagoda.models import served_name
from pagoda.swift.templates import OURS, QWEN_JINJA, get_default_template_type
from pagoda.swift.unsupported import refuse

DTYPES = ("auto", "float32", "bfloat16")
_DTYPE_ALIASES = {
    "AUTO": "auto",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}  # ms-swift's names
# vLLM's engine arguments that have a counterpart: the worker's option.
_WORKER_OPTIONS = {
    "block_size": "--block-size",
    "max_num_batched_tokens": "--max-batched-tokens",
    "max_num_seqs": "--max-slots",
    "num_gpu_blocks_override": "--num-blocks",
}
# Those that change nothing that Pagoda has, whatever they say.
_WITHOUT_EFFECT = frozenset({"disable_custom_all_reduce", "disable_log_stats", "trust_remote_code"})


def visible_device() -> str:
    """cuda where a GPU can be seen, by `CUDA_VISIBLE_DEVICES` as it is now; else cpu.

    Asks the kernel's driver, because importing torch takes seconds.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.strip() in ("", "-1", "NoDevFiles"):
        return "cpu"
    return "cuda" if any(Path("/proc/driver/nvidia/gpus").glob("*")) else "cpu"


def spec_of(
    model_type: str,
    folder: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    max_model_len: int | None = None,
    engine_kwargs: dict[str, Any] | None = None,
    **ports: Any,
) -> ClusterSpec:
    """The cluster that serves `folder` under the name `model_type`. `ports` as in `ClusterSpec`.

    `tensor_parallel_size` GPUs hold the model together; where there is no GPU, so many processes do.

    Raises:
        InvalidRequest: an argument that is not supported.
    """
    if tensor_parallel_size < 1:
        raise InvalidRequest(
            f"tensor_parallel_size={tensor_parallel_size}: there must be a GPU, or at least a process",
            field="tensor_parallel_size",
        )
    dtype = _DTYPE_ALIASES.get(dtype or "", dtype)
    if dtype not in (None, *DTYPES):
        raise InvalidRequest(f"torch_dtype={dtype}: there are {', '.join(DTYPES)}", field="torch_dtype")
    device = device or visible_device()
    name = ("--served-model-name", served_name(model_type))
    options = [*name, *_engine_options(engine_kwargs or {})]
    if device == "cuda":
        options += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
    if max_model_len is not None:
        options += ["--max-model-len", str(max_model_len)]
    spec = ClusterSpec(model=str(folder), device=device, dtype=dtype, worker_args=tuple(options))
    return replace(spec, tensor_parallel=tensor_parallel_size, gateway_args=name, **ports)


def with_template(spec: ClusterSpec, model_type: str, run_dir: Path) -> ClusterSpec:
    """`spec` with a chat template where the model has none and its type's is one of ours."""
    folder = Path(spec.model or "")
    if get_default_template_type(model_type) not in OURS or not folder.is_dir() or _has_template(folder):
        return spec
    path = run_dir / "chat_template.jinja"
    path.write_text(QWEN_JINJA)
    return replace(spec, gateway_args=(*spec.gateway_args, "--chat-template", str(path)))


class PrivateCluster:
    """A running cluster; `stop` ends it. When this process is killed it ends too."""

    def __init__(self, spec: ClusterSpec, model_type: str) -> None:
        self._owner = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="pagoda-"))
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        spec = with_template(spec, model_type, self._folder)
        self._cluster = Cluster(spec, self._folder, Console(stderr=True, force_jupyter=False))
        self.url = self._cluster.spec.grpc_target
        self.http_url = self._cluster.spec.http_url

    def start(self) -> None:
        """Start it and wait until it can serve. Raises ClusterError; then nothing is left running."""
        # The supervisor ends with the thread that started it (that is what Linux watches), so it must be one
        # that lives as long as the cluster, whichever thread of the program we are called from.
        begun = threading.Event()
        threading.Thread(target=self._hold, args=(begun,), daemon=True, name="pagoda-cluster").start()
        try:
            begun.wait()
            if self._failure is not None:
                raise self._failure
            self._cluster.wait_ready()
        except BaseException as error:
            begun.wait()  # interrupted perhaps before there was anything to stop
            self._end(keep_logs=isinstance(error, ClusterError))  # whose message says where they are
            raise

    def _hold(self, begun: threading.Event) -> None:
        try:
            self._cluster.start()
        except BaseException as error:
            self._failure = error  # raised where it is waited for
        finally:
            begun.set()
        self._stopped.wait()

    def explain(self) -> None:
        """Say what became of its processes. Raises ClusterError when it cannot go on."""
        if self._stopped.is_set():
            raise ClusterError("the engine was closed")
        self._cluster.look()

    def stop(self) -> None:
        """End every process and remove the logs. Only the process that started it can."""
        if os.getpid() == self._owner and not self._stopped.is_set():
            self._end(keep_logs=False)

    def _end(self, keep_logs: bool) -> None:
        self._cluster.stop()
        self._stopped.set()
        if not keep_logs:
            shutil.rmtree(self._folder)


def _engine_options(given: dict[str, Any]) -> list[str]:
    options = []
    for name, value in given.items():
        if name in _WORKER_OPTIONS:
            options += [] if value is None else [_WORKER_OPTIONS[name], str(value)]
        elif name not in _WITHOUT_EFFECT:
            refuse("engine_kwargs", {name: value}, {})
    return options


def _has_template(folder: Path) -> bool:
    """Whether a model's folder brings a chat template of its own."""
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and '"chat_template"' in config.read_text()
    return in_config or any(folder.glob("chat_template.*"))
