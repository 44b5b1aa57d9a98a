"""Transformers' logits warpers, in the order in which llama-cli applies them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def warp(logits: Tensor, *, top_k: int, top_p: float, min_p: float, temp: float) -> Tensor:
    """float32 logits `[B, V]` with the tokens that may not be drawn at -inf; 0, 1, 0 turn a filter off."""
    chain = LogitsProcessorList()
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    chain.append(TemperatureLogitsWarper(float(temp)))
    kept: Tensor = chain(torch.empty(logits.shape[0], 0, dtype=torch.long), logits)
    return kept
