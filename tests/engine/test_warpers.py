"""Filters against Transformers' warpers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper

from hybridkv.engine import filters

_NONE = torch.empty(3, 0, dtype=torch.long)


def logits(kind: str) -> torch.Tensor:
    found = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * 4
    if kind == "ties":
        return found.round()
    if kind == "one certain token":
        found[:, 17] = 1e4
    return found


@pytest.mark.parametrize("kind", ["plain", "ties", "one certain token"])
@pytest.mark.parametrize("p", [0.95, 0.5, 1e-6])
def test_top_p(kind: str, p: float) -> None:
    x = logits(kind)
    assert torch.equal(filters.top_p(x, p), TopPLogitsWarper(p)(_NONE, x))


@pytest.mark.parametrize("kind", ["plain", "ties", "one certain token"])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p(kind: str, p: float) -> None:
    x = logits(kind)
    assert torch.equal(filters.min_p(x, p), MinPLogitsWarper(p)(_NONE, x))
