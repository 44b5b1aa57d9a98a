"""An installed package beside NumPy in float64: a product and an attention on every instruction set of the processor.

Run by `.ci/wheels check-arm` with the emulated interpreter, which has no pytest: `python tests/arm/installed.py`.
"""

from __future__ import annotations

import os
import platform
import sys

import gguf
import hybridkv._cpu as extension
import numpy as np
import torch

from hybridkv.formats import FORMATS
from hybridkv.formats.weights import get_weight_format
from hybridkv.kernels import cpu_native
from hybridkv.kernels.case import Segment
from hybridkv.kernels.weights import Weight, matmul

WEIGHT, N_OUT, N_IN, N_TOKENS = "q8_0", 48, 512, 3
CACHE, N_KV_HEADS, GROUP, N_STORED, HEAD_DIM = "q4_0", 2, 4, 131, 64
# Activations are integers of 15 bits there, and values of the cache are sums in float32: both err by less.
LIMIT = 1e-3


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMSE over the RMS of what was wanted."""
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def product(random: np.random.Generator) -> float:
    """The error of x W^T for a quantized W; gguf-py makes and reads the weight."""
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(random.standard_normal((N_OUT, N_IN), np.float32), kind)
    x = random.standard_normal((N_TOKENS, N_IN), np.float32)
    weight = Weight(get_weight_format(WEIGHT), torch.from_numpy(packed.copy())[None], N_IN)
    wanted = x.astype(np.float64) @ gguf.quants.dequantize(packed, kind).astype(np.float64).T
    return relative(matmul(torch.from_numpy(x), weight).numpy(), wanted)


def attention(random: np.random.Generator) -> float:
    """The error of a token's attention over rows that the native code encoded; gguf-py reads their bytes."""
    fmt = FORMATS[CACHE]
    sides, decoded = [], []
    for _ in "kv":
        x = random.standard_normal((1, N_KV_HEADS, N_STORED, HEAD_DIM), np.float32)
        planes = tuple(torch.full_like(p, 0xFF) for p in fmt.encode(torch.from_numpy(x)))
        cpu_native.encode_into(torch.from_numpy(x), CACHE, None, planes, 0)
        sides.append(planes)
        blocks = fmt.to_ggml(planes, HEAD_DIM).numpy()
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0).astype(np.float64)
        assert relative(values, x) < 0.2, "rows do not hold what was stored"
        decoded.append(values.repeat(GROUP, 1))
    q = random.standard_normal((1, N_KV_HEADS * GROUP, 1, HEAD_DIM), np.float32)
    segment = Segment(*sides, fmt, fmt, 0, N_STORED)
    found = cpu_native.attend(torch.from_numpy(q), [segment], HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5).numpy()
    scores = q.astype(np.float64) @ decoded[0].swapaxes(2, 3) * HEAD_DIM**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return relative(found, weights / weights.sum(-1, keepdims=True) @ decoded[1])


def main() -> int:
    """0 if everything is within the limit."""
    print(platform.machine(), sys.version.split()[0], extension.__file__)
    bad = 0
    for isa in extension.isas():
        os.environ["HYBRIDKV_ISA"] = isa
        for call in (product, attention):
            error = call(np.random.default_rng(0))
            bad += not error < LIMIT
            print(f"{cpu_native.isa()}: {call.__name__} within {error:.1e}, limit {LIMIT:.0e}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
