"""Exact rows and the center, against a list of rows that knows no planes: which rows are f16, and all values."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridkv.cache import AttentionFacts, KVLayer, KVSpec, KVTypes, LayerKernels, resolve
from hybridkv.cache.spec import WINDOW_SLACK
from hybridkv.errors import ContextError
from hybridkv.formats import get_format
from hybridkv.kernels import ENCODERS, AttentionParams, KVView, attend, reference
from hybridkv.rotation import rotate
from tests.oracles.attention import exact_attention, relative_rmse

HEADS, DIM_K, DIM_V = 2, 32, 64
DEVICE = torch.device("cpu")


def choose(spec: KVSpec) -> LayerKernels:
    return resolve(spec, "cpu", reference.KERNELS, ENCODERS)


def layer(types: KVTypes, *, window: int | None = None, n_ctx: int | None = None) -> KVLayer:
    return KVLayer(KVSpec(AttentionFacts(3, 4, HEADS, DIM_K, DIM_V, window=window), types), choose, n_ctx=n_ctx)


def rows(n: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, HEADS, n, dim, generator=generator) for dim in (DIM_K, DIM_V))
    return k + 3 * torch.randn(1, HEADS, 1, DIM_K, generator=torch.Generator().manual_seed(99)), v


def stored(type_name: str, x: Tensor) -> Tensor:
    fmt = get_format(type_name)
    return fmt.decode(fmt.encode(x), x.shape[-1])


def shape_of(view: KVView) -> list[tuple[str, int]]:
    """Formats of K and rows of each segment."""
    return [(segment.format_k.name, segment.length) for segment in view.segments]


@dataclass
class Rows:
    """What a layer should hold: rows as stored, in the order of their tokens, each marked as exact or not."""

    types: KVTypes
    window: int | None
    k: Tensor = field(default_factory=lambda: torch.empty(1, HEADS, 0, DIM_K))
    v: Tensor = field(default_factory=lambda: torch.empty(1, HEADS, 0, DIM_V))
    exact: list[bool] = field(default_factory=list)

    @property
    def sink(self) -> int:
        return self.types.sink if self.window is None else 0

    @property
    def tail(self) -> int:
        return self.types.tail if self.window is None else min(self.types.tail, self.window)

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat([self.k, rotate(k) if self.types.rotate_k else k], 2)
        self.v = torch.cat([self.v, rotate(v) if self.types.rotate_v else v], 2)
        n_new = k.shape[2]
        if not self.tail:
            self.exact += [position < self.sink for position in range(len(self.exact), len(self.exact) + n_new)]
            return
        fresh = min(n_new, 512)
        self.exact += [True] * (n_new - fresh)
        self._leave()
        self.exact += [True] * fresh

    def _leave(self) -> None:
        """Of the exact rows behind the sinks, the oldest leave in blocks of 32 until fewer than 32 are too many."""
        behind = [i for i, exact in enumerate(self.exact) if exact and i >= self.sink]
        leaving = max(0, len(behind) - self.tail) // 32 * 32
        for i in behind[:leaving]:
            self.exact[i] = False

    def drop(self, n: int) -> None:
        left = max(0, len(self.exact) - n)
        self.k, self.v, self.exact = self.k[:, :, :left], self.v[:, :, :left], self.exact[:left]

    def check(self, view: KVView) -> None:
        """The view's rows are the newest of these, each stored as it is marked."""
        first = len(self.exact) - view.length
        for segment in view.segments:
            span, held = slice(first, first + segment.length), slice(segment.start, segment.start + segment.length)
            exact = segment.format_k.name == "f16" == segment.format_v.name
            assert self.exact[span] == [exact] * segment.length
            k, v = self.k[:, :, span], self.v[:, :, span]
            if self.tail:  # whatever is packed was f16 before
                k, v = k.half().float(), v.half().float()
            if segment.center is not None:
                k = k - segment.center.unsqueeze(2)
            wanted = stored(segment.format_k.name, k), stored(segment.format_v.name, v)
            for planes, fmt, dim, want in (
                (segment.k, segment.format_k, DIM_K, wanted[0]),
                (segment.v, segment.format_v, DIM_V, wanted[1]),
            ):
                got = fmt.decode([plane[:, :, held] for plane in planes], dim)
                torch.testing.assert_close(got, want, rtol=0, atol=0)
            first += segment.length
        assert first == len(self.exact)


STEPS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 31, 32, 33, 63, 100, 512, 513, 700, 1100])),
    st.tuples(st.just("token by token"), st.sampled_from([1, 5, 70])),
    st.tuples(st.just("crop"), st.sampled_from([0, 1, 5, 40, 200, 1000])),
    st.tuples(st.just("select"), st.sampled_from([1, 2, 3])),
    st.tuples(st.just("copy"), st.sampled_from([0, 50])),
)


@settings(deadline=None, max_examples=150)
@given(
    types=st.builds(
        KVTypes,
        type_k=st.sampled_from(["q4_0", "q8_KV", "f16"]),
        type_v=st.sampled_from(["q4_1", "q8_0"]),
        rotate_k=st.booleans(),
        rotate_v=st.booleans(),
        tail=st.sampled_from([0, 1, 5, 32, 40, 128, 700]),
        sink=st.sampled_from([0, 1, 4, 33, 600]),
        center=st.booleans(),
    ),
    window=st.sampled_from([None, None, 1, 7, 40, 129, 600]),
    reserved=st.booleans(),
    steps=st.lists(STEPS, min_size=1, max_size=12),
)
def test_any_history(types: KVTypes, window: int | None, reserved: bool, steps: list[tuple[str, int]]) -> None:
    total = 1 + sum(n for what, n in steps if what in ("append", "token by token", "copy"))
    n_ctx = total if reserved else None
    kv, model = layer(types, window=window, n_ctx=n_ctx), Rows(types, window)
    for seed, (what, n) in enumerate(steps):
        if what == "crop":
            if kv.can_crop:
                kv.crop(n)
                model.drop(n)
        elif what == "copy":
            before, kv = kv, kv.copy(None if n_ctx is None else n_ctx + n)
            before.append(*rows(1, batch=model.k.shape[0])) if before.n_seen < total else before.reset()
        elif what == "select":
            if kv.batch:
                indices = torch.arange(n) * 7 % kv.batch
                kv.select_sequences(indices)
                model.k, model.v = model.k[indices], model.v[indices]
        else:
            sizes = [n] if what == "append" else [1] * n
            for step, size in enumerate(sizes):
                k, v = rows(size, batch=model.k.shape[0], seed=1000 * seed + step)
                visible = size + (len(model.exact) if window is None else min(len(model.exact), window - 1))
                will_pack, n_packed = kv.packs(size), packed_rows(kv)
                view = kv.append(k, v)
                assert view.length == visible
                if window is None:
                    assert will_pack == (packed_rows(kv) > n_packed)
                model.append(k, v)
                if step % 9 == 0:
                    model.check(view)
        assert kv.n_seen == len(model.exact)
        if kv.n_seen and kv.batch:
            model.check(kv.view(min(kv.n_stored, kv.past_rows() + 1)))
            check_bytes(kv, model)


def packed_rows(kv: KVLayer) -> int:
    view = kv.view()
    return sum(s.length for s in view.segments if kv.shows_packed(view) and s.format_v.name != "f16")


def check_bytes(kv: KVLayer, model: Rows) -> None:
    waiting = 32 + 512 if model.tail else 0
    f16 = [segment for segment in kv.view().segments if segment.format_v.name == "f16"]
    assert all(segment.k[0].shape[2] <= model.sink + model.tail + waiting for segment in f16)
    if model.window is None:
        n_exact = sum(model.exact)
        used = n_exact * kv.spec.exact_bytes_per_token + (len(model.exact) - n_exact) * kv.spec.bytes_per_token
        center = 4 * HEADS * DIM_K if kv.spec.center and n_exact < len(model.exact) else 0
        assert kv.nbytes_used == kv.batch * (used + center)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("window", [None, 7, 100, 2000], ids=str)
@pytest.mark.parametrize(("tail", "sink"), [(0, 0), (0, 4), (32, 0), (128, 4), (3000, 4)])
def test_planned_bytes_are_allocated_bytes(tail: int, sink: int, window: int | None, center: bool) -> None:
    types = KVTypes("q4_0", "q8_0", tail=tail, sink=sink, center=center)
    for n_ctx in (1, 31, 200, 3 * WINDOW_SLACK):
        kv = layer(types, window=window, n_ctx=n_ctx)
        for n in (1, *[31] * ((n_ctx - 1) // 31)):
            kv.append(*rows(n, batch=3))
            assert kv.nbytes == kv.spec.bytes_at(n_ctx, batch=3), (n_ctx, kv.n_seen)
        with pytest.raises(ContextError):
            kv.append(*rows(31, batch=3))


def test_windows_are_bounded_without_a_context() -> None:
    kv = layer(KVTypes("q4_0", "q4_0", tail=128, sink=4, center=True), window=300)
    for seed in range(3 * WINDOW_SLACK // 16):
        kv.append(*rows(16, seed=seed))
    assert kv.nbytes == kv.spec.bytes_at(10**9)


def test_growth_without_a_context_ends_at_the_bound() -> None:
    kv = layer(KVTypes("q4_0", "q4_0", tail=1000, sink=4))
    kv.append(*rows(3))
    small = kv.nbytes
    for seed in range(40):
        kv.append(*rows(30, seed=seed))
    f16 = kv.view().segments[0].k[0]
    assert small < 300 * kv.spec.exact_bytes_per_token
    assert f16.shape[2] == kv.spec.exact_rows_at(10**9) == 1000 + 4 + 32 + 32


@pytest.mark.parametrize("n_ctx", [None, 4000])
def test_what_a_prompt_needs_is_given_back(n_ctx: int | None) -> None:
    kv = layer(KVTypes("q4_0", "q4_0", tail=64, sink=4), n_ctx=n_ctx)
    most = 0
    for seed in range(5):
        kv.append(*rows(512, seed=seed))
        f16 = kv.view().segments[-1].k[0]
        most = max(most, f16.shape[2])
        assert f16.shape[2] <= 4 + 64 + 31 + 512
    assert most > 512
    kv.append(*rows(1, seed=9))
    assert kv.view().segments[-1].k[0].shape[2] == 4 + 64 + 32 + 32
    if n_ctx is not None:
        assert kv.nbytes == kv.spec.bytes_at(n_ctx)


def test_rows_leave_the_tail_in_blocks_before_others_come() -> None:
    kv = layer(KVTypes("q4_0", "q8_0", tail=40, sink=4))
    assert shape_of(kv.append(*rows(4 + 40 + 31))) == [("f16", 75)]
    assert not kv.packs(1)
    assert shape_of(kv.append(*rows(1))) == [("f16", 76)]
    assert kv.packs(1)
    assert shape_of(kv.append(*rows(1))) == [("f16", 4), ("q4_0", 32), ("f16", 41)]
    assert shape_of(kv.append(*rows(200))) == [("f16", 4), ("q4_0", 32), ("f16", 241)]
    assert shape_of(kv.append(*rows(1))) == [("f16", 4), ("q4_0", 224), ("f16", 50)]


def test_of_a_long_call_the_newest_rows_wait() -> None:
    kv = layer(KVTypes("q4_0", "q8_0", tail=40, sink=4))
    assert shape_of(kv.append(*rows(1700))) == [("f16", 4), ("q4_0", 1120), ("f16", 576)]


def test_without_a_tail_all_but_the_sinks_is_packed_at_once() -> None:
    kv = layer(KVTypes("q4_0", "q8_0", sink=4))
    assert shape_of(kv.append(*rows(3))) == [("f16", 3)]
    assert not kv.packs(1)
    assert kv.packs(2)
    assert shape_of(kv.append(*rows(3))) == [("f16", 4), ("q4_0", 2)]
    kv.crop(3)
    assert shape_of(kv.append(*rows(2))) == [("f16", 4), ("q4_0", 1)]


def test_a_crop_changes_no_row_that_stays() -> None:
    kv = layer(KVTypes("q4_0", "q8_0", tail=40, sink=4))
    for seed in range(20):
        kv.append(*rows(10, seed=seed))
    assert shape_of(kv.view()) == [("f16", 4), ("q4_0", 128), ("f16", 68)]
    for dropped, left in (
        (60, [("f16", 4), ("q4_0", 128), ("f16", 8)]),
        (20, [("f16", 4), ("q4_0", 116)]),
        (117, [("f16", 3)]),
    ):
        before = kv.decode()
        kv.crop(dropped)
        assert shape_of(kv.view()) == left
        for x, y in zip(kv.decode(), before, strict=True):
            assert torch.equal(x, y[:, :, : x.shape[2]])
    assert shape_of(kv.append(*rows(50))) == [("f16", 53)]


def test_layers_that_are_not_quantized_keep_nothing_extra() -> None:
    kv = layer(KVTypes("f16", "bf16", tail=40, sink=4, center=True))
    assert shape_of(kv.append(*rows(100))) == [("f16", 100)]
    assert kv.nbytes_used == 100 * kv.spec.bytes_per_token
    assert kv.spec.exact_label == ""


@pytest.mark.parametrize("rotated", [False, True])
def test_the_center_is_the_mean_of_the_first_rows_that_leave(rotated: bool) -> None:
    types = KVTypes("q4_0", "q4_0", rotate_k=rotated, tail=32, center=True)
    kv = layer(types)
    k, v = rows(150, batch=2)
    kv.append(k[:, :, :101], v[:, :, :101])
    kv.append(k[:, :, 101:], v[:, :, 101:])
    packed = kv.view().segments[0]
    assert packed.length == 64
    first = (rotate(k) if rotated else k)[:, :, :64].half().float()
    assert packed.center is not None
    torch.testing.assert_close(packed.center, first.mean(2), rtol=0, atol=1e-4)
    before = packed.center.clone()
    for seed in range(5):
        kv.append(*rows(100, batch=2, seed=seed))
    again = kv.view().segments[0].center
    assert again is not None
    assert torch.equal(again, before)


def test_the_center_makes_rows_around_a_large_mean_precise() -> None:
    errors = {}
    k, v = rows(400)
    for center in (False, True):
        kv = layer(KVTypes("q4_0", "q4_0", tail=32, center=center))
        kv.append(k, v)
        kv.append(*rows(1))
        got, _ = kv.decode()
        errors[center] = (got[:, :, :300] - k[:, :, :300]).square().mean().sqrt().item()
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("window", [None, 60], ids=str)
def test_attention_over_segments_is_attention_over_the_rows(window: int | None) -> None:
    types = KVTypes("q4_0", "q8_0", rotate_k=True, rotate_v=True, tail=32, sink=4, center=True)
    kv = layer(types, window=window)
    for seed in range(12):
        view = kv.append(*rows(13, seed=seed))
    q = torch.randn(1, 4, 13, DIM_K, generator=torch.Generator().manual_seed(5))
    params = AttentionParams(scale=DIM_K**-0.5)
    out = attend(kv.kernels.prefill, q, view, params)
    k, v = kv.decode(view.length)
    assert relative_rmse(out, exact_attention(q, k, v, scale=params.scale, window=window)) < 1e-5


@pytest.mark.parametrize("tail", [0, 32])
def test_admit_counts_the_same_rows_as_append(tail: int) -> None:
    types = KVTypes("q4_0", "q8_0", tail=tail, sink=4, center=tail > 0)
    written, counted = layer(types), layer(types)
    k, v = rows(150)
    for t in range(150):
        one = k[:, :, t : t + 1], v[:, :, t : t + 1]
        expected = written.append(*one)
        view = counted.reserve(1, 1, DEVICE)
        newest = view.segments[-1]
        for x, fmt, planes in ((one[0], newest.format_k, newest.k), (one[1], newest.format_v, newest.v)):
            reference.write(x, fmt, None, planes, newest.start + newest.length - 1)
        assert shape_of(view) == shape_of(expected)
    for x, y in zip(written.decode(), counted.decode(), strict=True):
        assert torch.equal(x, y)


def test_a_copy_has_a_center_of_its_own() -> None:
    kv = layer(KVTypes("q4_0", "q4_0", tail=32, center=True), n_ctx=500)
    kv.append(*rows(100))
    kv.append(*rows(1))
    twin, before = kv.copy(500), kv.decode()
    twin.crop(101)
    twin.append(*rows(100, seed=1))
    twin.append(*rows(1))
    assert all(torch.equal(x, y) for x, y in zip(kv.decode(), before, strict=True))
