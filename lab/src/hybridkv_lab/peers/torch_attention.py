"""torch's scaled_dot_product_attention over float32 rows: what a cache without quantization costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv_lab.peers import Found
from hybridkv_lab.shape import Shape


def find() -> Found:
    """Find torch, which is always here."""
    about = f"torch {torch.__version__}, scaled_dot_product_attention in float32"
    return Found("torch", about, torch.__file__, torch.__version__, "float32")


def attention(shape: Shape, q: Tensor) -> Callable[[], Tensor]:
    """Build a call of it over random rows."""
    k, v = (torch.randn(1, shape.n_kv_heads, shape.n_stored, shape.head_dim) for _ in range(2))
    mask = None
    if shape.n_new > 1:
        mask = torch.ones(shape.n_new, shape.n_stored, dtype=torch.bool).tril(shape.n_stored - shape.n_new)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
