"""Queries, keys and values of a model's attention layers on held-out text, for the benches that store them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from hybridkv.engine.load import describe, load
from hybridkv.hf import cache_argument

TEXT = Path(__file__).parent / "data" / "heldout_long.txt"


@dataclass(frozen=True, slots=True)
class Rows:
    """One layer: float32 q `[Hq, T, D]`, k and v `[Hkv, S, D]`, in order of the tokens; `scale` of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@torch.inference_mode()
def attention_rows(path: Path, n_tokens: int = 1024) -> list[Rows]:
    """What the attention layers of a GGUF model see on the first tokens of the text, after RoPE."""
    layers: list[Rows] = []

    def record(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        del module, mask
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        layers.append(Rows(q[0].clone(), k[0].clone(), v[0].clone(), scale))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    transformers.utils.logging.set_verbosity_error()
    AttentionInterface.register("record", record)
    loaded = load(describe(path), dtype=torch.float32, device="cpu")
    assert loaded.tokenizer is not None
    loaded.model.set_attn_implementation("record")
    ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[: 16 * n_tokens])[:n_tokens]])
    loaded.model(ids, **{cache_argument(loaded.model): DynamicCache(config=loaded.model.config)})
    return layers
