"""Attention over several segments: the reference, and the native kernels of every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridkv.formats import FORMATS
from hybridkv.kernels import AttentionParams, Kernel, KVView, Segment, attend, cpu, cpu_native, reference
from tests.isas import ISAS, isas_with
from tests.kernels.stored import Part, Stored, store_parts
from tests.oracles.attention import exact_attention, relative_rmse
from tests.thin import pairwise

KERNELS = ("reference", *ISAS)

SINK, TAIL = Part("f16", "f16", 4, memory="float"), Part("f16", "f16", 37, memory="float")
LAYOUTS = {
    "sink, packed, tail": (SINK, Part("q4_0", "q4_0", 131), TAIL),
    "sink, centered, tail": (SINK, Part("q4_0", "q5_1", 131, centered=True), TAIL),
    "centered alone": (Part("q4_0", "q8_0", 90, centered=True),),
    "packed, one newest": (Part("q6_0", "q4_1", 300), Part("f16", "f16", 1)),
    "one row each": (Part("q8_0", "iq4_nl", 1), Part("f16", "f16", 1, centered=True), Part("q4_0", "f32", 1)),
    "four": (Part("f32", "q8_KV", 1), Part("q8_0", "bf16", 129, centered=True), Part("q5_1", "q5_0", 64), TAIL),
    "cut in parts": (SINK, Part("q8_0", "q8_0", 1100, centered=True), Part("bf16", "bf16", 160, centered=True)),
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    if request.param == "reference":
        return reference.KERNELS[0]
    monkeypatch.setenv("HYBRIDKV_ISA", request.param)
    return cpu.KERNELS[0]


@dataclass(frozen=True)
class Case:
    """One attention; hashable, so that all kernels share what it should give."""

    parts: tuple[Part, ...]
    n_new: int
    group: int = 2
    head_dim_k: int = 64
    head_dim_v: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    masked: bool = False
    rotated: bool = False

    @property
    def n_queries(self) -> int:
        return min(self.n_new, sum(part.n_rows for part in self.parts))

    def query(self) -> Tensor:
        generator = torch.Generator().manual_seed(99)
        return torch.randn(2, 2 * self.group, self.n_queries, self.head_dim_k, generator=generator)

    def params(self) -> AttentionParams:
        mask = None
        if self.masked:
            n_rows, first = sum(part.n_rows for part in self.parts), self.parts[0].n_rows
            shape = (2, 2 * self.group, self.n_queries, n_rows)
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5
            mask[0, :, :, :first] = False
            mask[1, 0, 0] = False
        sinks = torch.linspace(-2, 5, 2 * self.group) if self.sinks else None
        return AttentionParams(scale=self.head_dim_k**-0.5, softcap=self.softcap, sinks=sinks, mask=mask)


@cache
def expected(case: Case) -> tuple[Stored, Tensor]:
    stored = store_parts(
        case.parts,
        head_dim_k=case.head_dim_k,
        head_dim_v=case.head_dim_v,
        window=case.window,
        rotated=case.rotated,
    )
    p = case.params()
    exact = exact_attention(
        case.query(),
        stored.k,
        stored.v,
        scale=p.scale,
        mask=p.mask,
        window=case.window,
        softcap=p.softcap,
        sinks=p.sinks,
    )
    return stored, exact


def kernels_with(names: str, *axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize the fixture `kernel` and other names: each value of an axis meets each kernel by default."""
    return pytest.mark.parametrize(f"kernel, {names}", pairwise(KERNELS, *axes), indirect=["kernel"])


def check(kernel: Kernel, case: Case) -> None:
    stored, exact = expected(case)
    got = attend(kernel, case.query(), stored.view, case.params())
    assert torch.isfinite(got).all()
    assert relative_rmse(got, exact) <= kernel.tolerance


@kernels_with("layout, group, n_new", LAYOUTS, (1, 3, 8), (1, 3, 63))
def test_layouts(kernel: Kernel, layout: str, group: int, n_new: int) -> None:
    check(kernel, Case(LAYOUTS[layout], n_new, group))


@kernels_with("dims, n_new", [(64, 80), (80, 48), (80, 80), (192, 128), (256, 256)], (1, 5))
def test_head_dims(kernel: Kernel, dims: tuple[int, int], n_new: int) -> None:
    for rotated in (False, True):
        layout = LAYOUTS["sink, centered, tail"]
        check(kernel, Case(layout, n_new, head_dim_k=dims[0], head_dim_v=dims[1], rotated=rotated))


@kernels_with("name, n_new", FORMATS, (1, 3))
def test_every_type_beside_floats(kernel: Kernel, name: str, n_new: int) -> None:
    for n_rows in (1, 70):
        packed = Part(name, name, n_rows, centered=True)
        check(kernel, Case((SINK, packed, TAIL), n_new, group=4))


OPTIONS: dict[str, dict[str, object]] = {
    "window in the tail": {"window": 9},
    "window into the packed rows": {"window": 60},
    "window into the sink": {"window": 171},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "mask": {"masked": True},
    "rotated": {"rotated": True},
    "capped and windowed": {"window": 60, "softcap": 3.0, "sinks": True, "rotated": True},
    "capped and masked": {"masked": True, "softcap": 3.0, "sinks": True},
}


@kernels_with("option, n_new", OPTIONS, (1, 3, 63))
def test_options(kernel: Kernel, option: str, n_new: int) -> None:
    check(kernel, replace(Case(LAYOUTS["sink, centered, tail"], n_new, group=3), **OPTIONS[option]))  # type: ignore[arg-type]


def recut(view: KVView, lengths: Sequence[int]) -> KVView:
    """The rows of the only segment as segments of these lengths, in the same memory."""
    (whole,) = view.segments
    start, segments = whole.start, []
    for length in lengths:
        segments.append(replace(whole, start=start, length=length))
        start += length
    assert start == whole.start + whole.length
    return replace(view, segments=tuple(segments))


@kernels_with("lengths, n_new", [(1, 899), (899, 1), (4, 736, 160), (300, 128, 172, 300)], (1, 40))
def test_where_rows_are_cut_changes_nothing(kernel: Kernel, lengths: tuple[int, ...], n_new: int) -> None:
    stored, exact = expected(Case((Part("q8_0", "q4_0", 900, centered=True),), n_new))
    q = torch.randn(2, 4, n_new, 64, generator=torch.Generator().manual_seed(99))
    got = attend(kernel, q, recut(stored.view, lengths), AttentionParams(scale=0.125))
    assert relative_rmse(got, exact) <= kernel.tolerance


@isas_with("n_new", (1, 63))
def test_padding_and_threads(isa: str, n_new: int) -> None:
    """Left padding that ends within a segment, on one thread and on three."""
    stored = store_parts(LAYOUTS["cut in parts"])
    n_rows = stored.view.length
    first_row = torch.tensor([2, 640])
    for segment, first in zip(stored.view.segments, (0, 4), strict=False):  # NaN before the second sequence begins
        hidden = min(segment.length, 640 - first)
        for plane in (*segment.k, *segment.v):
            plane[1, :, segment.start : segment.start + hidden] = 0xFF
    seen = torch.ones(n_new, n_rows, dtype=torch.bool).tril(n_rows - n_new)
    mask = seen & (torch.arange(n_rows) >= first_row.view(2, 1, 1, 1))
    q = torch.randn(2, 6, n_new, 64, generator=torch.Generator().manual_seed(3))
    exact = exact_attention(q, stored.k, stored.v, scale=0.125, mask=mask)
    for n_threads in (1, 3):
        got = cpu_native.attend(q, stored.view.segments, 64, 64, 0.125, mask=mask, n_threads=n_threads)
        assert relative_rmse(got, exact) <= cpu.TOLERANCE, n_threads


def spoil(segment: Segment, row: int) -> None:
    for plane in (*segment.k, *segment.v):
        plane[0, 0, segment.start + row] = 0xFF


@kernels_with("index, n_new", (0, 1, 2), (1, 3))
def test_a_nan_shows_where_it_is_attended_and_nowhere_else(kernel: Kernel, index: int, n_new: int) -> None:
    stored = store_parts((SINK, Part("q8_0", "q8_0", 70, centered=True), TAIL))
    spoil(stored.view.segments[index], row=2)
    spoiled = (0, 4, 74)[index] + 2
    n_rows = stored.view.length
    mask = torch.ones(1, 4, n_new, n_rows, dtype=torch.bool)
    mask[:, 1::2, :, spoiled] = False
    q = torch.randn(2, 4, n_new, 64, generator=torch.Generator().manual_seed(3))
    got = attend(kernel, q, stored.view, AttentionParams(scale=0.125, mask=mask))
    exact = exact_attention(q, stored.k, stored.v, scale=0.125, mask=mask.expand(2, -1, -1, -1))
    assert got[0, 0].isnan().all()
    for batch, head in ((0, 1), (0, 2), (0, 3), (1, 0)):
        assert relative_rmse(got[batch, head], exact[batch, head]) <= 2 * kernel.tolerance


def test_what_no_cache_hands_out_is_refused(isa: str) -> None:
    view = store_parts(LAYOUTS["sink, centered, tail"]).view
    sink, packed, tail = view.segments
    assert packed.center is not None
    q = torch.randn(2, 4, 1, 64)
    bad: tuple[tuple[Segment, ...], ...] = (
        (sink, replace(packed, length=0), tail),
        (sink, packed, replace(tail, length=tail.length + 4)),
        (replace(sink, start=-1), packed),
        (replace(packed, center=packed.center[:1]),),
        (replace(packed, center=packed.center.double()),),
    )
    for segments in bad:
        with pytest.raises(AssertionError):
            cpu_native.attend(q, segments, 64, 64, 0.125)
