"""From files to named tensors: safetensors folders and random weights here, GGUF in `gguf.py`.

A `WeightSource` hands out each tensor once, checked against the shape that the model expects, and at the end
says what the files hold that the model has no place for: both are errors, because a model that is nearly
loaded answers nonsense without a word. Large tensors of a device other than the CPU are filled in place, many
at a time (`stream.py`); they are there when `finish` has returned.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from gpu_worker.models.config import ModelConfig, ModelError, is_native, read_config
from gpu_worker.models.shard import Part, Shard
from gpu_worker.models.stream import Span, Streamer, StreamError

DIGEST_SAMPLES = 64
DIGEST_SAMPLE_BYTES = 4096
# Rotary tables that old checkpoints carry; we compute them from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
# What safetensors calls the types that a device converts from.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Tokens that follow those of a `qwen.tiktoken`.
QWEN_SPECIAL = 208
REPORT_SECONDS = 2.0
# Hears how many bytes of how many are loaded.
Report = Callable[[int, int], None]


class WeightSource(Protocol):
    """Where a model takes its tensors from, under Hugging Face's names."""

    def split(self, shard: Shard) -> None:
        """Give this rank's parts of tensors from now on: shapes are those of the parts then."""
        ...

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, of this shape, in whatever dtype the source has, on the CPU. Raises ModelError."""
        ...

    def fill(self, name: str, out: torch.Tensor) -> None:
        """Write the tensor, of `out`'s shape, into `out`: contiguous, float, on any device but the CPU.

        It need not be there before `finish` returns. Raises ModelError.
        """
        ...

    def finish(self) -> None:
        """Wait for what is to be filled. Raises ModelError for that, and when nothing took a tensor."""
        ...


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    num_bytes: int = 0
    """In the file; 0 where that is not known."""
    span: Span | None = None
    """Its numbers, where they lie in the file as a device can use them."""

    def cut(self, part: Part | None) -> Stored:
        """The same with what a rank holds of it to read: in its bytes and span without the zeros behind the
        part. `shape` stays the whole tensor's. Where the file is mapped, no other pages are touched."""
        if part is None:
            return self
        span, num_bytes = self.span, self.num_bytes * part.count // part.whole
        if span is not None:
            row = math.prod(self.shape[1:]) * span.dtype.itemsize
            first = part.first * (span.dtype.itemsize if part.dim else row)
            span = replace(span, offset=span.offset + first, stride=row if part.dim else 0)
        return replace(self, read=lambda: part.cut(self.read()), num_bytes=num_bytes, span=span)


class Progress:
    """Counts the bytes that have come and says so now and then; any thread may count."""

    def __init__(
        self,
        total: int,
        report: Report,
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` is called with the bytes done and `total`, not more often than `every` seconds."""
        self.total, self._report, self._every, self._clock = total, report, every, clock
        self._done, self._next = 0, clock() + every
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """So many more bytes have come."""
        with self._lock:
            self._done += num_bytes
            now, done = self._clock(), self._done
            if now < self._next:
                return
            self._next = now + self._every
        self._report(done, self.total)


class StoredWeights:
    """A `WeightSource` over tensors in files; nothing is read before it is taken."""

    def __init__(
        self,
        where: Path,
        tensors: Mapping[str, Stored],
        tied: bool,
        report: Report | None = None,
    ) -> None:
        """`report` hears every two seconds how many bytes of how many are loaded."""
        self._where = where
        self._left = {n: t for n, t in tensors.items() if not n.endswith(IGNORED_SUFFIXES)}
        if tied:
            self._left.pop("lm_head.weight", None)  # some checkpoints store the shared tensor twice
        total = sum(stored.num_bytes for stored in self._left.values())
        self._progress = Progress(total, report or (lambda done, of: None), REPORT_SECONDS)
        self._files: dict[str, Path] = {}
        self._streamer: Streamer | None = None
        self._part: Callable[[str], Part | None] = lambda name: None

    def split(self, shard: Shard) -> None:
        """See `WeightSource.split`."""
        self._part = shard.part
        self._progress.total = sum(s.cut(shard.part(name)).num_bytes for name, s in self._left.items())

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """See `WeightSource.take`."""
        stored = self._pop(name, shape)
        try:
            values = stored.read()
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise self._unreadable(stored.file, name, error) from error
        self._progress.add(stored.num_bytes)
        return values

    def fill(self, name: str, out: torch.Tensor) -> None:
        """See `WeightSource.fill`."""
        stored, part = self._pop(name, tuple(out.shape)), self._part(name)
        self._files[name] = stored.file
        self._streamer = self._streamer or Streamer(out.device, self._progress.add)
        try:
            if stored.span is None:
                self._streamer.fill_from(name, stored.read, stored.num_bytes, out)
            else:
                self._streamer.fill(name, stored.span, part.room(out) if part else out)
        except OSError as error:
            raise self._unreadable(stored.file, name, error) from error

    def finish(self) -> None:
        """See `WeightSource.finish`."""
        if self._left:
            name, stored = next(iter(self._left.items()))
            more = f" (and {len(self._left) - 1} more)" if len(self._left) > 1 else ""
            raise self._wrong(f"{stored.file}: tensor {name} has no place in this architecture{more}")
        if self._streamer is not None:
            try:
                self._streamer.finish()
            except StreamError as error:
                raise self._unreadable(self._files[error.name], error.name, error) from error

    def _pop(self, name: str, shape: tuple[int, ...]) -> Stored:
        stored, part = self._left.pop(name, None), self._part(name)
        shape = part.whole_shape(shape) if part else shape
        if stored is None:
            raise self._wrong(f"{self._where}: tensor {name} is missing")
        if stored.shape != shape:
            raise self._wrong(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, "
                f"the config asks for {list(shape)}"
            )
        return stored.cut(part)

    def _unreadable(self, file: Path, name: str, error: Exception) -> ModelError:
        return self._wrong(f"{file}: tensor {name} cannot be read: {error}")

    def _wrong(self, text: str) -> ModelError:
        """Gives up what has not come yet."""
        if self._streamer is not None:
            self._streamer.abandon()
            self._streamer = None
        return ModelError(text)


class DummyWeights:
    """A `WeightSource` that draws each tensor from its name and a seed, whatever the order of taking.

    A device draws other numbers than the CPU does, in the type that it is asked for.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._std = config.initializer_range
        self._seed = seed
        self._part: Callable[[str], Part | None] = lambda name: None

    def split(self, shard: Shard) -> None:
        """See `WeightSource.split`; ranks cut what a single one would draw."""
        self._part = shard.part

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Ones for norms, else normal numbers, float32."""
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        part = self._part(name)
        values = self._draw(name, torch.empty(part.whole_shape(shape) if part else shape))
        return part.cut(values) if part else values

    def fill(self, name: str, out: torch.Tensor) -> None:
        """Normal numbers, drawn where `out` is."""
        part = self._part(name)
        drawn = self._draw(name, out.new_empty(part.whole_shape(tuple(out.shape))) if part else out)
        if part is not None:
            out.copy_(part.cut(drawn))

    def _draw(self, name: str, out: torch.Tensor) -> torch.Tensor:
        seed = zlib.crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator(out.device).manual_seed(seed)
        return out.normal_(0.0, self._std, generator=generator)

    def finish(self) -> None:
        """Nothing can be left over."""


@dataclass(frozen=True)
class ModelFiles:
    """A model as it lies on disk, opened but not read."""

    path: Path
    config: ModelConfig
    digest: str
    vocab_size: int
    """Ids that the tokenizer knows; what the embedding has beyond is padding."""
    weights: Callable[..., Any]
    """Called once with, optionally, what is to hear how many bytes of how many are loaded: a `WeightSource`,
    or what else `build` takes."""
    build: Callable[..., Any] | None = None
    """Makes the model, with `Llama`'s arguments; None for `Llama`."""

    def shard(self, rank: int, size: int) -> Shard:
        """What a rank holds of it. Raises ModelError where the model cannot be split."""
        if self.build is not None and size > 1:
            raise ModelError(
                f"{self.path}: a model on transformers' modules cannot be split over {size} ranks: serve it "
                "with --tensor-parallel 1, or with --model-impl native if its architecture is native"
            )
        return Shard.of(self.config, rank, size)


def open_model(
    path: Path, load_format: str, seed: int, model_impl: str = "native", dtype: torch.dtype = torch.float32
) -> ModelFiles:
    """Look at a Hugging Face folder or a GGUF file.

    Args:
        path: the folder or file.
        load_format: "auto" reads the weights that lie there, "dummy" draws them at random.
        seed: of the random weights.
        model_impl: "native"; "transformers" for its modules, which read the weights now; "auto" for these
            where a folder's architecture is not native.
        dtype: of transformers' modules.

    Raises:
        ModelError: it is no model that can be served; the message names what is wrong with which file.
    """
    if model_impl == "transformers" or (model_impl == "auto" and path.is_dir() and not is_native(path)):
        try:
            backend = importlib.import_module("hf_backend")
        except ImportError as error:
            raise ModelError(f"{path}: not a native model, and transformers is missing: {error}") from error
        return backend.open_model(path, load_format, seed, dtype)
    if path.is_dir():
        config = read_config(path)
        vocab_size = tokenizer_vocab_size(path) or config.vocab_size
        files = safetensors_files(path) if load_format == "auto" else []
        tensors = safetensors_index(files)
        if config.family == "qwen":
            from gpu_worker.models.qwen import llama_names

            tensors = llama_names(tensors)
    elif path.suffix == ".gguf":
        from gpu_worker.models.gguf import open_gguf  # costs 0.3 s, and only these files need it

        source = open_gguf(path)
        config, vocab_size = source.config, source.vocab_size
        files, tensors = [path] if load_format == "auto" else [], source.tensors
    else:
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    digest = model_digest(config, files)

    def weights(report: Report | None = None) -> WeightSource:
        if load_format == "dummy":
            return DummyWeights(config, seed)
        return StoredWeights(path, tensors, config.tie_embeddings, report)

    digest = f"dummy-{seed}-{digest}" if load_format == "dummy" else digest
    return ModelFiles(path, config, digest, min(config.vocab_size, vocab_size), weights)


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: what its index names, else its only file, sorted.

    Raises:
        ModelError: there is none, the index is broken, or a file that it names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is broken: {error!r}") from error
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file} is missing; {index.name} names it")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file")
    if len(files) > 1:
        raise ModelError(f"{folder} holds {len(files)} .safetensors files and no {index.name}")
    return files


def safetensors_index(files: list[Path]) -> dict[str, Stored]:
    """What tensors the files hold. The files stay mapped, so that reading a tensor copies nothing.

    Raises:
        ModelError: a file is truncated or no safetensors file, or a name stands in two files.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")  # checks that the header fits the file
            first, header = _header(file)
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in tensors:
                    raise ModelError(f"{file}: tensor {name} stands in {tensors[name].file.name} too")
                start, end = header[name]["data_offsets"]
                dtype = FLOATS.get(header[name]["dtype"])
                tensors[name] = Stored(
                    file,
                    tuple(header[name]["shape"]),
                    partial(handle.get_tensor, name),
                    end - start,
                    None if dtype is None else Span(file, first + start, dtype),
                )
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is truncated or no safetensors file: {error}") from error
    return tensors


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's numbers begin, and what it says of each tensor."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def tokenizer_vocab_size(folder: Path) -> int | None:
    """The greatest id in `tokenizer.json` or `qwen.tiktoken` plus one; None without these files.

    Raises:
        ModelError: the file is no tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        ranks = folder / "qwen.tiktoken"
        return len(ranks.read_bytes().split()) // 2 + QWEN_SPECIAL if ranks.exists() else None
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        vocab = document["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max((*ids, *(int(token["id"]) for token in document.get("added_tokens", ()))))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no tokenizer: {error!r}") from error


def model_digest(config: ModelConfig, files: list[Path]) -> str:
    """32 hex digits of the config, the files' names and sizes, and samples of their bytes.

    Samples, because hashing every byte of a large model would take longer than loading it; they reach over
    each whole file, so that two checkpoints of one shape differ.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.raw, sort_keys=True, default=str).encode())
    for file in files:
        try:
            size = file.stat().st_size
            digest.update(f"\0{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for i in range(DIGEST_SAMPLES):
                    stream.seek(max(0, (size - DIGEST_SAMPLE_BYTES) * i // (DIGEST_SAMPLES - 1)))
                    digest.update(stream.read(DIGEST_SAMPLE_BYTES))
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    return digest.hexdigest()
