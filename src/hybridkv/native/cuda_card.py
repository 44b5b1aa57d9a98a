"""A model's weights on a card: each uploaded once, and products of those that read the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridkv.kernels.cuda.card import facts_of
from hybridkv.kernels.cuda.packed import multiply_packed
from hybridkv.kernels.cuda.packed_experts import PlainStack
from hybridkv.kernels.cuda.packed_layout import PACKED, PackedWeight, upload
from hybridkv.kernels.cuda.products import MOST_INPUTS, one_row
from hybridkv.kernels.cuda.streamed import Staging
from hybridkv.kernels.weights import Weight
from hybridkv.model import Experts, ModelGraph, Norm
from hybridkv.native.hosted import Pinned
from hybridkv.native.sources import Typed

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Send = Callable[[Sequence[Weight], torch.device], PackedWeight]


@dataclass(frozen=True, slots=True)
class WeightRows:
    """Weight rows that become part of one matrix.

    Attributes
    ----------
    key
        A name that no others have.
    weights
        Of one type and width, one above the other.
    """

    key: str
    weights: tuple[Weight, ...]

    @property
    def n_out(self) -> int:
        """Weight rows in all."""
        return sum(weight.n_out for weight in self.weights)


class Card:
    """A model's weights on a device, each uploaded once.

    Parameters
    ----------
    source
        Holds the weights in the file's order.
    hosted
        Names of tensors that stay in main memory: routed experts, and an embedding that is no head.
    n_rows
        Most rows of a step.
    send
        Puts matrices of one type and width on a device.
    """

    def __init__(
        self,
        source: Typed,
        device: torch.device,
        *,
        hosted: frozenset[str] = frozenset(),
        n_rows: int = 1,
        send: Send = upload,
    ) -> None:
        self.source, self.device, self.hosted, self.n_rows, self._send = source, device, hosted, n_rows, send
        self.prefix = ""
        """Of the block that is lowered: `blk.3.`."""
        self.n_bytes = 0
        self._matrices: dict[tuple[str, ...], PackedWeight | Tensor] = {}
        self._pinned: Pinned | None = None
        self._staging: Staging | None = None

    def has(self, name: str) -> bool:
        """Check whether the block has a tensor of this name."""
        return self.source.has(self.prefix + name)

    def hosts(self, name: str) -> bool:
        """Check whether a tensor of the block stays in main memory."""
        return self.prefix + name in self.hosted

    @property
    def pinned(self) -> Pinned:
        """Memory through which rows reach what stays in main memory."""
        assert self._pinned is not None
        return self._pinned

    @property
    def n_host_layers(self) -> int:
        """Layers whose routed experts stay in main memory."""
        return 0 if self._pinned is None else self._pinned.n_layers

    @property
    def staging(self) -> Staging:
        """Memory through which matrices reach the device for a prompt."""
        if self._staging is None:
            self._staging = Staging(self.device)
        return self._staging

    def share_rows(self, graph: ModelGraph) -> None:
        """Take the memory for what of a model stays in main memory."""
        if self.hosted:
            n_experts = max((part.n_experts for part in graph.parts if isinstance(part, Experts)), default=0)
            self._pinned = Pinned(self.n_rows, graph.hidden, n_experts, self.device, self.source.verify)

    def weight(self, name: str) -> Weight:
        """Return a matrix or a stack of the block, where it lies."""
        return self.source.weight(self.prefix + name)

    def vector(self, name: str) -> Tensor:
        """Return a small tensor of the block, float32 on the device."""
        found = self.source.vector(self.prefix + name).to(self.device).contiguous()
        self.n_bytes += found.nbytes
        return found

    def norm(self, norm: Norm) -> Tensor:
        """Return the weight of a norm, flat; some files leave out its suffix."""
        name = norm.weight if self.has(norm.weight) else norm.weight.removesuffix(".weight")
        return self.vector(name).flatten()

    def either(self, names: Sequence[str]) -> str:
        """Choose the first of these names that the block has."""
        return next(name for name in names if self.has(name))

    def bias(self, weight: str) -> Tensor:
        """Return the bias that lies beside a weight, flat."""
        return self.vector(weight.removesuffix(".weight") + ".bias").flatten()

    def rows(self, name: str) -> WeightRows:
        """Return all rows of a matrix."""
        return WeightRows(self.prefix + name, (self.weight(name),))

    def joined(self, *parts: str | WeightRows) -> PackedWeight | Tensor:
        """Join matrices or stacks of one type and width, one above the other: packed, or as their values."""
        rows = [self.rows(part) if isinstance(part, str) else part for part in parts]
        key = tuple(part.key for part in rows)
        if key not in self._matrices:
            weights = [weight for part in rows for weight in part.weights]
            if weights[0].format.name in _FLOATS:
                values = [w.data.view(_FLOATS[w.format.name]).to(self.device) for w in weights]
                whole = torch.cat(values, 1)
                held: PackedWeight | Tensor = whole[0] if len(whole) == 1 else whole
            else:
                held = self._send(weights, self.device)
            self.n_bytes += held.nbytes
            self._matrices[key] = held
        return self._matrices[key]

    def one_type(self, *names: str) -> bool:
        """Check whether matrices are of one packed type."""
        found = {self.weight(name).format.name for name in names}
        return len(found) == 1 and found <= set(PACKED)

    def packed(self, *names: str) -> PackedWeight:
        """Join matrices of a packed type."""
        held = self.joined(*names)
        assert isinstance(held, PackedWeight)
        return held

    def stack(self, *names: str) -> PackedWeight | PlainStack:
        """Join stacks of one type."""
        held = self.joined(*names)
        return held if isinstance(held, PackedWeight) else PlainStack(held)

    def product(self, *parts: str | WeightRows, biased: bool = False) -> Product:
        """Build one product of matrices that read the same rows; `biased` if each has a bias beside it."""
        rows = [self.rows(part) if isinstance(part, str) else part for part in parts]
        groups = [tuple(same) for _, same in groupby(rows, lambda part: part.weights[0].format.name)]
        widths = [[part.n_out for part in group] for group in groups]
        biases = [self.bias(part) for part in parts if isinstance(part, str)] if biased else None
        return Product([self.joined(*group) for group in groups], widths, biases)


class Product:
    """Matrices of several types that read the same rows.

    Parameters
    ----------
    matrices
        By type, in the order of their outputs.
    widths
        Outputs of each matrix before they were joined.
    biases
        Of each of those, if they have any.
    """

    def __init__(
        self,
        matrices: Sequence[PackedWeight | Tensor],
        widths: Sequence[Sequence[int]],
        biases: Sequence[Tensor] | None = None,
    ) -> None:
        order = sorted(range(len(matrices)), key=lambda i: isinstance(matrices[i], Tensor))  # packed ones first
        self._packed = [m for m in matrices if isinstance(m, PackedWeight)]
        self._plain = [m for m in matrices if isinstance(m, Tensor)]
        self._widths = [width for i in order for width in widths[i]]
        begins = [sum(map(len, widths[:i])) for i in range(len(widths))]
        at = [begins[i] + j for i in order for j in range(len(widths[i]))]
        self._places = [at.index(i) for i in range(len(at))]
        self._in_order = order == list(range(len(matrices)))
        self._bias = None if biases is None else torch.cat([biases[i] for i in at])

    def shares(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Multiply like `whole`, or to `[shares, N, out]`, float32, whose sum that is."""
        if len(self._packed) == 1 and not self._plain and self._bias is None:
            return multiply_packed(x, self._packed, factor=factor, shared=True)
        return self.whole(x, factor=factor)

    def whole(self, x: Tensor, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        """Multiply `[N, in]`, float16, to `[N, sum of outs]`."""
        parts = self._parts(x, dtype, factor)
        if not self._in_order:
            parts = self._split(parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Compute the outputs of each matrix, rows of a larger whole."""
        return self._split(self._parts(x, dtype, 1.0))

    def _split(self, parts: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        widths = iter(self._widths)
        for part in parts:
            at = 0
            while at < part.shape[1]:
                width = next(widths)
                out.append(part[:, at : at + width])
                at += width
        return [out[place] for place in self._places]

    def _parts(self, x: Tensor, dtype: torch.dtype, factor: float) -> list[Tensor]:
        """Launch two packed matrices at a time, the first plain one with the last of them."""
        parts, plain = [], self._plain
        for i in range(0, len(self._packed), 2):
            beside = None
            if i + 2 >= len(self._packed) and plain:
                beside, plain = plain[0], plain[1:]
            parts.append(multiply_packed(x, self._packed[i : i + 2], plain=beside, dtype=dtype, factor=factor))
        parts += [_plain(x, matrix, dtype, factor) for matrix in plain]
        if self._bias is not None:
            for part, bias in zip(parts, torch.split(self._bias, [part.shape[1] for part in parts]), strict=True):
                part.add_(bias)
        return parts


def _plain(x: Tensor, matrix: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Multiply by a matrix that is not packed."""
    if factor != 1.0:
        x = x * factor
    if len(x) == 1 and facts_of(x.device) is not None and matrix.shape[1] <= MOST_INPUTS:
        return one_row(x, matrix, dtype=dtype)
    return F.linear(x.to(matrix.dtype), matrix).to(dtype)
