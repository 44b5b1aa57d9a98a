"""Grids of the weight types whose codes index groups of values: gguf-py's tables, handed to the native kernels once."""

from __future__ import annotations

from functools import cache

import numpy as np

from hybridkv.formats.weights import WeightFormat
from hybridkv.kernels.cpu_native import _native


@cache
def set_grid(fmt: WeightFormat) -> None:
    """Give the native kernels the grid of a weight type: bytes of magnitudes, 8 * value + 16 of signed ones."""
    from gguf import quants

    assert fmt.grid is not None, fmt.name
    owner = getattr(quants, fmt.grid)
    owner.init_grid()
    values = owner.grid.reshape(-1)
    if values.min() < 0:
        values = 8 * values + 16
    table = np.ascontiguousarray(values.astype(np.uint8))
    _native().set_grid(fmt.name, table.ctypes.data, table.nbytes)
