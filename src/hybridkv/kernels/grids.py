"""Grids of the weight types whose codes index groups of values: gguf-py's tables, for CPU and GPU kernels."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from hybridkv.formats.weights import WeightFormat
from hybridkv.kernels.cpu_native import _native


def grid_bytes(fmt: WeightFormat) -> npt.NDArray[np.uint8]:
    """Return the grid of a weight type: bytes of magnitudes, 8 * value + 16 of signed values; `[entries, values]`."""
    from gguf import quants

    assert fmt.grid is not None, fmt.name
    owner = getattr(quants, fmt.grid)
    owner.init_grid()
    values = owner.grid.reshape(owner.grid_shape)
    if values.min() < 0:
        values = 8 * values + 16
    return np.ascontiguousarray(values.astype(np.uint8))


@cache
def set_grid(fmt: WeightFormat) -> None:
    """Give the native kernels the grid of a weight type."""
    table = grid_bytes(fmt)
    _native().set_grid(fmt.name, table.ctypes.data, table.nbytes)
