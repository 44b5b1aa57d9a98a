"""A model's step outside of attention: native operations on buffers, run in order.

Owns the checks that make the native code safe to call, and keeps the memory that its operations point to. Knows no
models: `hybridkv.native` writes a model down as operations. Addresses of states come with each call and are never
kept: a program that remembered them would one day run a sequence on another's state. Who keeps them, as
`hybridkv.kernels.held` does, has to know at each step that they are still the sequence's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hybridkv.kernels import cpu_native
from hybridkv.kernels.cache_rows import HEALTH, CacheRows, Health
from hybridkv.kernels.routing import Routing
from hybridkv.kernels.threads import native_threads
from hybridkv.kernels.weights import Activations, Weight

Columns = tuple[int, int, int, int, int]
Angles = tuple[Tensor, Tensor]
"""Cosines and sines."""

Gate = Literal["sigmoid", "silu", "product", "gelu", "gelu_erf", "relu"]
"""The factor: a sigmoid, SiLU, the number itself, GELU (by tanh, or exact), ReLU."""

Caches = Literal["shared", "separate"]
"""The caches of a call: one that all sequences share, or one each."""


@dataclass(frozen=True, slots=True)
class Target:
    """The place for the product with one weight: float32 `[rows, n_out]`, added to what is there if `add`."""

    weight: Weight
    dst: Tensor
    add: bool = False


class StepProgram:
    """Operations on float32 buffers `[rows, width]`; a view `[rows, heads, width]` names heads within a buffer.

    A call works on the first B * T rows; row `b * T + t` is token t of sequence b. All buffers have the same number
    of rows, the most that a call may have. Sequences of one cache run together; those of separate caches too, one token
    of each or several, and every token is batch-invariant: it has the same bits alone.

    Parameters
    ----------
    activations
        What quantized weights are multiplied with; int16 for types that have no products with 8 bits.
    """

    def __init__(self, activations: Activations = "int16") -> None:
        self.native: Any = cpu_native._native().Program(activations == "int8")
        self._keep: list[Any] = []
        self._rows: int | None = None
        self._states: dict[int, tuple[int, ...]] = {}
        self._rotated: dict[int, int] = {}
        self._calls: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        """Count the operations so far; a place to begin or end a call of `run`."""
        return len(self.native)

    def linear(self, x: Tensor, *targets: Target) -> None:
        """Multiply x `[rows, n_in]` by weights, which share its preparation."""
        native = []
        for t in targets:
            assert t.dst.dim() == 2 and t.dst.shape[1] == t.weight.n_out, (t.dst.shape, t.weight.n_out)
            assert x.dim() == 2 and x.shape[1] == t.weight.n_in, (x.shape, t.weight.n_in)
            address, row_stride, *_ = self._columns(t.dst)
            native.append((self._matrices(t.weight)[0], address, row_stride, t.add))
        self.native.linear(self._columns(x), native)

    def experts(
        self,
        x: Tensor,
        scores: Tensor,
        gate: Weight | None,
        up: Weight,
        down: Weight,
        dst: Tensor,
        routing: Routing,
        *,
        act: Gate = "silu",
        add: bool = True,
    ) -> None:
        """Compute `dst = sum_e weight_e * down_e(act(gate_e(x)) * up_e(x))` over each token's experts, added if `add`.

        Parameters
        ----------
        scores
            `[rows, experts]`, as the router gives them.
        gate, up, down
            Stacks, one matrix per expert; without a gate, an expert is `down_e(act(up_e(x)) * up_e(x))`.
        """
        n_experts = scores.shape[1]
        assert up.n_stack == down.n_stack == n_experts, (up.n_stack, down.n_stack, scores.shape)
        assert x.dim() == 2 and up.n_in == x.shape[1] and down.n_out == dst.shape[1], (x.shape, dst.shape)
        assert up.n_out == down.n_in, (up.n_out, down.n_in)
        assert gate is None or (gate.n_stack, gate.n_out, gate.n_in) == (n_experts, up.n_out, up.n_in), gate
        columns = (self._columns(each) for each in (x, scores, dst))
        gates = [] if gate is None else [self._matrices(gate)]
        stacks = (self._matrices(weight) for weight in (up, down))
        self.native.experts(*columns, gates, *stacks, act, routing.native(n_experts), add)

    def norm(self, x: Tensor, dst: Tensor, weight: Tensor, *, factor: float, eps: float) -> None:
        """Compute `x * weight / sqrt(sum(x^2) * factor + eps)` per head: RMSNorm with factor 1 / width, L2 norm with 1.

        The weight is one head's, for all of them, or all heads' `[heads, width]`.
        """
        assert x.shape == dst.shape and weight.shape in (x.shape[-1:], x.shape[1:]), (x.shape, dst.shape, weight.shape)
        self.native.norm(self._columns(x), self._columns(dst), _floats(weight), factor, eps)

    def gate(self, x: Tensor, by: Tensor, dst: Tensor, kind: Gate) -> None:
        """Compute `x * kind(by)`."""
        assert x.shape == by.shape == dst.shape, (x.shape, by.shape, dst.shape)
        self.native.gate(self._columns(x), self._columns(by), self._columns(dst), kind)

    def add(self, x: Tensor, dst: Tensor, factor: float = 1.0) -> None:
        """Compute `dst += x * factor`."""
        assert x.shape == dst.shape and x.dim() == 2, (x.shape, dst.shape)
        self.native.add(self._columns(x), self._columns(dst), factor)

    def copy(self, x: Tensor, dst: Tensor) -> None:
        """Copy `dst = x`; neither overlaps the other."""
        assert x.shape == dst.shape and x.dim() == 2, (x.shape, dst.shape)
        self.native.copy(self._columns(x), self._columns(dst))

    def bias(self, dst: Tensor, bias: Tensor) -> None:
        """Add `dst += bias`, in every row."""
        assert dst.dim() == 2 and bias.shape == dst.shape[1:], (dst.shape, bias.shape)
        self.native.bias(self._columns(dst), _floats(bias))

    def rope(
        self, x: Tensor, n_rotated: int, pairs: Literal["halves", "neighbours"] = "halves", table: int = 0
    ) -> None:
        """Turn the first `n_rotated` values of each head by the call's angles, in place.

        `halves` (NeoX) turns values i and i + n_rotated / 2 together, `neighbours` 2 i and 2 i + 1. `table` counts the
        call's angles.
        """
        assert 0 < n_rotated <= x.shape[-1] and n_rotated % 2 == 0, (n_rotated, x.shape)
        assert self._rotated.setdefault(table, n_rotated) == n_rotated, (table, n_rotated)
        self.native.rope(self._columns(x), n_rotated, pairs == "neighbours", table)

    def conv(
        self, x: Tensor, dst: Tensor, weight: Tensor, bias: Tensor | None, state: int, *, silu: bool = True
    ) -> None:
        """Convolve causally and depthwise, with SiLU or without.

        Weight `[channels, kernel]`; state float32 `[B, kernel, channels]`, the newest inputs, oldest first.
        """
        channels, kernel = weight.shape
        assert x.shape == dst.shape and x.dim() == 2 and x.shape[1] == channels, (x.shape, dst.shape, weight.shape)
        assert x.data_ptr() != dst.data_ptr(), "a convolution cannot run in place"
        assert bias is None or bias.shape == (channels,), bias
        self._expect(state, (kernel, channels))
        taps, offsets = _floats(weight.T), [] if bias is None else _floats(bias)
        self.native.conv(self._columns(x), self._columns(dst), taps, offsets, kernel, state, silu)

    def decay(
        self, a: Tensor, b: Tensor, decay: Tensor, beta: Tensor, rate: Tensor, bias: Tensor, scale: float = 1.0
    ) -> None:
        """Compute `decay = exp(rate * softplus(a + bias))` and `beta = scale * sigmoid(b)`, per value head.

        a and b `[rows, value heads]`, or in groups `[rows, key heads, value heads of each]`.
        """
        assert decay.dim() == 2 and decay.shape == beta.shape and rate.shape == bias.shape == decay.shape[1:], (
            decay.shape
        )
        assert all(x.shape[1:].numel() == decay.shape[1] for x in (a, b)), (a.shape, b.shape)
        columns = (self._columns(x) for x in (a, b, decay, beta))
        self.native.decay(*columns, _floats(rate), _floats(bias), scale)

    def add_weighed(self, x: Tensor, g: Tensor, dst: Tensor) -> None:
        """Add `dst += x * sigmoid(g)`; x and dst `[rows, width]`, g `[rows, 1]`."""
        assert x.shape == dst.shape and x.dim() == 2 and g.shape == (x.shape[0], 1), (x.shape, g.shape, dst.shape)
        self.native.weigh(self._columns(x), self._columns(g), self._columns(dst))

    def delta(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor,
        dst: Tensor,
        state: int,
        values: Literal["tiled", "grouped"] = "grouped",
    ) -> None:
        """Run the gated delta rule; q and k `[rows, key heads, D]`, v and dst `[rows, value heads, Dv]`.

        State float32 `[B, value heads, D, Dv]`. Value head h uses key head `h % key heads` if tiled, and
        `h // (value heads / key heads)` if grouped.
        """
        (_, n_key, d), (_, n_value, dv) = k.shape, v.shape
        assert q.shape == k.shape and dst.shape == v.shape and n_value % n_key == 0, (q.shape, v.shape)
        assert decay.shape == beta.shape == (v.shape[0], n_value), (decay.shape, v.shape)
        assert delta_rejects(d, dv) is None
        self._expect(state, (n_value, d, dv))
        self.native.delta(*(self._columns(x) for x in (q, k, v, decay, beta, dst)), state, values == "tiled")

    def mamba2(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        dst: Tensor,
        state: int,
        *,
        rate: Tensor,
        bias: Tensor,
        skip: Tensor,
    ) -> None:
        """Run Mamba-2's state space; x and dst `[rows, heads, D]`, b and c `[rows, groups, N]`, dt `[rows, heads]`.

        With dt = softplus(dt + bias): S = exp(rate dt) S + b (dt x)^T, dst = S^T c + skip x. State float32
        `[B, heads, N, D]`; rate, bias and skip per head.
        """
        (_, n_heads, d), (_, n_groups, n) = x.shape, b.shape
        assert dst.shape == x.shape and c.shape == b.shape and n_heads % n_groups == 0, (x.shape, b.shape)
        assert dt.shape == x.shape[:2] and rate.shape == bias.shape == skip.shape == (n_heads,), dt.shape
        self._expect(state, (n_heads, n, d))
        columns = (self._columns(each) for each in (x, b, c, dt, dst))
        self.native.mamba2(*columns, *(_floats(each) for each in (rate, bias, skip)), state)

    def mamba1(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor,
        dst: Tensor,
        state: int,
        *,
        rate: Tensor,
        bias: Tensor,
        skip: Tensor,
    ) -> None:
        """Run Mamba-1's selective state space; x, dt and dst `[rows, channels]`, b and c `[rows, N]`.

        With dt = softplus(dt + bias): S = exp(rate dt) S + dt x b, dst = S . c + skip x. State float32
        `[B, channels, N]`; rate `[channels, N]`, bias and skip per channel.
        """
        (_, channels), n = x.shape, b.shape[1]
        assert x.shape == dt.shape == dst.shape and b.shape == c.shape == (x.shape[0], n), (x.shape, b.shape)
        assert rate.shape == (channels, n) and bias.shape == skip.shape == (channels,), rate.shape
        self._expect(state, (channels, n))
        columns = (self._columns(each) for each in (x, b, c, dt, dst))
        self.native.mamba1(*columns, *(_floats(each) for each in (rate, bias, skip)), state)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dst: Tensor, scale: float) -> None:
        """Store k and v, one new token per sequence, and attend q; all `[rows, heads, D]`, dst contiguous.

        Where the rows lie comes with each call, as its next `CacheRows`.
        """
        assert q.shape[2] == k.shape[2] and v.shape[:2] == k.shape[:2] and q.shape[1] % k.shape[1] == 0, q.shape
        assert dst.shape == (*q.shape[:2], v.shape[2]) and dst.is_contiguous(), dst.shape
        columns = (self._columns(x) for x in (q, k, v, dst))
        self.native.attend(*columns, scale, len(self._calls))
        self._calls.append((k.shape[1], k.shape[2], v.shape[2]))

    def addresses(self, states: Sequence[Tensor], n_seqs: int) -> list[int]:
        """List the states' addresses by the operations' indices, checked; valid while the tensors live."""
        for index, shape in self._states.items():
            state = states[index]
            assert state.shape == (n_seqs, *shape) and state.dtype == torch.float32 and state.is_contiguous(), index
        return [state.data_ptr() for state in states]

    def separate_addresses(self, states: Sequence[Sequence[Tensor]]) -> list[int]:
        """List the addresses for sequences of separate caches, given by sequence and taken by operation."""
        each = [self.addresses(own, 1) for own in states]
        return [address for by_sequence in zip(*each, strict=True) for address in by_sequence]

    def run(
        self,
        begin: int,
        end: int,
        n_seqs: int,
        n_tokens: int,
        *,
        angles: Sequence[Angles] = (),
        states: Sequence[int] = (),
        rows: Sequence[CacheRows] = (),
        caches: Caches = "shared",
        spans: Sequence[int] = (),
        before: Sequence[int] = (),
        n_threads: int | None = None,
    ) -> list[Health]:
        """Run the operations `[begin, end)` on the first `n_seqs * n_tokens` rows, or on those of all spans.

        Parameters
        ----------
        angles
            By the tables that `rope` counts, float32 `[T, n_rotated / 2]` each; `[rows, n_rotated / 2]` for separate
            caches.
        states
            Of `addresses`, or `separate_addresses`; continued in place.
        rows
            One per `attend`, where one runs; for separate caches, one per `attend` and sequence, in that order.
        caches
            Whether the sequences share one cache or have one each, of lengths of their own.
        spans
            Tokens of each separate cache, whose rows follow one another; none for one each.
        before
            Of separate caches, where states lie before the call, if elsewhere; those are left as they are, and `replay`
            can advance them.

        Returns
        -------
        list
            For each of `rows`, whether the attention's output was finite, and if not, whether its inputs were; of
            separate caches, for each of their tokens.
        """
        assert not rows or n_tokens == 1, n_tokens
        separate = caches == "separate"
        own = list(spans or [1] * n_seqs) if separate else []
        n_rows = sum(own) if separate else n_seqs * n_tokens
        assert self._rows is None or 0 < n_rows <= self._rows, (n_rows, self._rows)
        n_angles, n_sets = (n_rows, n_seqs) if separate else (n_tokens, 1)
        assert not separate or (n_tokens == 1 and len(own) == n_seqs and min(own) >= 1), (n_tokens, own)
        assert not before or (separate and len(before) == len(states)), (len(before), len(states))
        self.check_states(states, n_sets)
        self.check_angles(angles, n_angles)
        health = self.native.run(
            cpu_native.isa(),
            begin,
            end,
            n_seqs,
            n_tokens,
            own,
            [(cos.data_ptr(), sin.data_ptr()) for cos, sin in angles],
            states,
            before,
            self.native_calls(rows, n_seqs, n_sets),
            n_threads or native_threads(),
        )
        return [HEALTH[code] for code in health]

    def replay(self, first_row: int, n_tokens: int, states: Sequence[int]) -> None:
        """Advance the states of one cache by the first tokens of its span in the last call that was given `before`.

        Parameters
        ----------
        first_row
            Of its span in that call.
        states
            Of `addresses`: those from before the call, continued in place.
        """
        self.check_states(states)
        self.native.replay(cpu_native.isa(), [(first_row, n_tokens)], states, native_threads())

    def check_states(self, states: Sequence[int], n_sets: int = 1) -> None:
        """Assert that there is a state for each that the operations name, of so many sets."""
        assert not self._states or len(states) >= n_sets * (max(self._states) + 1), (len(states), self._states)

    def check_angles(self, angles: Sequence[Angles], n_angles: int) -> None:
        """Assert that there are so many angles, of the kind that the operations turn by."""
        assert len(angles) >= len(self._rotated), (len(angles), self._rotated)
        for table, n_rotated in self._rotated.items():
            for x in angles[table]:
                assert x.dtype == torch.float32 and x.is_contiguous() and x.shape == (n_angles, n_rotated // 2), x

    def native_calls(self, rows: Sequence[CacheRows], n_seqs: int, n_sets: int = 1) -> list[tuple[object, ...]]:
        """Convert the rows of every attention for the native code, by set; none if there are none."""
        shapes = [shape for shape in self._calls for _ in range(n_sets)]
        return [r.native(n_seqs // n_sets, *shape) for r, shape in zip(rows, shapes, strict=True)] if rows else []

    def _matrices(self, weight: Weight) -> tuple[tuple[str, int, int, int], int, int]:
        """Describe a stack: type, sizes, address of the first matrix, their number, the bytes between; it is kept."""
        self._keep.append(weight.data)
        first = (weight.format.name, weight.n_out, weight.n_in, weight.data.data_ptr())
        return first, weight.n_stack, weight.data.stride(0)

    def start_timing(self) -> None:
        """Time every operation from now on; without this, nothing is timed and nothing costs."""
        self.native.start_timing()

    def timing(self) -> list[tuple[str, float]]:
        """Return the kind of every operation in order, and seconds since `start_timing`."""
        found: list[tuple[str, float]] = self.native.timing()
        return found

    def _expect(self, state: int, shape: tuple[int, ...]) -> None:
        assert self._states.setdefault(state, shape) == shape, (state, shape)

    def _columns(self, x: Tensor) -> Columns:
        """Return address and strides of a buffer's columns; the buffer is kept."""
        assert x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1, (x.dtype, x.stride())
        assert self._rows in (None, x.shape[0]), (self._rows, x.shape)
        self._rows = x.shape[0]
        self._keep.append(x)
        groups, group_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
        return x.data_ptr(), x.stride(0), group_stride, groups, x.shape[-1]


def delta_rejects(head_dim_k: int, head_dim_v: int) -> str | None:
    """Explain why the native gated delta rule cannot run these head dims; None if it can."""
    if head_dim_k % 2 or head_dim_v % 16:
        return f"gated delta rule of key dim {head_dim_k} and value dim {head_dim_v}: multiples of 2 and 16 are needed"
    return None


def _floats(x: Tensor) -> list[float]:
    values: list[float] = x.detach().float().flatten().tolist()
    return values
