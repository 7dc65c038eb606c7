"""Models of architectures that are not native, served by the real services: what transformers generates."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gateway_svc.text.tokenizer import load_tokenizer
from tests.support.cluster import Cluster, cluster
from tests.support.data import model_folder
from tests.support.other_models import other_model

NUM_TOKENS = 24
SHARED = (
    "Once upon a time, in a town by the sea, there lived a clockmaker who mended every clock but his own. "
)
PROMPTS = [
    *(SHARED * 3 + ending for ending in ("One day", "他说", "The clocks", "In winter 1984,")),
    "Hello",
    "def f(x):\n    return",
]


def served(folder: Path, kind: str) -> Any:
    """A model of this kind with the embedded model's tokenizer; transformers' own."""
    model = other_model(kind, folder, vocab_size=49152, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder() / name, folder)
    model.generation_config.eos_token_id = None
    return model


def complete(running: Cluster, prompt: str) -> str:
    body = {"model": "other", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{running.url}/v1/completions",
        json.dumps(body | {"ignore_eos": True, "skip_special_tokens": False}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return str(json.load(reply)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


@pytest.mark.parametrize(("kind", "how"), [("gemma3", "flat batches"), ("falcon_alibi", "row by row")])
async def test_the_services_say_what_transformers_generates(tmp_path: Path, kind: str, how: str) -> None:
    folder = tmp_path / "other"
    model = served(folder, kind)
    tokenizer = load_tokenizer(folder)
    sizes = ["--num-blocks", "256", "--max-slots", "8", "--max-batched-tokens", "48"]
    with cluster(model=str(folder), worker_args=sizes, gateway_args=()) as running:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: complete(running, prompt), PROMPTS))
        again = complete(running, PROMPTS[0])  # its first blocks are cached by now
        assert any(how in line for line in running.workers["w0"].text)
        assert running.snapshot().workers[0].num_cached_blocks
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([await tokenizer.encode(prompt, True)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        assert answer == await tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert again == answers[0]
