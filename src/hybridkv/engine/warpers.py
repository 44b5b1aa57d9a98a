"""Which tokens may be drawn: the filters that llama-cli has, in its order.

Source: transformers, generation/logits_process.py (the warpers of the same names), which tests compare bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def warp(logits: Tensor, *, top_k: int, top_p: float, min_p: float, temp: float) -> Tensor:
    """Return float32 logits `[B, V]` over `temp`, with the tokens that may not be drawn at -inf.

    0, 1, 0 turn a filter off.
    """
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return logits / temp


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens, and those that are as likely as the last of them."""
    last = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < last, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens that together reach probability p; one at least."""
    ascending, order = logits.sort()
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens of at least p of the most likely one's probability, which stays."""
    probabilities = logits.softmax(-1)
    removed = probabilities < p * probabilities.amax(-1, keepdim=True)
    removed.scatter_(-1, probabilities.argmax(-1, keepdim=True), False)
    return logits.masked_fill(removed, -torch.inf)
