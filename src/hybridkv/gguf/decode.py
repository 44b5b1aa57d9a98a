"""Tensor bytes into a Torch tensor: chunk by chunk, reordered and converted on the way.

Owns the loop that keeps memory flat: rows are decoded a few megabytes at a time, straight into the
tensor that the model keeps, so that loading needs the final weights and one chunk. Does not own block
formats (gguf-py decodes them) or which orders and conversions a tensor needs (`architectures/`).
Called by `load.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
Order = NDArray[np.int64]

CHUNK_VALUES = 1 << 20  # 4 MiB of float32; gguf-py needs a few times that while it decodes


class RawRows(Protocol):
    """Rows of bytes that can be counted and sliced."""

    def __len__(self) -> int:
        """Count them."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        """Return some of them, uint8 `[n, row_bytes]`."""


def is_decodable(type_: GGMLQuantizationType) -> bool:
    """Check whether gguf-py decodes this tensor type, by decoding one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def decodable_types(types: Iterable[GGMLQuantizationType] = tuple(GGML_QUANT_SIZES)) -> list[str]:
    """Return the names of those `types` that gguf-py decodes, in ggml's order."""
    return [type_.name for type_ in sorted(types) if is_decodable(type_)]


def decode_into(
    target: Tensor,
    raw: RawRows,
    type_: GGMLQuantizationType,
    *,
    rows: Order | None = None,
    cols: Order | None = None,
    values: Callable[[Floats], Floats] | None = None,
) -> None:
    """Fill `target` from a tensor's bytes.

    Parameters
    ----------
    target
        `[n_rows, n_cols]`, any float dtype and device.
    raw
        uint8 `[rows in the file, row_bytes]`: an array, or rows that are read chunk by chunk.
    rows
        Where each row of the file goes in `target`, None for the same order.
    cols
        Where each column of `target` lies in the file.
    values
        Applied elementwise to the float32 values, before they are rounded to `target`'s dtype.
    """
    import torch

    step = max(1, CHUNK_VALUES // target.shape[1])
    # What is not finite in the file stays so: whether that matters is judged where it is used.
    with np.errstate(all="ignore"), torch.no_grad():
        for start in range(0, len(raw), step):
            chunk = slice(start, start + step)
            part: Floats = dequantize(raw[chunk], type_)
            part = part if cols is None else part[:, cols]
            part = part if values is None else values(part)
            # Torch warns about views of the read-only map, and needs aligned, contiguous memory.
            decoded = torch.from_numpy(np.require(part, np.float32, ["C", "A", "W"]))
            if rows is None:
                target[chunk].copy_(decoded)
            else:
                target.index_copy_(0, torch.from_numpy(rows[chunk]).to(target.device), decoded.to(target))
