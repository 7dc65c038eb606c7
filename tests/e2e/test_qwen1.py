"""A folder of Qwen's first architecture, with its tiktoken vocabulary, served by the real services."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from gateway_svc.text.tokenizer import load_tokenizer
from tests.e2e.test_swift import CURL
from tests.support.cluster import cluster
from tests.support.qwen1 import as_qwen1, qwen2_twin
from tests.unit.gateway.qwen_tokenizer import qwen_tiktoken

NAME = "qwen-7b-chat"


def answer(folder: Path) -> dict[str, Any]:
    """What the source document's curl gets from a cluster that serves `folder`."""
    with cluster(model=str(folder), worker_args=["--num-blocks", "256"], gateway_args=()) as running:
        curl = CURL.replace("http://localhost:8000", running.url)
        done = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
    reply = json.loads(done.stdout)
    assert reply["model"] == NAME, reply
    return {"usage": reply["usage"], "choices": reply["choices"]}


def test_the_documents_curl_gets_what_its_qwen2_twin_says(tmp_path: Path) -> None:
    twin, qwen1 = tmp_path / "twin" / NAME, tmp_path / "first" / NAME
    qwen2_twin(twin, vocab_size=151936, max_position_embeddings=1024)
    as_qwen1(twin, qwen1)
    (qwen1 / "qwen.tiktoken").write_bytes(qwen_tiktoken().read_bytes())
    tokenizer = load_tokenizer(qwen1)
    tokenizer._hf.save_pretrained(twin)
    tokenizer.close()
    assert not (qwen1 / "tokenizer.json").exists() and (twin / "tokenizer.json").exists()
    first, second = answer(qwen1), answer(twin)
    assert first["choices"][0]["message"]["content"] and first["usage"]["completion_tokens"] > 1
    assert first == second
