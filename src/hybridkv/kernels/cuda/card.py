"""The facts of a card that launches depend on: asked of torch, or assumed where a step is rehearsed without one.

A rehearsal runs a step's own code on the CPU, on memory that nobody reads, so that its launches are known before the
weights are there (`recording.py`). Whatever chooses a launch by the device asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Compute capability and multiprocessors of a CUDA device."""

    capability: tuple[int, int]
    n_multiprocessors: int


_ASSUMED: list[CardFacts] = []


def facts_of(device: torch.device) -> CardFacts | None:
    """Return the facts of a device, or those that are assumed; None for what is no CUDA device."""
    return _ASSUMED[-1] if _ASSUMED else _asked(device)


def is_rehearsed() -> bool:
    """Check whether nothing is computed: kernels are recorded, and products of torch may be left out."""
    return bool(_ASSUMED)


@contextmanager
def assumed(facts: CardFacts) -> Iterator[None]:
    """Take every device for such a card."""
    _ASSUMED.append(facts)
    try:
        yield
    finally:
        _ASSUMED.pop()


@lru_cache(maxsize=16)
def _asked(device: torch.device) -> CardFacts | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return CardFacts((found.major, found.minor), found.multi_processor_count)
