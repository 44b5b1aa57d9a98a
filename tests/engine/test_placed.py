"""Weights beside a card: what torch is told of a cap on its memory."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
import torch

from hybridkv.engine.placed import CONTEXT_BYTES, limit_card

GIB = 2**30


def test_a_cap_reaches_torch_as_it_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16 * GIB))
    # As torch's own, which takes an index and no plain `cuda`.
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: limits.append((share, operator.index(device))),
    )
    limit_card("cuda", 8 * GIB + CONTEXT_BYTES)
    limit_card("cuda:1", 64 * GIB)
    assert limits == [(0.5, 0), (1.0, 1)]
