"""Attention over the packed cache on the CPU: right first, then fast, beside the machine's ceilings and its peers.

A case is one shape and one type. It is compared with float64 attention over the decoded cache; one that is further
off than the kernels' tolerance is not timed. Everything of one shape is timed in turns, in one process. Called by
`hybridkv bench attention` and `bench/attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS
from hybridkv.kernels import Segment, cpu, cpu_native
from hybridkv_lab.ceilings import Ceilings, measure_ceilings, read_gb_s
from hybridkv_lab.peers import Found, ik_attention, ik_library, torch_attention
from hybridkv_lab.shape import Shape
from hybridkv_lab.store_bench import Store, measure_store
from hybridkv_lab.timing import Spread, interleaved

PEERS: dict[str, Callable[[], Found]] = {"ik": ik_library.find, "torch": torch_attention.find}
DISTINCT_ROWS = 4096
"""Beyond so many, the stored rows repeat: encoding and float64 attention stay cheap; time does not depend on values."""

_CHECKED_QUERIES = 8
_FULL_BUDGET_S, _QUICK_BUDGET_S = 1.0, 0.2

Planes = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One timed case. Milliseconds are medians.

    Attributes
    ----------
    error
        Relative RMSE against float64 attention over the decoded cache.
    one_thread_ms
        On one thread, or None where that is what was asked for.
    kv_bytes
        Stored bytes that a call reads.
    read_gb_s
        What the machine reads per second of a set of that size.
    ceiling_ms, bound
        The slower of reading those bytes and of the multiply-adds at their peak, and which of the two it is.
    scratch_bytes
        Working memory of a call, all threads together.
    peer_ms, peer_error
        By peer, where it runs the case; errors as above, of peers that read the same bytes.
    """

    shape: Shape
    kv_type: str
    error: float
    time: Spread
    one_thread_ms: float | None
    kv_bytes: int
    read_gb_s: float
    ceiling_ms: float
    bound: Literal["reads", "products"]
    scratch_bytes: int
    peer_ms: dict[str, float] = field(default_factory=dict)
    peer_error: dict[str, float] = field(default_factory=dict)

    @property
    def gb_s(self) -> float:
        """10^9 bytes of cache per second."""
        return self.kv_bytes / self.time.median_ms / 1e6

    @property
    def gflop_s(self) -> float:
        """10^9 floating-point operations per second, two for a multiply-add."""
        return 2 * self.shape.multiply_adds / self.time.median_ms / 1e6

    @property
    def of_ceiling(self) -> float:
        """Share of the ceiling's speed."""
        return self.ceiling_ms / self.time.median_ms

    @property
    def scaling(self) -> float | None:
        """Speed over that of one thread."""
        return None if self.one_thread_ms is None else self.one_thread_ms / self.time.median_ms

    @property
    def ratio(self) -> dict[str, float]:
        """By peer, how many times faster than it."""
        return {peer: ms / self.time.median_ms for peer, ms in self.peer_ms.items()}

    def __str__(self) -> str:
        return f"{self.shape} {self.kv_type}"


@dataclass(frozen=True, slots=True)
class Wrong:
    """A case that failed the gate."""

    shape: Shape
    kv_type: str
    error: float

    def __str__(self) -> str:
        return (
            f"{self.shape} {self.kv_type}: relative RMSE {self.error:.1e} against float64 is above "
            f"{cpu.TOLERANCE:.0e}: not timed"
        )


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """All that a run found."""

    ceilings: Ceilings
    peers: tuple[Found, ...]
    cases: tuple[Case, ...]
    wrong: tuple[Wrong, ...]
    stores: tuple[Store, ...]


def shapes(*, quick: bool) -> list[Shape]:
    """List the usual shapes: decode and prefill of a Qwen3.5-like and of a Llama-like layer."""
    if quick:
        return [Shape(256, 16, 2, 1, 4096), Shape(256, 16, 2, 1, 32768), Shape(256, 16, 2, 512, 4096)]
    heads = ((256, 16, 2), (128, 32, 8))
    decode = [Shape(*h, 1, stored) for h in heads for stored in (4096, 32768, 131072)]
    return decode + [Shape(*h, 512, stored) for h in heads for stored in (4096, 32768)]


def run_attention_bench(
    cases: Sequence[Shape],
    types: Sequence[str],
    *,
    peers: Sequence[str],
    n_threads: int,
    quick: bool,
    progress: Callable[[str], object] = lambda _: None,
) -> AttentionReport:
    """Check and time every shape with every type.

    Parameters
    ----------
    peers
        Names from `PEERS`; one that is not installed is reported and left out.
    progress
        Told each shape before it is measured, and each case that is wrong.

    Raises
    ------
    UsageError
        If the native kernels are not built.
    """
    if (missing := cpu_native.available()) is not None:
        raise UsageError(f"there is nothing to measure: {missing}", hint="install hybridkv with a C++17 compiler")
    torch.set_num_threads(n_threads)
    found = tuple(PEERS[name]() for name in peers)
    present = [peer.name for peer in found if peer.path is not None]
    progress("ceilings")
    top = measure_ceilings(n_threads)
    timed: list[Case] = []
    wrong: list[Wrong] = []
    budget_s = _QUICK_BUDGET_S if quick else _FULL_BUDGET_S
    for shape in cases:
        progress(str(shape))
        for result in _measure(shape, types, present, n_threads, top, budget_s):
            if isinstance(result, Wrong):
                progress(str(result))
                wrong.append(result)
            else:
                timed.append(result)
    progress("store")
    decode_ms = {(c.shape, c.kv_type): c.time.median_ms for c in timed if c.shape.n_new == 1}
    stores = measure_store(decode_ms, n_threads=n_threads, budget_s=budget_s / 4)
    return AttentionReport(top, found, tuple(timed), tuple(wrong), stores)


@dataclass(slots=True)
class _Candidate:
    """One type of one shape before it is timed."""

    kv_type: str
    k: Planes
    v: Planes
    error: float
    scratch_bytes: int


def _measure(
    shape: Shape, types: Sequence[str], peers: Sequence[str], n_threads: int, top: Ceilings, budget_s: float
) -> list[Case | Wrong]:
    """Gate every type of a shape, then time those that pass, and the peers, in turns."""
    q = torch.randn(1, shape.n_heads, shape.n_new, shape.head_dim, generator=torch.Generator().manual_seed(3))
    candidates = [_candidate(shape, kv_type, q, n_threads) for kv_type in types]
    right = [c for c in candidates if c.error <= cpu.TOLERANCE]
    calls: dict[str, Callable[[], object]] = {}
    peer_error: dict[str, dict[str, float]] = {c.kv_type: {} for c in right}
    with ExitStack() as stack:
        for c in right:
            calls[c.kv_type] = partial(_attend, shape, q, c, n_threads)
            if n_threads > 1:
                calls[f"{c.kv_type} on 1"] = partial(_attend, shape, q, c, 1)
            if "ik" in peers and ik_attention.runs(shape, c.kv_type):
                fmt, d = FORMATS[c.kv_type], shape.head_dim
                k, v = fmt.to_ggml(c.k, d), fmt.to_ggml(c.v, d)
                call = stack.enter_context(ik_attention.flash_attention(shape, c.kv_type, q, k, v, n_threads))
                peer_error[c.kv_type]["ik"] = _error(shape, q, c, call())
                calls[f"{c.kv_type} ik"] = call
        if right and "torch" in peers:
            calls["torch"] = torch_attention.attention(shape, q)
        times = interleaved(calls, budget_s=budget_s)
    results: list[Case | Wrong] = [Wrong(shape, c.kv_type, c.error) for c in candidates if c not in right]
    for c in right:
        names = {"ik": f"{c.kv_type} ik", "torch": "torch"}
        peer_ms = {peer: times[name].median_ms for peer, name in names.items() if name in times}
        results.append(_case(shape, c, times, peer_ms, peer_error[c.kv_type], top))
    return results


def _case(
    shape: Shape,
    c: _Candidate,
    times: dict[str, Spread],
    peer_ms: dict[str, float],
    peer_error: dict[str, float],
    top: Ceilings,
) -> Case:
    n_bytes = sum(plane.nbytes for plane in (*c.k, *c.v))
    gb_s = read_gb_s(n_bytes, top.n_threads)
    peak = top.integer_gmac_s if FORMATS[c.kv_type].is_quantized else top.float_gmac_s
    reads_ms, products_ms = n_bytes / gb_s / 1e6, shape.multiply_adds / peak / 1e6
    one = times.get(f"{c.kv_type} on 1")
    return Case(
        shape=shape,
        kv_type=c.kv_type,
        error=c.error,
        time=times[c.kv_type],
        one_thread_ms=None if one is None else one.median_ms,
        kv_bytes=n_bytes,
        read_gb_s=gb_s,
        ceiling_ms=max(reads_ms, products_ms),
        bound="reads" if reads_ms > products_ms else "products",
        scratch_bytes=c.scratch_bytes,
        peer_ms=peer_ms,
        peer_error=peer_error,
    )


def _candidate(shape: Shape, kv_type: str, q: Tensor, n_threads: int) -> _Candidate:
    k, v = (_stored(shape, kv_type, seed) for seed in (1, 2))
    c = _Candidate(kv_type, k, v, error=0.0, scratch_bytes=0)
    scratch: list[int] = []
    out = _attend(shape, q, c, n_threads, scratch.append)
    c.error, c.scratch_bytes = _error(shape, q, c, out), max(scratch, default=0)
    return c


def _stored(shape: Shape, kv_type: str, seed: int) -> Planes:
    """Encode normal rows, `DISTINCT_ROWS` of them in turns."""
    rows = min(shape.n_stored, DISTINCT_ROWS)
    x = torch.randn(1, shape.n_kv_heads, rows, shape.head_dim, generator=torch.Generator().manual_seed(seed))
    turns = torch.arange(shape.n_stored) % rows
    return tuple(_in_cache_memory(plane[:, :, turns]) for plane in FORMATS[kv_type].encode(x))


def _in_cache_memory(plane: Tensor) -> Tensor:
    """Copy a plane into memory as the cache takes it."""
    return cpu_native.allocate(plane.shape).copy_(plane)


def _attend(
    shape: Shape, q: Tensor, c: _Candidate, n_threads: int, on_scratch: Callable[[int], object] | None = None
) -> Tensor:
    d, fmt = shape.head_dim, FORMATS[c.kv_type]
    return cpu_native.attend(
        q,
        [Segment(c.k, c.v, fmt, fmt, 0, shape.n_stored)],
        d,
        d,
        d**-0.5,
        n_threads=n_threads,
        on_scratch=on_scratch,
    )


def _error(shape: Shape, q: Tensor, c: _Candidate, out: Tensor) -> float:
    """Compute the relative RMSE of some queries of `out` against float64 attention over the decoded rows.

    A row that is stored n times is one row whose score is larger by log n.
    """
    fmt, rows = FORMATS[c.kv_type], min(shape.n_stored, DISTINCT_ROWS)
    group = shape.n_heads // shape.n_kv_heads
    k, v = (
        fmt.decode([p[:, :, :rows] for p in planes], shape.head_dim).double().repeat_interleave(group, 1)
        for planes in (c.k, c.v)
    )
    n = min(shape.n_new, _CHECKED_QUERIES)
    queries = torch.linspace(0, shape.n_new - 1, n).round().long()
    seen = shape.n_stored - shape.n_new + 1 + queries
    copies = ((seen[:, None] - torch.arange(rows) + rows - 1) // rows).clamp_min(0)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, queries].double(), k, v, attn_mask=copies.double().log()
    )
    got = out[:, :, queries].double()
    return float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt())
