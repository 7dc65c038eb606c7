"""`get_vllm_engine`: a model that can be asked, served by a private cluster or by one that runs."""

from __future__ import annotations

import functools
import os
import weakref
from pathlib import Path
from typing import Any

from pagoda.client import Client
from pagoda.errors import InvalidRequest, PagodaError, Unavailable
from pagoda.models import served_name
from pagoda.swift.generation import VllmGenerationConfig
from pagoda.swift.table import entry_of
from pagoda.swift.unsupported import refuse
from pagoda.swift.where import folder_of

# What else ms-swift's function takes, and what it takes it to be.
_NOT_YET: dict[str, Any] = {
    "enable_lora": False,
    "enforce_eager": False,
    "disable_custom_all_reduce": True,
    "limit_mm_per_prompt": None,
    "max_lora_rank": 16,
    "max_loras": 1,
    "pipeline_parallel_size": 1,
}


class Engine:
    """A served model. `generation_config` is what calls use that bring none.

    A private cluster ends with `close()`, when the engine is no longer referred to, and with the program.
    """

    def __init__(self, model_type: str, url: str, cluster: Any = None, model_dir: Path | None = None) -> None:
        self.model_type = model_type
        self.model_dir = model_dir
        self.url = url
        self.generation_config = VllmGenerationConfig()
        self.client = Client(url)
        self._cluster = cluster
        self._tokens: dict[str, int | None] = {}
        self._end = weakref.finalize(self, _end, self.client, cluster)
        self.served_name = self._served_name()

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and answer, in tokens."""
        return next(m.max_model_len for m in self.client.models() if m.name == self.served_name)

    @property
    def http_url(self) -> str | None:
        """Where a private cluster has its OpenAI routes; None where a running one was joined."""
        return None if self._cluster is None else str(self._cluster.http_url)

    @functools.cached_property
    def hf_tokenizer(self) -> LazyTokenizer:
        """The model's tokenizer as transformers knows it, loaded when it is first used."""
        return LazyTokenizer(self.model_type, self.model_dir)

    def single_token(self, text: str) -> int | None:
        """The token id of a text that is one token, such as the end of a turn; None when it is several."""
        if text not in self._tokens:
            ids = self.client.tokenize(text, self.served_name)
            self._tokens[text] = ids[0] if len(ids) == 1 else None
        return self._tokens[text]

    def explain(self, error: PagodaError) -> PagodaError:
        """What to raise for a failed call: why a private cluster cannot go on, if that is the reason."""
        if isinstance(error, Unavailable) and self._cluster is not None:
            self._cluster.explain()
        return error

    def close(self) -> None:
        """End the connection and a private cluster."""
        self._end()

    def _served_name(self) -> str:
        """The name to ask for: the model type, or the last part of one of its ids."""
        served = [model.name for model in self.client.models()]
        entry = entry_of(self.model_type)
        ids = (entry.modelscope, entry.huggingface) if entry else ()
        for name in map(served_name, (self.model_type, *ids)):
            if name in served:
                return name
        raise InvalidRequest(
            f"the server at {self.url} serves {', '.join(served)}, not {self.model_type}", field="model_type"
        )


class LazyTokenizer:
    """A stand-in that loads the tokenizer when it is used: few programs do, and loading takes seconds."""

    def __init__(self, model_type: str, model_dir: Path | None) -> None:
        self._model_type, self._model_dir = model_type, model_dir

    @functools.cached_property
    def _loaded(self) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # Where a server was joined, its model need not be here; a tokenizer is not worth getting all of it.
        folder = self._model_dir or folder_of(self._model_type, may_download=False)
        if folder.is_file():
            return AutoTokenizer.from_pretrained(folder.parent, gguf_file=folder.name, local_files_only=True)
        if not (folder / "tokenizer.json").is_file() and (ranks := folder / "qwen.tiktoken").is_file():
            from gateway_svc.text.qwen_tokenizer import load_qwen_tokenizer  # is where such a model is

            backend, extras = load_qwen_tokenizer(ranks)
            return PreTrainedTokenizerFast(tokenizer_object=backend, **extras)
        # AutoTokenizer imports torch; the other one reads the same file without it.
        has_file = (folder / "tokenizer.json").is_file()
        load: Any = PreTrainedTokenizerFast if has_file else AutoTokenizer
        return load.from_pretrained(folder, local_files_only=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._loaded)

    def __bool__(self) -> bool:
        return True  # without loading it


def get_vllm_engine(
    model_type: str,
    torch_dtype: Any = None,
    *,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    max_num_seqs: int | None = None,
    max_model_len: int | None = None,
    engine_kwargs: dict[str, Any] | None = None,
    use_async: bool = False,
    device: str | None = None,
    **unsupported: Any,
) -> Engine:
    """A model by its type, as in ms-swift: `ModelType.qwen_7b_chat`, or any name or path of a model.

    Where the variable `PAGODA_URL` names a running gateway (gRPC), that is asked and nothing is started; its
    own options count then. Otherwise a private cluster is started on free ports: on the GPU that
    `CUDA_VISIBLE_DEVICES` lets be seen, else on the CPU, unless `device` says which.

    Raises:
        InvalidRequest: an argument that is not supported (`field` is its name), or an unknown model.
        FileNotFoundError: the model is not on this machine and cannot be downloaded.
        ClusterError: the cluster cannot be started.
    """
    refuse("get_vllm_engine", {"use_async": use_async, **unsupported}, {"use_async": False, **_NOT_YET})
    if os.environ.get("PAGODA_URL"):
        return Engine(model_type, os.environ["PAGODA_URL"])
    from pagoda.swift.private import PrivateCluster, spec_of

    seqs = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
    options: dict[str, Any] = {
        "dtype": None if torch_dtype is None else str(torch_dtype).removeprefix("torch."),
        "device": device,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_len": max_model_len,
        "engine_kwargs": {**seqs, **(engine_kwargs or {})},
        **dict.fromkeys(("http_port", "grpc_port", "scheduler_port", "metrics_port"), 0),
    }
    spec_of(model_type, Path(), **options)  # what cannot be done is said before anything is downloaded
    folder = folder_of(model_type, model_id_or_path, revision)
    cluster = PrivateCluster(spec_of(model_type, folder, **options), model_type)
    cluster.start()
    try:
        return Engine(model_type, cluster.url, cluster, folder)
    except BaseException:
        cluster.stop()
        raise


def _end(client: Client, cluster: Any) -> None:
    client.close()
    if cluster is not None:
        cluster.stop()
