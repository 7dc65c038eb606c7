"""Where a bfloat16 model's logits lose their digits: a Llama in plain torch that rounds where it is told.

    python -m benchmarks.gpu_logits_sources --model FOLDER --prompts prompts.json [--out FILE]

Weights are bfloat16's values, everything is computed in float32, and what is named is rounded to bfloat16, as
the worker's path for many rows rounds it: the results of norms, of the projections to q, k and v, of the
rotation, attention's weights and results, gates and ups, their product, and the final norm. Errors are as in
`gpu_logits`, the largest of a row as a share of its largest logit, over the last nine rows of each prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import silu

from benchmarks.gpu_facts import facts
from benchmarks.gpu_logits import MAX_ERROR, NUM_DECODES

EVERYTHING = frozenset(("norm", "qkv", "q", "kv", "weights", "attended", "gate_up", "product", "final"))
# Each is what is left in float32.
SPARED: tuple[frozenset[str], ...] = (
    frozenset(),
    *(frozenset((name,)) for name in sorted(EVERYTHING)),
    frozenset(("qkv", "gate_up")),
    frozenset(("qkv", "gate_up", "final")),
    frozenset(("qkv", "gate_up", "final", "weights")),
)


class Emulated:
    """A Llama of transformers, computed here."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = loaded.float().to(device).eval()
        c = self.model.config
        self.eps, self.num_heads, self.num_kv_heads = (
            c.rms_norm_eps,
            c.num_attention_heads,
            c.num_key_value_heads,
        )
        self.dim = c.hidden_size // c.num_attention_heads
        theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta") or c.rope_theta
        self.frequencies = 1 / theta ** (torch.arange(0, self.dim, 2, device=device).float() / self.dim)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, rounded: frozenset[str]) -> torch.Tensor:
        """float32[1 + NUM_DECODES, V] after the last tokens of `ids`, int64[T]."""

        def keep(name: str, x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16().float() if name in rounded else x

        def norm(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return keep(name, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight)

        model, tokens = self.model.model, len(ids)
        angles = (torch.arange(tokens, device=ids.device)[:, None] * self.frequencies)[:, None]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).triu(1)
        hidden = model.embed_tokens(ids)
        for layer in model.layers:
            x, a = norm("norm", hidden, layer.input_layernorm.weight), layer.self_attn
            q, k, v = (
                keep("qkv", project(x)).view(tokens, -1, self.dim)
                for project in (a.q_proj, a.k_proj, a.v_proj)
            )
            q, k, v = keep("q", rotate(q, angles)), keep("kv", rotate(k, angles)), keep("kv", v)
            group = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.einsum("thd,shd->hts", q, k) * self.dim**-0.5
            weights = (scores.masked_fill(later, float("-inf")) - scores.amax(-1, keepdim=True)).exp()
            total = weights.sum(-1).t()[..., None]
            attended = torch.einsum("hts,shd->thd", keep("weights", weights), v) / total
            hidden = hidden + a.o_proj(keep("attended", attended.reshape(tokens, -1)))
            x, mlp = norm("norm", hidden, layer.post_attention_layernorm.weight), layer.mlp
            gate, up = keep("gate_up", mlp.gate_proj(x)), keep("gate_up", mlp.up_proj(x))
            hidden = hidden + mlp.down_proj(keep("product", silu(gate) * up))
        return norm("final", hidden[-1 - NUM_DECODES :], model.norm.weight) @ self.model.lm_head.weight.t()


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] turned by angles [T, 1, D / 2]."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def main() -> int:
    """Compute and print."""
    parser = argparse.ArgumentParser(description="where logits lose their digits", epilog=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: lists of token ids")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device)
    model = Emulated(options.model, device)
    errors: dict[frozenset[str], list[float]] = {spared: [] for spared in SPARED}
    for prompt in json.loads(options.prompts.read_text())[: options.num_prompts]:
        ids = torch.tensor(prompt, device=device)
        exact = model.logits(ids, frozenset())
        for spared, found in errors.items():
            wrong = (model.logits(ids, EVERYTHING - spared) - exact).abs().amax(-1)
            found += (wrong / exact.abs().amax(-1)).tolist()
    rows = []
    for spared, found in errors.items():
        found.sort()
        row = {
            "spared": sorted(spared),
            "max": found[-1],
            "p99": found[int(0.99 * len(found))],
            "median": found[len(found) // 2],
            "above_bound": sum(error > MAX_ERROR for error in found),
            "rows": len(found),
        }
        rows.append(row)
        figures = f"max {row['max']:.4f}  p99 {row['p99']:.4f}  median {row['median']:.4f}"
        print(
            f"{', '.join(sorted(spared)) or 'all rounded':40} {figures}  above {row['above_bound']}",
            flush=True,
        )
    if options.out:
        result = {"facts": facts(("torch", "transformers"), options.commit), "results": rows}
        options.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
