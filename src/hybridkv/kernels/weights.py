"""Weights as they lie in a GGUF file, and products with them on the CPU: y = W x, read in place.

Owns the checks that make the native code safe to call. Knows no models and no files: the bytes may be a view of a
mapped file, at any alignment. A model's native step multiplies `Weight` records itself; `matmul` is for tests and
benches, `rows` for an embedding.

A row of activations gets the same bits whatever the number of rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import Scale, get_format
from hybridkv.formats.weights import WeightFormat, get_weight_format
from hybridkv.kernels.cpu_native import _native, allocate, available, encode_into, isa
from hybridkv.kernels.grids import set_grid
from hybridkv.kernels.threads import native_threads

Activations = Literal["int16", "int8"]
"""What quantized weights are multiplied with: 15 bits with a scale per 256 inputs, or 8 with a scale per 32."""

_CHUNK_VALUES = 1 << 21
# Types that floats are rounded to, with the rule of their scales.
_SCALES: Final[Mapping[str, Scale]] = {
    "f32": "absmax",
    "f16": "absmax",
    "bf16": "absmax",
    "q8_0": "absmax",
    "q4_0": "refit",
}

ENCODED: Final = tuple(_SCALES)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A matrix, or a stack of experts, as it lies.

    Parameters
    ----------
    format
        Type of every row.
    data
        uint8 [n_stack, n_out, row_bytes] on the CPU, a matrix's rows side by side; any alignment.
    n_in
        Values in a row.
    """

    format: WeightFormat
    data: Tensor
    n_in: int

    def __post_init__(self) -> None:
        reason = self.format.rejects(self.n_in)
        if reason is not None:
            raise UsageError(reason)
        row_bytes = self.format.row_bytes(self.n_in)
        if self.data.dim() != 3 or self.data.dtype != torch.uint8 or self.data.shape[2] != row_bytes:
            raise UsageError(
                f"{self.format.name} rows of {self.n_in} inputs are uint8 [stack, outputs, {row_bytes}], "
                f"not {self.data.dtype} {list(self.data.shape)}"
            )
        if self.format.grid is not None and available() is None:
            set_grid(self.format)
        if self.data.stride()[1:] != (row_bytes, 1) or self.data.device.type != "cpu":
            raise UsageError("rows of a weight lie side by side in host memory")

    @property
    def n_stack(self) -> int:
        """Matrices in the stack; 1 for a single one."""
        return int(self.data.shape[0])

    @property
    def n_out(self) -> int:
        """Rows of a matrix."""
        return int(self.data.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.data.numel()

    def address(self, expert: int = 0) -> int:
        """Return the address of the first row of a matrix of the stack."""
        assert 0 <= expert < self.n_stack, (expert, self.n_stack)
        return self.data.data_ptr() + expert * int(self.data.stride(0))

    def part(self, begin: int, end: int) -> Weight:
        """View rows [begin, end) of every matrix, without a copy."""
        assert 0 <= begin < end <= self.n_out, (begin, end, self.n_out)
        return Weight(self.format, self.data[:, begin:end], self.n_in)


def rejects(fmt: WeightFormat, n_in: int) -> str | None:
    """Explain why no native product takes rows of `n_in` inputs in this type; None if one does."""
    return available() or fmt.rejects(n_in)


def takes_int8(name: str) -> bool:
    """Check whether a weight type has products with 8-bit activations on this processor."""
    return get_weight_format(name).grid is None and bool(_native().weight_takes_int8(isa(), name))


def int8_rejects() -> str | None:
    """Explain why no weight type has products with 8-bit activations here; None if some do."""
    reason = available()
    if reason is None and not takes_int8("q4_K"):
        return f"{isa()} has no products with 8-bit activations"
    return reason


def matmul(
    x: Tensor,
    weight: Weight,
    *,
    expert: int = 0,
    x_rows: Tensor | None = None,
    out: Tensor | None = None,
    into: Literal["write", "add"] = "write",
    activations: Activations = "int16",
    n_threads: int | None = None,
) -> Tensor:
    """Multiply: X W^T in float32, with one matrix of the stack.

    Activations meet quantized weights as integers of 15 bits with a scale per 256 inputs, float weights as float32. Of
    8 bits, with a scale per 32, where that is asked for and the type `takes_int8`.

    Parameters
    ----------
    x
        Any float dtype [n, n_in].
    expert
        Which matrix of the stack.
    x_rows
        Integers [m]: the row of `x` that each row of the result takes; None for all rows in order.
    out
        float32 [m, n_out], rows contiguous; a new tensor if None.
    into
        Whether `out` is overwritten or added to.

    Returns
    -------
    Tensor
        float32 [m, n_out]. A row of `x` with a NaN or an infinity gives NaNs in its own rows only.
    """
    assert x.dim() == 2 and x.shape[1] == weight.n_in, (x.shape, weight.n_in)
    assert into == "write" or out is not None
    if x.dtype != torch.float32 or x.stride(1) != 1:
        x = x.float().contiguous()
    n_rows = x.shape[0]
    if x_rows is not None:
        _check_ids(x_rows, n_rows)
        x_rows, n_rows = x_rows.to(torch.int32).contiguous(), x_rows.numel()
    if out is None:
        out = torch.empty(n_rows, weight.n_out, dtype=torch.float32)
    assert out.shape == (n_rows, weight.n_out) and out.dtype == torch.float32 and out.device.type == "cpu"
    assert out.stride(1) == 1 or weight.n_out == 1, out.stride()
    _native().weight_linear(
        isa(), weight.format.name, weight.n_out, weight.n_in, weight.address(expert), x.data_ptr(), x.stride(0),
        x.shape[0], 0 if x_rows is None else x_rows.data_ptr(), n_rows, out.data_ptr(), out.stride(0), into == "add",
        activations == "int8", n_threads or native_threads(),
    )  # fmt: skip
    return out


def rows(
    weight: Weight, ids: Tensor, *, expert: int = 0, out: Tensor | None = None, n_threads: int | None = None
) -> Tensor:
    """Decode rows of a matrix, with the bits of gguf-py's dequantize.

    Parameters
    ----------
    ids
        Integers [n], each in 0..n_out-1.
    out
        Where to, contiguous float32 [n, n_in]; a new tensor by default.

    Returns
    -------
    Tensor
        float32 [n, n_in].
    """
    _check_ids(ids, weight.n_out)
    ids = ids.to(torch.int64).contiguous()
    if out is None:
        out = torch.empty(ids.numel(), weight.n_in, dtype=torch.float32)
    assert out.shape == (ids.numel(), weight.n_in) and out.dtype == torch.float32 and out.is_contiguous(), out.shape
    _native().weight_rows(
        weight.format.name, weight.n_out, weight.n_in, weight.address(expert), ids.data_ptr(), ids.numel(),
        out.data_ptr(), n_threads or native_threads(),
    )  # fmt: skip
    return out


def decode(weight: Weight, *, expert: int = 0) -> Tensor:
    """Decode a whole matrix, float32 [n_out, n_in]."""
    return rows(weight, torch.arange(weight.n_out), expert=expert)


def find_bad_block(weight: Weight, *, n_threads: int | None = None) -> tuple[int, int, int] | None:
    """Find the first scale, minimum or plain value that is NaN or infinite: its matrix of the stack, row and block."""
    for expert in range(weight.n_stack):
        row, block = _native().weight_bad_block(
            weight.format.name, weight.n_out, weight.n_in, weight.address(expert), n_threads or native_threads()
        )
        if row >= 0:
            return expert, row, block
    return None


def encode(x: Tensor, name: str) -> Weight:
    """Round a matrix, any float dtype [n_out, n_in], or a stack of them, to a weight type.

    Parameters
    ----------
    name
        One of `ENCODED`. q8_0 takes each block's largest magnitude for its scale, q4_0 a scale refitted to the codes.

    Raises
    ------
    UsageError
        Nothing encodes this type, or n_in is no multiple of its block.
    """
    fmt = get_weight_format(name)
    if fmt.name not in _SCALES:
        raise UsageError(
            f"weights are not rounded to {fmt.name}; allowed: {', '.join(ENCODED)}",
            hint="load a GGUF file that has this type",
        )
    n_in = int(x.shape[-1])
    reason = fmt.rejects(n_in)
    if reason is not None:
        raise UsageError(reason, hint="take bf16 or f32 for this weight")
    stack = x if x.dim() == 3 else x[None]
    data = allocate((*stack.shape[:2], fmt.row_bytes(n_in)))
    flat, done = data.view(-1, data.shape[2]), 0
    for chunk in torch.split(stack.reshape(-1, n_in), max(1, _CHUNK_VALUES // n_in)):
        flat[done : done + len(chunk)] = _encode_rows(chunk, fmt.name)
        done += len(chunk)
    return Weight(fmt, data, n_in)


def _encode_rows(x: Tensor, name: str) -> Tensor:
    fmt = get_format(name)
    n, n_in = x.shape
    planes = [torch.empty(1, 1, n, size, dtype=torch.uint8) for size in fmt.plane_bytes(n_in)]
    encode_into(x.detach()[None, None], name, _SCALES[name], planes, 0)
    return fmt.to_ggml(planes, n_in)[0, 0]


def _check_ids(ids: Tensor, n: int) -> None:
    """Raise unless every id is of one of `n` rows."""
    assert ids.dim() == 1, ids.shape
    check_rows(ids.tolist(), n)


def check_rows(values: Sequence[int], n: int) -> None:
    """Raise unless every number is of one of `n` rows."""
    if values and not (min(values) >= 0 and max(values) < n):
        raise UsageError(f"row ids {min(values)}..{max(values)} of a matrix of {n} rows")


def reencoded(weight: Weight, name: str) -> Weight:
    """Encode the same matrices in another type, a few rows at a time."""
    ids = torch.split(torch.arange(weight.n_out), max(1, _CHUNK_VALUES // weight.n_in))
    parts = [encode(rows(weight, part, expert=e), name) for e in range(weight.n_stack) for part in ids]
    data = torch.cat([part.data for part in parts], dim=1).view(weight.n_stack, weight.n_out, -1)
    return Weight(parts[0].format, data, weight.n_in)
