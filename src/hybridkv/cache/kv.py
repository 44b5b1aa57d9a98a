"""One layer's KV cache: packed rows in growing memory, and the kernels that were chosen for them.

Owns block storage: append, view, crop, batch moves, reset, decode. Only codes and scales are kept; a float copy
never is. Knows neither Transformers nor the guard; `hybridkv.hf` wraps it as a Transformers cache layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridkv.cache.spec import WINDOW_SLACK, KVSpec, KVTypes
from hybridkv.errors import ContextError, ModelError
from hybridkv.formats import get_format
from hybridkv.kernels import (
    Encoder,
    Kernel,
    KVView,
    Phase,
    Segment,
    cpu_native,
    select,
    select_encoder,
)
from hybridkv.rotation import rotate, rotation_block

GROW_ROWS = 256
"""Without a fixed context, memory grows by half, rounded up to this many rows."""


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """What runs one KV layer: an attention kernel per phase, an encoder each for K and V."""

    prefill: Kernel
    decode: Kernel
    write_k: Encoder
    write_v: Encoder

    def attend_for(self, phase: Phase) -> Kernel:
        """The kernel of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    @property
    def label(self) -> str:
        """One name if both phases run the same kernel, else both."""
        if self.prefill.name == self.decode.name:
            return self.decode.name
        return f"{self.prefill.name} / {self.decode.name}"


def resolve(spec: KVSpec, device: str, kernels: Sequence[Kernel], encoders: Sequence[Encoder]) -> LayerKernels:
    """Choose the kernels of a layer, before any memory or weight is touched.

    Raises
    ------
    NoKernelError
        If a phase or a store has no kernel; carries every reason.
    UsageError
        If a rotation is asked for a head dim that has none.
    """
    facts, types = spec.facts, spec.types
    if types.rotate_k:
        rotation_block(facts.head_dim_k)
    if types.rotate_v:
        rotation_block(facts.head_dim_v)
    return LayerKernels(
        prefill=select(spec.case(device, "prefill"), kernels),
        decode=select(spec.case(device, "decode"), kernels),
        write_k=select_encoder(device, get_format(types.type_k), facts.head_dim_k, encoders),
        write_v=select_encoder(device, get_format(types.type_v), facts.head_dim_v, encoders),
    )


class KVLayer:
    """Packed K and V rows of one layer.

    Parameters
    ----------
    spec
        The layer's facts and types.
    choose
        Gives the kernels for a spec; asked again when the types change.
    n_ctx
        Tokens per sequence to reserve and not to exceed; None grows as needed.
    """

    def __init__(self, spec: KVSpec, choose: Callable[[KVSpec], LayerKernels], *, n_ctx: int | None = None) -> None:
        self._choose = choose
        self._n_ctx = n_ctx
        self.retype(spec)
        self.reset()

    def retype(self, spec: KVSpec) -> None:
        """Take new types from the next `append` on; the layer must be empty or be reset right after."""
        self.spec = spec
        self.kernels = self._choose(spec)
        self._k_format, self._v_format = get_format(spec.types.type_k), get_format(spec.types.type_v)

    def reset(self) -> None:
        """Forget all rows and free their memory."""
        self._k: tuple[Tensor, ...] = ()
        self._v: tuple[Tensor, ...] = ()
        self._start = 0
        self._length = 0
        self.n_seen = 0

    @property
    def types(self) -> KVTypes:
        """How the rows are stored."""
        return self.spec.types

    @property
    def n_stored(self) -> int:
        """Rows held per sequence; fewer than `n_seen` once a window has moved on."""
        return self._length

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first append."""
        return self._k[0].shape[0] if self._k else 0

    @property
    def capacity(self) -> int:
        """Rows allocated per sequence."""
        return self._k[0].shape[2] if self._k else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free rows included."""
        return sum(plane.nbytes for plane in (*self._k, *self._v))

    @property
    def nbytes_used(self) -> int:
        """Bytes of the rows held."""
        return self.batch * self._length * self.spec.bytes_per_token

    @property
    def can_crop(self) -> bool:
        """Whether the newest rows can be dropped: not once a window has let older rows go."""
        return self._length == self.n_seen

    def past_rows(self) -> int:
        """Earlier rows that the next token's attention reads."""
        window = self.spec.facts.window
        return self._length if window is None else min(self._length, window - 1)

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Encode T new tokens and return the rows that they attend.

        Parameters
        ----------
        k, v
            Any float dtype, `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.

        Raises
        ------
        ModelError
            If shapes contradict the layer's facts.
        ContextError
            If the context is full.
        """
        self._check(k, v)
        n_new = k.shape[2]
        view = self.admit(k.shape[0], n_new, k.device)
        newest = view.segments[-1]
        row = newest.start + newest.length - n_new
        types = self.spec.types
        k_rows = rotate(k) if types.rotate_k else k
        v_rows = rotate(v) if types.rotate_v else v
        self.kernels.write_k.write(k_rows, self._k_format, types.scale_for(types.type_k), self._k, row)
        self.kernels.write_v.write(v_rows, self._v_format, types.scale_for(types.type_v), self._v, row)
        return view

    def admit(self, batch: int, n_new: int, device: torch.device) -> KVView:
        """Count T new tokens, whose rows the caller writes: the last T of the rows returned, which they attend.

        Raises
        ------
        ModelError
            If the layer holds another number of sequences.
        ContextError
            If the context is full.
        """
        if self._k and batch != self.batch:
            raise ModelError(
                f"layer {self.spec.facts.layer} holds {self.batch} sequences and was given {batch}",
                hint="use one cache per batch, or reset() it first",
            )
        visible = self.past_rows() + n_new
        self._reserve(batch, n_new, device)
        self._length += n_new
        self.n_seen += n_new
        return self.view(visible)

    def view(self, length: int | None = None) -> KVView:
        """The newest `length` rows, all by default."""
        length = self._length if length is None else length
        facts, types = self.spec.facts, self.spec.types
        start = self._start + self._length - length
        return KVView(
            segments=(Segment(self._k, self._v, self._k_format, self._v_format, start, length),),
            head_dim_k=facts.head_dim_k,
            head_dim_v=facts.head_dim_v,
            rotate_k=types.rotate_k,
            rotate_v=types.rotate_v,
            window=facts.window,
        )

    def decode(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """The newest `length` rows as float32 `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, rotation undone."""
        view = self.view(length)
        stored = view.segments[0]
        rows = slice(stored.start, stored.start + stored.length)
        k = stored.format_k.decode([p[:, :, rows] for p in stored.k], view.head_dim_k)
        v = stored.format_v.decode([p[:, :, rows] for p in stored.v], view.head_dim_v)
        return (rotate(k) if view.rotate_k else k), (rotate(v) if view.rotate_v else v)

    def crop(self, n_tokens: int) -> None:
        """Drop the newest `n_tokens`.

        Raises
        ------
        ContextError
            If a window has already let go of rows that would be needed again.
        """
        if not self.can_crop:
            raise ContextError(
                f"layer {self.spec.facts.layer}: {n_tokens} tokens cannot be dropped, its window of "
                f"{self.spec.facts.window} tokens has already let older rows go",
                hint="reset the cache and process the shorter prompt again",
            )
        dropped = min(n_tokens, self._length)
        self._length -= dropped
        self.n_seen -= dropped

    def select_sequences(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (int64 `[B']`), in that order; repeats are allowed."""
        self._k = tuple(plane.index_select(0, indices.to(plane.device)) for plane in self._k)
        self._v = tuple(plane.index_select(0, indices.to(plane.device)) for plane in self._v)

    def copy(self, n_ctx: int | None) -> KVLayer:
        """A layer that holds the same rows in memory of its own, for a context of its own."""
        twin = copy.copy(self)
        twin.select_sequences(torch.arange(self.batch))
        twin._n_ctx = n_ctx
        return twin

    def _check(self, k: Tensor, v: Tensor) -> None:
        f = self.spec.facts
        got = (k.shape[1], k.shape[3], v.shape[1], v.shape[3])
        want = (f.n_kv_heads, f.head_dim_k, f.n_kv_heads, f.head_dim_v)
        if got != want:
            raise ModelError(
                f"layer {f.layer} stores K of {got[0]} heads x {got[1]} and V of {got[2]} x {got[3]}; "
                f"its config says {want[0]} x {want[1]} and {want[2]} x {want[3]}",
                hint="this architecture's layer facts are wrong or unknown; please report the model type",
            )

    def _reserve(self, batch: int, n_new: int, device: torch.device) -> None:
        """Make room for `n_new` rows: in place, by letting old window rows go, or in larger memory."""
        if self._n_ctx is not None and self.n_seen + n_new > self._n_ctx:
            raise ContextError(
                f"{self.n_seen + n_new} tokens do not fit a context of {self._n_ctx}",
                hint="give a larger context (-c) or a shorter prompt",
            )
        if self._k and self._start + self._length + n_new <= self.capacity:
            return
        keep = self.past_rows()
        target = self._target_rows(keep + n_new)
        rows = slice(self._start + self._length - keep, self._start + self._length)
        f = self.spec.facts
        shape = (batch, f.n_kv_heads, target)
        k_bytes, v_bytes = self._k_format.plane_bytes(f.head_dim_k), self._v_format.plane_bytes(f.head_dim_v)
        self._k = _moved(self._k, rows, shape, k_bytes, device)
        self._v = _moved(self._v, rows, shape, v_bytes, device)
        self._start, self._length = 0, keep

    def _target_rows(self, needed: int) -> int:
        if self.spec.facts.window is not None:
            target = max(needed, self.spec.facts.window - 1 + WINDOW_SLACK)
        elif self._n_ctx is not None:
            return self._n_ctx
        else:
            grown = max(needed, self.capacity + self.capacity // 2)
            target = -(-grown // GROW_ROWS) * GROW_ROWS
        return target if self._n_ctx is None else min(target, max(needed, self._n_ctx))


def _moved(
    planes: tuple[Tensor, ...],
    rows: slice,
    shape: tuple[int, int, int],
    plane_bytes: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """New planes of `shape` (batch, heads, rows), with `rows` of the old planes, if any, in front."""
    fresh = tuple(_allocate((*shape, nbytes), device) for nbytes in plane_bytes)
    for new, old in zip(fresh, planes, strict=False):
        new[:, :, : rows.stop - rows.start] = old[:, :, rows]
    return fresh


def _allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory with whatever bytes were there: nothing may read a row that was not written."""
    if device.type == "cpu":
        return cpu_native.allocate(shape)
    return torch.empty(shape, dtype=torch.uint8, device=device)
