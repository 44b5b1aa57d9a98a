"""Attention in float64, written for reading: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q `[B, Hq, T, D]`, k `[B, Hkv, S, D]`, v `[B, Hkv, S, Dv]` -> float64 `[B, Hq, T, Dv]`; zeros where nothing
    is seen. The T queries are the last T of the S rows; `mask` (True = attend) replaces causality and window."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    n_new, n_rows = q.shape[2], k.shape[2]
    if mask is None:
        position = torch.arange(n_rows - n_new, n_rows).unsqueeze(-1)
        row = torch.arange(n_rows)
        mask = row <= position
        if window is not None:
            mask = mask & (row > position - window)
    mask = mask.expand(q.shape[0], q.shape[1], n_new, n_rows)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(n_new):
                seen: Tensor | slice = mask[b, h, t].nonzero()[:, 0]
                n_seen = len(seen)
                if not n_seen:
                    continue
                first, last = int(seen[0]), int(seen[-1])
                if n_seen == last - first + 1:  # a slice of them is no copy
                    seen = slice(first, last + 1)
                scores = k[b, h, seen] @ q[b, h, t] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].double().view(1)])
                weights = torch.softmax(scores, 0)[:n_seen]
                out[b, h, t] = weights @ v[b, h, seen]
    return out


def relative_rmse(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`."""
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
