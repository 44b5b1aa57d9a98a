"""The speed of encoding rows: in bulk on one core, and one token beside the attention that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hybridkv.formats import FORMATS
from hybridkv.kernels import cpu_native
from hybridkv_lab.shape import Shape
from hybridkv_lab.timing import interleaved

_BULK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Store:
    """Encoding to one type.

    Attributes
    ----------
    bulk_gb_s
        10^9 bytes of float32 input per second on one core.
    token_us
        By decode shape: microseconds to encode K and V of one token.
    of_decode
        By decode shape: that time over the attention of the same type.
    """

    kv_type: str
    bulk_gb_s: float
    token_us: dict[str, float] = field(default_factory=dict)
    of_decode: dict[str, float] = field(default_factory=dict)


def measure_store(
    decode_ms: Mapping[tuple[Shape, str], float], *, n_threads: int, budget_s: float
) -> tuple[Store, ...]:
    """Time every quantized type.

    Parameters
    ----------
    decode_ms
        Milliseconds of decode attention, by shape and type, to compare one token with.
    """
    results = []
    for name, fmt in FORMATS.items():
        if not fmt.is_quantized:
            continue
        bulk_s = _encode_s(Shape(256, 2, 2, _BULK_ROWS, _BULK_ROWS), name, 1, budget_s)
        shapes = [shape for shape, kv_type in decode_ms if kv_type == name]
        token_s = {shape: 2 * _encode_s(shape, name, n_threads, budget_s) for shape in shapes}
        results.append(
            Store(
                name,
                2 * _BULK_ROWS * 256 * 4 / bulk_s / 1e9,
                {str(shape): 1e6 * s for shape, s in token_s.items()},
                {str(shape): 1e3 * s / decode_ms[shape, name] for shape, s in token_s.items()},
            )
        )
    return tuple(results)


def _encode_s(shape: Shape, kv_type: str, n_threads: int, budget_s: float) -> float:
    """Measure the median seconds to encode the new tokens of K, or of V."""
    x = torch.randn(1, shape.n_kv_heads, shape.n_new, shape.head_dim)
    sizes = FORMATS[kv_type].plane_bytes(shape.head_dim)
    planes = [torch.empty(1, shape.n_kv_heads, shape.n_new, size, dtype=torch.uint8) for size in sizes]
    call = lambda: cpu_native.encode_into(x, kv_type, None, planes, 0, n_threads=n_threads)  # noqa: E731
    return interleaved({"encode": call}, budget_s=budget_s)["encode"].median_ms / 1e3
