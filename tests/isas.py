"""The instruction sets that this processor runs, of those that the native kernels have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from hybridkv.kernels import cpu_native
from tests.thin import pairwise

ISAS: tuple[str, ...] = tuple(cpu_native._native().isas()) if cpu_native.available() is None else ()
INT8_ISAS = tuple(name for name in ISAS if name not in ("portable", "neon", "dotprod"))
"""Those with products of weights by 8-bit activations."""


def isas_with(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize the fixture `isa` and other names: each value of an axis meets each instruction set by default."""
    return pytest.mark.parametrize(f"isa, {names}", pairwise(ISAS, *axes), indirect=["isa"])
