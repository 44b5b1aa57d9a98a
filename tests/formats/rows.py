"""Rows of float32 on which the formats are compared with their oracles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
HEAD_DIM = 128
N_ROWS = 400


def _bf16(x: Floats) -> Floats:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _opposite_extremes(rng: np.random.Generator) -> Floats:
    """Every block holds its largest magnitude with both signs, in either order."""
    x = rng.uniform(-1, 1, (N_ROWS, HEAD_DIM // 32, 32)).astype(np.float32)
    first = rng.integers(0, 16, (N_ROWS, HEAD_DIM // 32, 1))
    sign = rng.choice([-1.0, 1.0], first.shape).astype(np.float32)
    np.put_along_axis(x, first, 2 * sign, axis=-1)
    np.put_along_axis(x, first + 16, -2 * sign, axis=-1)
    return x.reshape(N_ROWS, HEAD_DIM)


def _beside_ties(rng: np.random.Generator) -> Floats:
    """Blocks whose scale is 1 in some format, of values a half, the float above it and the float below it."""
    half = rng.integers(-8, 8, (N_ROWS, HEAD_DIM)).astype(np.float32) + np.float32(0.5)
    toward = rng.choice(np.array([-np.inf, np.inf], np.float32), half.shape)
    x = np.where(rng.random(half.shape) < 0.3, half, np.nextafter(half, toward))
    x[:, ::32] = rng.choice(np.array([127, -8, -16, -32], np.float32), (N_ROWS, 1))
    return x


# Values on a coarse grid, and values of few significant bits, meet rounding ties. No row holds -0.0: the
# oracles differ in the sign of the zero that is the scale of a block of zeros.
ROWS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "normal": lambda rng: rng.standard_normal((N_ROWS, HEAD_DIM)).astype(np.float32),
    "heavy_tailed": lambda rng: rng.standard_t(2.5, (N_ROWS, HEAD_DIM)).astype(np.float32),
    "bf16": lambda rng: _bf16(rng.standard_normal((N_ROWS, HEAD_DIM)).astype(np.float32)),
    "grid": lambda rng: (rng.integers(-40, 41, (N_ROWS, HEAD_DIM)) / 16).astype(np.float32),
    "outlier_channel": lambda rng: (
        rng.standard_normal((N_ROWS, HEAD_DIM)) * np.where(np.arange(HEAD_DIM) % 37 == 5, 300, 1)
    ).astype(np.float32),
    "offset": lambda rng: (100 + rng.standard_normal((N_ROWS, HEAD_DIM))).astype(np.float32),
    "one_sided": lambda rng: -rng.exponential(1.0, (N_ROWS, HEAD_DIM)).astype(np.float32),
    "opposite_extremes": _opposite_extremes,
    "beside_ties": _beside_ties,
    "mixed_magnitudes": lambda rng: (
        rng.standard_normal((N_ROWS, HEAD_DIM)) * 10.0 ** rng.integers(-6, 5, (N_ROWS, 1))
    ).astype(np.float32),
    "subnormal_scales": lambda rng: (rng.standard_normal((N_ROWS, HEAD_DIM)) * 1e-5).astype(np.float32),
    "constant": lambda rng: np.repeat(rng.standard_normal((N_ROWS, 1)), HEAD_DIM, axis=1).astype(np.float32),
    "sparse": lambda rng: (
        np.where(rng.random((N_ROWS, HEAD_DIM)) < 0.05, rng.standard_normal((N_ROWS, HEAD_DIM)), 0)
    ).astype(np.float32),
    "zeros": lambda rng: np.zeros((N_ROWS, HEAD_DIM), np.float32),
}  # fmt: skip


def rows(kind: str) -> Floats:
    """Rows [N_ROWS, HEAD_DIM], the same at every call."""
    return ROWS[kind](np.random.default_rng(1548))
