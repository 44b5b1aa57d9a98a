"""Faults as other engines have had them, to be put into kernels, encoders and rotations that are sound.

Each is small and does what a real one does: a layout read as another, rows that are not written, rotation stages left
out, an accumulator in float16, a scale frozen from the first tokens, a mask that is off by one. `PROMPT` ones show in a
prompt and `DECODE` ones only in calls of one token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

from hybridkv import kernels as kernels_module
from hybridkv.cache import KVSpec, kv
from hybridkv.formats import FORMATS, KVFormat, Scale, get_format
from hybridkv.kernels import AttentionParams, Encoder, Kernel, KVView, Segment
from hybridkv.rotation import rotation_block

Where = Literal["any", "decode"]
Attend = Callable[[Kernel, Tensor, KVView, AttentionParams], Tensor]
Rows = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes
    ----------
    kind
        Of the six kinds that `check` must catch.
    attend
        Stands in for a kernel's `attend`; None where the kernel is sound.
    rows
        `(x, first rows ever written, row) -> x`: what the encoder is given instead of its rows.
    rotate
        Stands in for the rotation; `queries_only` leaves the stored rows' rotation sound.
    where
        `decode` if it shows in calls of one token alone.
    touches
        Whether it is at work at all on layers of these types.
    needs_edge
        Whether it is at work only where rows lie before a query's oldest: behind a window or in padding.
    needs_heads
        Whether it takes more than one KV head.
    """

    name: str
    kind: str
    attend: Attend | None = None
    rows: Rows | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    queries_only: bool = False
    where: Where = "any"
    touches: Callable[[KVFormat, KVFormat], bool] = lambda k, v: True
    needs_edge: bool = False
    needs_heads: bool = False

    def at_work(self, specs: Sequence[KVSpec], *, padded: bool) -> bool:
        """Whether the fault changes anything in layers of these specs."""
        if self.rotate is not None and not any(s.types.rotate_k or s.types.rotate_v for s in specs):
            return False
        if self.needs_edge and not padded and all(s.facts.window is None for s in specs):
            return False
        if self.needs_heads and all(s.facts.n_kv_heads == 1 for s in specs):
            return False
        return any(self.touches(get_format(s.types.type_k), get_format(s.types.type_v)) for s in specs)

    def kernels(self, sound: Sequence[Kernel]) -> tuple[Kernel, ...]:
        """The kernels with the fault in them."""
        fault = self.attend
        if fault is None:
            return tuple(sound)

        def wrap(kernel: Kernel) -> Kernel:
            def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
                if self.where == "decode" and q.shape[2] > 1:
                    return kernel.attend(q, view, params)
                return fault(kernel, q, view, params)

            return replace(kernel, attend=attend)

        return tuple(wrap(kernel) for kernel in sound)

    def encoders(self, sound: Sequence[Encoder]) -> tuple[Encoder, ...]:
        """The encoders with the fault in them."""
        fault = self.rows
        if fault is None:
            return tuple(sound)
        first: dict[int, Tensor] = {}

        def wrap(encoder: Encoder) -> Encoder:
            def write(x: Tensor, fmt: KVFormat, scale: Scale | None, planes: Sequence[Tensor], row: int) -> None:
                seen = first.setdefault(id(planes[0]), x.float())
                bad = x if self.where == "decode" and x.shape[2] > 1 else fault(x.float(), seen, row)
                encoder.write(bad, fmt, scale, planes, row)

            return replace(encoder, write=write)

        return tuple(wrap(encoder) for encoder in sound)

    @contextlib.contextmanager
    def rotation(self) -> Iterator[None]:
        """The rotation with the fault in it."""
        with contextlib.ExitStack() as stack:
            if self.rotate is not None:
                stack.enter_context(mock.patch.object(kernels_module, "rotate", self.rotate))
                if not self.queries_only:
                    stack.enter_context(mock.patch.object(kv, "rotate", self.rotate))
            yield


def visible(view: KVView, params: AttentionParams, n_new: int) -> Tensor:
    """Which rows each query attends, bool `[B or 1, Hq or 1, T, S]`."""
    if params.mask is not None:
        return params.mask
    position = torch.arange(view.length - n_new, view.length).unsqueeze(1)
    key = torch.arange(view.length)
    seen = key <= position
    if view.window is not None:
        seen &= key > position - view.window
    return seen[None, None]


def _masked(change: Callable[[Tensor], Tensor]) -> Attend:
    """A kernel that attends by a changed mask."""

    def attend(kernel: Kernel, q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
        seen = visible(view, params, q.shape[2])
        return kernel.attend(q, view, replace(params, mask=change(seen)))

    return attend


def _past_newest(seen: Tensor) -> Tensor:
    """One row beyond each query's newest."""
    return seen | torch.cat([torch.zeros_like(seen[..., :1]), seen[..., :-1]], -1)


def _before_oldest(seen: Tensor) -> Tensor:
    """One row before each query's oldest: at the window's edge or in the padding."""
    return seen | torch.cat([seen[..., 1:], torch.zeros_like(seen[..., :1])], -1)


def _without_newest(seen: Tensor) -> Tensor:
    """Each query misses its newest row."""
    return seen & torch.cat([seen[..., 1:], torch.zeros_like(seen[..., :1])], -1)


def _without_oldest(seen: Tensor) -> Tensor:
    """Each query misses its oldest row."""
    return seen & torch.cat([torch.zeros_like(seen[..., :1]), seen[..., :-1]], -1)


def _layout(change: Callable[[Segment], Segment]) -> Attend:
    """A kernel that reads the rows in a changed layout."""

    def attend(kernel: Kernel, q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
        return kernel.attend(q, replace(view, segments=tuple(change(s) for s in view.segments)), params)

    return attend


def _rolled(planes: tuple[Tensor, ...], fmt: KVFormat, role: str, by: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(p.roll(by, dim) if plane.role == role else p for plane, p in zip(fmt.planes, planes, strict=True))


def _codes_shifted(s: Segment) -> Segment:
    """Codes of K and V one byte further on."""
    roles = ("codes" if s.format_k.is_quantized else "x", "codes" if s.format_v.is_quantized else "x")
    return replace(s, k=_rolled(s.k, s.format_k, roles[0], 1, -1), v=_rolled(s.v, s.format_v, roles[1], 1, -1))


def _next_rows_scales(s: Segment) -> Segment:
    """Each row with the scales of the row before it."""
    rows = slice(s.start, s.start + s.length)

    def moved(planes: tuple[Tensor, ...], fmt: KVFormat) -> tuple[Tensor, ...]:
        out = []
        for plane, p in zip(fmt.planes, planes, strict=True):
            if plane.role == "d":
                p = p.clone()
                p[:, :, rows] = p[:, :, rows].roll(1, 2)
            out.append(p)
        return tuple(out)

    return replace(s, k=moved(s.k, s.format_k), v=moved(s.v, s.format_v))


def _next_head(s: Segment) -> Segment:
    """K of one KV head with V of the next."""
    return replace(s, k=tuple(p.roll(1, 1) for p in s.k))


def _swapped_codebook(s: Segment) -> Segment:
    """q4_0 rows read as iq4_nl's, which have the same size, and the other way round."""
    other = {"q4_0": "iq4_nl", "iq4_nl": "q4_0"}
    k, v = (FORMATS[other.get(f.name, f.name)] for f in (s.format_k, s.format_v))
    return replace(s, format_k=k, format_v=v)


def _float16_accumulator(kernel: Kernel, q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
    """Integer weights of 8 bits times integer values of 8 bits, summed in float16, which ends at 65504."""
    out = kernel.attend(q, view, params)
    n_rows = visible(view, params, q.shape[2]).sum(-1, keepdim=True)
    # What such a kernel holds before it divides by the sum of weights, where every row has half of the full weight.
    total = 255 / 2 * n_rows.clamp(min=1)
    step = out.abs().amax().clamp(min=1e-9) / 127
    return (out / step * total).clamp(-65504, 65504) / total * step


def _stale(x: Tensor, first: Tensor, row: int) -> Tensor:
    """Rows 8 to 15 hold what another sequence left there."""
    del first
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(row)) * x.std()
    at = torch.arange(row, row + x.shape[2])
    old = ((at >= 8) & (at < 16)).view(1, 1, -1, 1)
    return torch.where(old, other, x)


def _stale_at_edge(x: Tensor, first: Tensor, row: int) -> Tensor:
    """The first row of each block of 32 is not written: an old row is still there."""
    return first[:, :, :1].expand_as(x) if row % 32 == 0 else x


def _unwritten_last(x: Tensor, first: Tensor, row: int) -> Tensor:
    """The last row of each block of 32 is not written: its memory holds zeros."""
    del first
    return torch.zeros_like(x) if row % 32 == 31 else x


def _frozen(x: Tensor, first: Tensor, row: int) -> Tensor:
    """Scales of the first row for all rows: larger values are clipped."""
    del row
    lanes = 32 if x.shape[-1] % 32 == 0 else x.shape[-1]
    top = first[:, :, :1].unflatten(-1, (-1, lanes)).abs().amax(-1, keepdim=True)
    blocks = x.unflatten(-1, (-1, lanes))
    return blocks.clamp(-top, top).flatten(-2)


def stages(x: Tensor, skipped: Sequence[int]) -> Tensor:
    """The rotation by its stages, without those `skipped`, counted from the nearest pairs: still its own inverse."""
    block = rotation_block(x.shape[-1])
    shape, y, step, n = x.shape, x.float(), 1, 0
    while step < block:
        if n not in skipped:
            a, b = y.reshape(*shape[:-1], -1, 2, step).unbind(-2)
            y = torch.stack([a + b, a - b], -2).reshape(shape) * 0.5**0.5
        step, n = 2 * step, n + 1
    return y


def _quantized(k: KVFormat, v: KVFormat) -> bool:
    return k.is_quantized or v.is_quantized


def _same_size(k: KVFormat, v: KVFormat) -> bool:
    return bool({k.name, v.name} & {"q4_0", "iq4_nl"})


PROMPT: tuple[Fault, ...] = (
    Fault("codes one byte on", "wrong layout", attend=_layout(_codes_shifted)),
    Fault("scales of the next row", "wrong layout", attend=_layout(_next_rows_scales), touches=_quantized),
    Fault("K of the next head", "wrong layout", attend=_layout(_next_head), needs_heads=True),
    Fault("codebook of another type", "wrong layout", attend=_layout(_swapped_codebook), touches=_same_size),
    Fault("rows of another sequence", "stale blocks", rows=_stale),
    Fault("first stage skipped", "skipped rotation stages", rotate=lambda x: stages(x, (0,))),
    Fault("last stages skipped", "skipped rotation stages", rotate=lambda x: stages(x, (2, 3, 4, 5, 6, 7))),
    Fault("no rotation", "skipped rotation stages", rotate=lambda x: x.float()),
    Fault("stage skipped in Q", "skipped rotation stages", rotate=lambda x: stages(x, (1,)), queries_only=True),
    Fault("float16 accumulator", "float16 overflow", attend=_float16_accumulator),
    Fault("scale of the first row", "frozen scale", rows=_frozen, touches=_quantized),
    Fault("one row past the newest", "off-by-one mask", attend=_masked(_past_newest)),
    Fault("newest row missing", "off-by-one mask", attend=_masked(_without_newest)),
    Fault("oldest row missing", "off-by-one mask", attend=_masked(_without_oldest)),
    Fault("one row before the oldest", "off-by-one mask", attend=_masked(_before_oldest), needs_edge=True),
)

DECODE: tuple[Fault, ...] = (
    Fault("codes one byte on, decode", "wrong layout", attend=_layout(_codes_shifted), where="decode"),
    Fault("first row of a block not written", "stale blocks", rows=_stale_at_edge, where="decode"),
    Fault("last row of a block not written", "stale blocks", rows=_unwritten_last, where="decode"),
    Fault("scale of the prompt's first row", "frozen scale", rows=_frozen, where="decode", touches=_quantized),
    Fault("newest row missing, decode", "off-by-one mask", attend=_masked(_without_newest), where="decode"),
    Fault("oldest row missing, decode", "off-by-one mask", attend=_masked(_without_oldest), where="decode"),
)

FAULTS = PROMPT + DECODE
