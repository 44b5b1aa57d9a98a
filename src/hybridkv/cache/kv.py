"""One layer's KV cache: which rows are packed and which are kept exact, and the kernels that were chosen for them.

Owns the way of a row: rotated, rounded to f16 among the sinks or in the tail where the types ask for them, packed when
it leaves the tail or at once; append, view, crop, batch moves, reset, decode. Float copies of packed rows are never
kept. Knows neither Transformers nor the guard: `hybridkv.runtime` lets the guard look at it, and `hybridkv.hf` makes a
Transformers cache layer of that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybridkv.cache import device_rows
from hybridkv.cache.exact import ExactRows
from hybridkv.cache.layer_kernels import LayerKernels
from hybridkv.cache.packed import PackedRows
from hybridkv.cache.spec import FRESH_ROWS, UNBOUNDED, KVSpec, KVTypes
from hybridkv.cache.stored import StoredRows
from hybridkv.errors import ContextError, ModelError
from hybridkv.formats import get_format
from hybridkv.kernels import (
    KVView,
    Segment,
    store,
)
from hybridkv.rotation import rotate

GROW_ROWS = 256
"""Without a fixed context, memory grows by half, rounded up to this many rows."""


class KVLayer:
    """Stored K and V rows of one layer.

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

    def retype(self, spec: KVSpec) -> None:
        """Take new types from the next `append` on, and forget all rows."""
        self.spec = spec
        self.kernels = self._choose(spec)
        self._k_format, self._v_format = get_format(spec.types.type_k), get_format(spec.types.type_v)
        self.reset()

    def reset(self) -> None:
        """Forget all rows and free their memory."""
        self._packed = PackedRows(self.spec)
        self._exact = ExactRows(self.spec) if self.spec.tail or self.spec.sink else None
        self.n_seen = 0

    @property
    def types(self) -> KVTypes:
        """Types of the stored rows."""
        return self.spec.types

    @property
    def n_stored(self) -> int:
        """Rows held per sequence; fewer than `n_seen` once a window has moved on."""
        return self._packed.length + (0 if self._exact is None else self._exact.n_held)

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first append."""
        return self._packed.planes.batch

    @property
    def capacity(self) -> int:
        """Rows allocated per sequence."""
        return self._packed.planes.capacity + (0 if self._exact is None else self._exact.planes.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free rows included."""
        return self._packed.nbytes + (0 if self._exact is None else self._exact.planes.nbytes)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the rows held."""
        return self._packed.nbytes_used + (0 if self._exact is None else self._exact.nbytes_used)

    @property
    def can_crop(self) -> bool:
        """True if the newest rows can be dropped: not once a window has evicted older rows."""
        return self.n_stored == self.n_seen

    def past_rows(self) -> int:
        """Count the earlier rows that the next token's attention reads."""
        stored, window = self.n_stored, self.spec.facts.window
        return stored if window is None else min(stored, window - 1)

    def has_packed(self, n_new: int) -> bool:
        """Check whether the layer holds packed rows once the next `n_new` tokens are stored."""
        return self._packed.length > 0 or self.packs(n_new)

    def packs(self, n_new: int) -> bool:
        """Check whether the next `n_new` tokens add packed rows, be it by making others leave the tail."""
        return self._exact is None or self._exact.packs(n_new)

    def shows_packed(self, view: KVView) -> bool:
        """Check whether a view of this layer reads packed rows."""
        return any(segment.k is self._packed.planes.k for segment in view.segments)

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store T new tokens and return the rows that they attend.

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
        self._open(k.shape[0], n_new, k.device)
        past = self.past_rows()
        types = self.spec.types
        k = rotate(k) if types.rotate_k else k
        v = rotate(v) if types.rotate_v else v
        if self._exact is None:
            self._pack(k, v, past)
        else:
            self._keep(self._exact, k, v, past)
        self.n_seen += n_new
        return self.view(past + n_new)

    def reserve(self, batch: int, n_new: int, device: torch.device) -> KVView:
        """Count T new tokens, whose rows the caller writes: the last T of the last segment returned.

        T is at most what `room` says in a layer that keeps exact rows.

        Raises
        ------
        ModelError
            If the layer holds another number of sequences.
        ContextError
            If the context is full.
        """
        past = self.past_rows()
        self.reserve_only(batch, n_new, device)
        return self.view(past + n_new)

    def reserve_only(self, batch: int, n_new: int, device: torch.device) -> None:
        """Reserve T new rows as `reserve` does, without a view of the rows."""
        exact = self._exact
        assert exact is None or exact.takes(n_new) in (0, n_new), n_new
        self._open(batch, n_new, device)
        past = self.past_rows()
        if exact is None or not exact.takes(n_new):
            self._packed.extend(n_new, min(past, self._packed.length), self._packed_target, batch, device)
        else:
            self._evict(exact, past)
            exact.extend(n_new, self._exact_target, batch, device)
        self.n_seen += n_new

    def room(self) -> int:
        """Return how many tokens `reserve` takes at once as it takes them one by one.

        Only the first may move rows, pack what leaves the tail or take memory: `take_back` undoes the others.
        """
        exact, packed = self._exact, self._packed
        most = UNBOUNDED if self._n_ctx is None else self._n_ctx - self.n_seen
        if exact is not None and exact.takes(1):
            self._evict(exact, self.past_rows())
            fits = exact.room(self._exact_target)
        else:
            fits = packed.planes.capacity - packed.start - packed.length if packed.length else 1
        return max(1, min(most, fits))

    @property
    def memory_key(self) -> object:
        """Another object once packed rows lie elsewhere."""
        return self._packed.planes.key

    def straight_room(self) -> int:
        """Return how many single tokens do no more than lengthen the packed rows, where they lie."""
        packed, window = self._packed, self.spec.facts.window
        if self._exact is not None or not packed.length:
            return 0
        most = packed.planes.capacity - packed.start - packed.length
        if self._n_ctx is not None:
            most = min(most, self._n_ctx - self.n_seen)
        return max(0, most if window is None else min(most, window - 1 - self.n_seen))

    def lengthen(self, n_tokens: int = 1) -> None:
        """Count tokens, of those that `straight_room` has seen room for, whose rows the caller writes."""
        self._packed.length += n_tokens
        self.n_seen += n_tokens

    def take_back(self, n_tokens: int) -> None:
        """Undo the newest `n_tokens` of the last `reserve`, of which one stays at least: no row is left of them."""
        self._drop(n_tokens)

    def write_reserved(self, k: Tensor, v: Tensor, row_counters: Tensor) -> KVView:
        """Store one new token per sequence as its newest row, by row counters that only the device knows.

        `reserve_only` has counted the token, and `device_step_refusal` says None.

        Parameters
        ----------
        k, v
            Any float dtype, `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.
        row_counters
            int32 `[N_COUNTERS, B]`; see `hybridkv.cache.device_rows`.
        """
        self._check(k, v)
        view, types, chosen = self.view(), self.spec.types, self.kernels
        newest = view.segments[-1]
        packs = newest.k is self._packed.planes.k
        encode_k, encode_v = (chosen.write_k, chosen.write_v) if packs else (chosen.exact_k, chosen.exact_v)
        for encoder, x, fmt, memory, rotated in (
            (encode_k, k, newest.format_k, newest.k, types.rotate_k),
            (encode_v, v, newest.format_v, newest.v, types.rotate_v),
        ):
            store(encoder, x, fmt, types.scale_for(fmt.name), memory, row_counters[0], rotated=rotated)
        slides = not packs or self.spec.facts.window is not None
        return replace(view, segments=device_rows.on_device(view.segments, row_counters, slides=slides))

    def device_step_refusal(self, device: str) -> str | None:
        """Explain why rows cannot be counted on the device alone; None if they can."""
        return device_rows.rejects(self.spec, self.kernels, device)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All rows, the oldest first; in other tensors once rows have moved or are packed first."""
        return self._segments(None)

    def view(self, length: int | None = None) -> KVView:
        """Return a view of the newest `length` rows, all by default."""
        facts, types = self.spec.facts, self.spec.types
        return KVView(
            segments=self._segments(length),
            head_dim_k=facts.head_dim_k,
            head_dim_v=facts.head_dim_v,
            rotate_k=types.rotate_k,
            rotate_v=types.rotate_v,
            window=facts.window,
        )

    def decode(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Decode the newest `length` rows: float32 K and V `[B, Hkv, S, D]`, rotation and center undone."""
        view = self.view(length)
        parts = [_decoded(segment, view) for segment in view.segments]
        k, v = (torch.cat(side, 2) if len(side) > 1 else side[0] for side in zip(*parts, strict=True))
        return (rotate(k) if view.rotate_k else k), (rotate(v) if view.rotate_v else v)

    def crop(self, n_tokens: int) -> None:
        """Drop the newest `n_tokens`. Rows that were packed stay packed when they are the newest again.

        Raises
        ------
        ContextError
            If a window has already evicted rows that would be needed again.
        """
        if not self.can_crop:
            raise ContextError(
                f"layer {self.spec.facts.layer}: {n_tokens} tokens cannot be dropped, its window of "
                f"{self.spec.facts.window} tokens has already evicted older rows",
                hint="reset the cache and process the shorter prompt again",
            )
        self._drop(min(n_tokens, self.n_stored))

    def _drop(self, dropped: int) -> None:
        self.n_seen -= dropped
        if self._exact is not None:
            dropped -= self._exact.drop_newest(dropped)
        n_packed = min(dropped, self._packed.length)
        self._packed.length -= n_packed
        if self._exact is not None:
            self._exact.sinks -= dropped - n_packed

    def select_sequences(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (int64 `[B']`), in that order; repeats are allowed."""
        self._packed.select(indices)
        if self._exact is not None:
            self._exact.planes.select(indices)

    def copy(self, n_ctx: int | None) -> KVLayer:
        """Copy the rows into a layer with memory and a context of its own."""
        twin = copy.copy(self)
        twin._packed = self._packed.copy()
        twin._exact = None if self._exact is None else self._exact.copy()
        twin._n_ctx = n_ctx
        return twin

    def empty(self, n_ctx: int | None) -> KVLayer:
        """Build a layer of the same types that holds no rows, for a context of its own."""
        twin = copy.copy(self)
        twin._n_ctx = n_ctx
        twin.reset()
        return twin

    def stored(self, first: int = 0) -> StoredRows:
        """Copy what is held: of packed rows those from the `first` on, or all where a window evicts rows."""
        first = 0 if self.spec.facts.window is not None else first
        exact_k, exact_v = (None, None) if self._exact is None else self._exact.stored()
        k, v = self._packed.stored(first)
        center = self._packed.center if self._packed.length else None  # before the first packed row it means nothing
        return StoredRows(self.n_seen, first, k, v, exact_k, exact_v, None if center is None else center.clone())

    def load(self, parts: Sequence[StoredRows]) -> None:
        """Take what copies of one sequence, stored at the same spec, hold together; each begins where one ends."""
        self.reset()
        last = parts[-1]
        parts = parts[-1:] if self.spec.facts.window is not None else parts
        batch, device = last.packed_k[0].shape[0], last.packed_k[0].device
        self._open(batch, 0, device)
        self._packed.load(parts, self._packed_target, batch, device)
        if self._exact is not None and last.exact_k is not None and last.exact_v is not None:
            self._exact.load(last.exact_k, last.exact_v, self._exact_target)
        self.n_seen = last.n_seen

    def load_converted(self, other: KVLayer) -> None:
        """Take the rows of a layer of other types, decoded and encoded again."""
        self.reset()
        if other.n_stored:
            self.append(*other.decode())
        self.n_seen = other.n_seen  # a window has let others go

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

    def _open(self, batch: int, n_new: int, device: torch.device) -> None:
        """Refuse what does not fit; before the first rows, take the memory that a context needs."""
        if self._n_ctx is not None and self.n_seen + n_new > self._n_ctx:
            raise ContextError(
                f"{self.n_seen + n_new} tokens do not fit a context of {self._n_ctx}",
                hint="give a larger context (-c) or a shorter prompt",
            )
        held = self._packed.planes.batch
        if not held:
            self._packed.extend(0, 0, self._packed_target, batch, device)
        elif batch != held:
            raise ModelError(
                f"layer {self.spec.facts.layer} holds {held} sequences and was given {batch}",
                hint="use one cache per batch, or reset() it first",
            )

    def _keep(self, exact: ExactRows, k: Tensor, v: Tensor, past: int) -> None:
        """Store T new rows, rotated if they are to be: exact as far as sinks and tail take them."""
        batch, n_new, device = k.shape[0], k.shape[2], k.device
        n_exact = exact.takes(n_new)
        first = 0
        while first < n_exact:  # the newest FRESH_ROWS come last, together: all of them are exact for this call
            last = first + (n_exact - first - 1) % FRESH_ROWS + 1
            self._evict(exact, past + first)
            row = exact.extend(last - first, self._exact_target, batch, device)
            exact.write(k[:, :, first:last], v[:, :, first:last], row)
            first = last
        if n_exact < n_new:
            self._pack(k[:, :, n_exact:], v[:, :, n_exact:], past + n_exact)

    def _evict(self, exact: ExactRows, needed: int) -> None:
        """Pack the rows that leave the tail before it takes more; the newest `needed` rows are attended."""
        leaving = exact.leaving()
        if leaving:
            self._pack(*exact.oldest(leaving), needed - exact.length)
            exact.drop_oldest(leaving)

    def _pack(self, k: Tensor, v: Tensor, needed: int) -> None:
        """Encode rows behind the packed ones, of which the newest `needed`, if there are as many, must stay.

        The center is the mean of the first rows packed. Any vector gives the same attention: a query's scores over
        packed rows all differ by its product with the center, which the kernel adds back. Only the rounding depends
        on how well it fits later rows, so it can stay as it is while rows are stored minus it.
        """
        packed, types = self._packed, self.spec.types
        was_empty = packed.length == 0
        row = packed.extend(k.shape[2], max(0, min(needed, packed.length)), self._packed_target, k.shape[0], k.device)
        if packed.center is not None:
            k = k.float()
            if was_empty:
                packed.center.copy_(k.mean(2))
            k = k - packed.center.unsqueeze(2)
        self.kernels.write_k.write(k, self._k_format, types.scale_for(types.type_k), packed.planes.k, row)
        self.kernels.write_v.write(v, self._v_format, types.scale_for(types.type_v), packed.planes.v, row)

    def _segments(self, length: int | None) -> tuple[Segment, ...]:
        if self._exact is None:
            return (self._packed.segment(self._packed.length if length is None else length),)
        n_packed = self._packed.length
        parts = self._exact.segments(self._packed.segment(n_packed) if n_packed else None)
        return parts if length is None or length == self.n_stored else _newest(parts, length)

    def _packed_target(self, needed: int, capacity: int) -> int:
        """Choose the packed planes' next capacity; more than planned for a prompt longer than a window."""
        if self._n_ctx is None and self.spec.facts.window is None:
            return _grown(needed, capacity)
        return max(needed, self.spec.rows_at(self._n_ctx or UNBOUNDED))

    def _exact_target(self, needed: int, capacity: int) -> int:
        """Choose the exact planes' next capacity: what a prompt needs beyond the plan is given back after it."""
        planned = self.spec.exact_rows_at(self._n_ctx or UNBOUNDED)
        if self._n_ctx is None and self.spec.facts.window is None:
            planned = min(planned, capacity if needed <= capacity else _grown(needed, capacity))
        return max(needed, planned)


def _grown(needed: int, capacity: int) -> int:
    grown = max(needed, capacity + capacity // 2)
    return -(-grown // GROW_ROWS) * GROW_ROWS


def _newest(parts: Sequence[Segment], length: int) -> tuple[Segment, ...]:
    """Select the newest `length` rows of the parts; at least one part, if of no rows."""
    kept: list[Segment] = []
    for part in reversed(parts):
        n = min(part.length, length)
        length -= n
        if n or not kept:
            kept.insert(0, replace(part, start=part.start + part.length - n, length=n))
    return tuple(kept)


def _decoded(rows: Segment, view: KVView) -> tuple[Tensor, Tensor]:
    """Decode K and V of a segment to float32, as they were before the center was subtracted; still rotated."""
    span = slice(rows.start, rows.start + rows.length)
    k = rows.format_k.decode([p[:, :, span] for p in rows.k], view.head_dim_k)
    v = rows.format_v.decode([p[:, :, span] for p in rows.v], view.head_dim_v)
    return (k if rows.center is None else k + rows.center.unsqueeze(2)), v
