"""The filters against Transformers' warpers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybridkv.engine.warpers import warp

_NONE = torch.empty(3, 0, dtype=torch.long)


def logits(kind: str) -> torch.Tensor:
    found = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 4
    if kind == "ties":
        return found.round()
    if kind == "one certain token":
        found[:, 17] = 1e4
    return found


@pytest.mark.parametrize("kind", ["plain", "ties", "one certain token"])
@pytest.mark.parametrize("top_k", [0, 1, 40, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_in_llama_clis_order(kind: str, top_k: int, top_p: float, min_p: float) -> None:
    chain = LogitsProcessorList()
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    chain.append(TemperatureLogitsWarper(0.7))
    x = logits(kind)
    assert torch.equal(warp(x, top_k=top_k, top_p=top_p, min_p=min_p, temp=0.7), chain(_NONE, x))
