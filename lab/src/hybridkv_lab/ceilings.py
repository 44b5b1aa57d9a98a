"""The most that this machine does, measured in the run that is compared with it: reads, and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hybridkv.kernels import cpu_native

MEMORY_BYTES = 256 << 20
"""A set that is read out of memory, or out of a last-level cache that is as large."""

_PRODUCTS: tuple[Literal["float", "integer"], ...] = ("float", "integer")

MEANING = {
    "read": "GB of cache read per second by a plain sum, all threads",
    "float": "giga multiply-adds per second of float32 vectors; with AMX at least of bfloat16 tiles, half as many "
    "as int8 tiles do",
    "integer": "the same for codes: int8 tiles with AMX, of which the kernels need two products for each multiply-add "
    "since a query is two int8 terms; pairs of int16 elsewhere",
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best that was seen, on `n_threads` threads.

    Attributes
    ----------
    read_gb_s
        10^9 bytes per second of a set of `MEMORY_BYTES`.
    float_gmac_s, integer_gmac_s
        10^9 multiply-adds per second; see `MEANING`.
    """

    n_threads: int
    read_gb_s: float
    float_gmac_s: float
    integer_gmac_s: float


def measure_ceilings(n_threads: int) -> Ceilings:
    """Probe the machine; takes a few seconds."""
    floats, integers = (cpu_native.probe(kind, n_threads) / 1e9 for kind in _PRODUCTS)
    if cpu_native.isa() == "amx":
        floats = max(floats, integers / 2)
    return Ceilings(n_threads, read_gb_s(MEMORY_BYTES, n_threads), floats, integers)


def read_gb_s(n_bytes: int, n_threads: int) -> float:
    """Measure 10^9 bytes read per second of a set of this size: a small one comes out of a cache."""
    data = torch.ones(max(1024, min(n_bytes, MEMORY_BYTES) // 4))
    return cpu_native.probe("read", n_threads, data) / 1e9
