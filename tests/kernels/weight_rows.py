"""Rows of weights in every type of ggml: random bytes with sane scales, and Gaussian rows that ggml quantized."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize

from hybridkv.formats.weights import WeightFormat
from hybridkv.kernels.weights import Weight
from tests.oracles import ik_ggml

# Where a block keeps float16 scales and minima.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "iq4_nl": (0,), "q2_K": (80, 82),
    "q3_K": (108,), "q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,), "iq4_xs": (0,), "iq2_xxs": (0,), "iq2_xs": (0,),
    "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,), "iq1_s": (0,),
}  # fmt: skip
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Bytes = npt.NDArray[np.uint8]


def with_scales(fmt: WeightFormat, blocks: Bytes, scale: float = 0.01) -> Bytes:
    """The blocks, uint8 [..., block_bytes], with scales of one magnitude for whatever scales they had."""
    rng = np.random.default_rng(3)
    for at in HALVES.get(fmt.name, ()):
        values = (scale * rng.uniform(0.5, 1.5, blocks.shape[:-1])).astype(np.float16)
        blocks[..., at : at + 2] = values[..., None].view(np.uint8)
    if fmt.name == "mxfp4":
        blocks[..., 0] = rng.integers(118, 124, blocks.shape[:-1])
    if fmt.name == "iq1_m":  # the scale's four nibbles lie above those of four words
        bits = (scale * rng.uniform(0.5, 1.5, blocks.shape[:-1])).astype(np.float16).view(np.uint16)
        for i in range(4):
            blocks[..., 49 + 2 * i] = blocks[..., 49 + 2 * i] & 0x0F | (bits >> 4 * i & 15) << 4
    return blocks


def coded(fmt: WeightFormat, n_out: int, n_in: int, seed: int = 0) -> Bytes:
    """Rows [n_out, row_bytes] of random codes, scales and signs; normal values for plain types."""
    rng = np.random.default_rng(seed)
    if fmt.name in PLAIN:
        values = torch.from_numpy(rng.normal(0, 0.02, (n_out, n_in)).astype(np.float32)).to(PLAIN[fmt.name])
        return np.asarray(values.view(torch.uint8).numpy())
    blocks = rng.integers(0, 256, (n_out, n_in // fmt.block, fmt.block_bytes), dtype=np.uint8)
    return with_scales(fmt, blocks).reshape(n_out, -1)


def quantized(fmt: WeightFormat, n_out: int, n_in: int) -> Bytes:
    """Normal rows, rounded by ggml; by gguf-py where ik_llama.cpp has another type of that name."""
    if fmt.name in PLAIN:
        return coded(fmt, n_out, n_in)
    x = np.random.default_rng(1).normal(0, 0.02, (n_out, n_in)).astype(np.float32)
    if fmt.name == "mxfp4":
        return np.asarray(gguf_quantize(x, ggml_type(fmt)), dtype=np.uint8)
    return ik_ggml.quantize(fmt.ggml_type, x, fmt.row_bytes(n_in))


def decoded(fmt: WeightFormat, rows: Bytes) -> npt.NDArray[np.float32]:
    """What gguf-py makes of the rows."""
    if fmt.name == "f32":
        return rows.view(np.float32)
    with np.errstate(all="ignore"):
        return np.asarray(dequantize(rows, ggml_type(fmt)), dtype=np.float32)


def ggml_type(fmt: WeightFormat) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(fmt.ggml_type)


def weight(fmt: WeightFormat, rows: Bytes, n_in: int) -> Weight:
    """One matrix, or a stack of them, at the address that the bytes have."""
    data = torch.from_numpy(rows)
    return Weight(fmt, data if data.dim() == 3 else data[None], n_in)
