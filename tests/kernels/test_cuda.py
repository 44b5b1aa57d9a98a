"""The Triton kernels: in Triton's interpreter where there is no CUDA device, small and odd; on a device at real sizes.

Whether the interpreter runs them is fixed when they are imported, which tests/conftest.py does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.errors import NoKernelError
from hybridkv.formats import FORMATS, KVFormat, Scale, get_format
from hybridkv.kernels import AttentionCase, AttentionParams, KVView, Segment, cuda, reference
from hybridkv.rotation import rotate
from tests.kernels.stored import Part, Stored, store_parts
from tests.oracles.attention import exact_attention, relative_rmse

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.hf.step import fused
from hybridkv.kernels.cuda import launch, prefill
from hybridkv.kernels.cuda.launch import ONE_TOKEN_ROWS, Tiling
from hybridkv.kernels.cuda.store import store
from hybridkv.native.choice import rejects_packed
from tests.families import build
from tests.on_device import DEVICE, ON_CUDA
from tests.thin import mostly_long, slow_but

pytestmark = pytest.mark.usefixtures("interpreter")
NARROW = Tiling(16, 16, warps=4, programs=1)
"""Small tiles, so that a few rows make several of them."""
ONE_TOKEN = Tiling(ONE_TOKEN_ROWS, 16, warps=1, programs=1)
"""The same of the kernel for one token."""
WORDS = tuple(n for n, f in FORMATS.items() if f.is_quantized and f.block == 32)
"""Types that it reads."""
TYPES = tuple(FORMATS)
QUICK = ("q8_0", "q4_1", "hq3_nl")
"""Run in the interpreter by default, each beside another type: scales, minima, a codebook."""


def on_device(view: KVView) -> KVView:
    def moved(s: Segment) -> Segment:
        tensors = {n: getattr(s, n) for n in ("center", "lengths", "starts")}
        there = {n: None if t is None else t.to(DEVICE) for n, t in tensors.items()}
        return replace(s, k=tuple(p.to(DEVICE) for p in s.k), v=tuple(p.to(DEVICE) for p in s.v), **there)

    return replace(view, segments=tuple(moved(s) for s in view.segments))


def attend(q: Tensor, view: KVView, tiling: Tiling | None = None, **options: Any) -> Tensor:
    options = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in options.items()}
    return launch.attend(q.to(DEVICE), on_device(view), AttentionParams(**options), tiling).cpu()


def queries(view: KVView, n_new: int, group: int, n_batch: int, n_kv_heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(n_batch, n_kv_heads * group, n_new, view.head_dim_k, generator=generator)


def check(
    *,
    type_k: str = "q8_0",
    type_v: str = "q4_0",
    n_rows: int = 33,
    n_new: int = 1,
    group: int = 2,
    parts: tuple[Part, ...] | None = None,
    params: dict[str, Any] | None = None,
    tiling: Tiling | None = NARROW,
    batch: int = 1,
    n_kv_heads: int = 2,
    **storage: Any,
) -> None:
    stored = store_parts(parts or (Part(type_k, type_v, n_rows),), batch=batch, n_kv_heads=n_kv_heads, **storage)
    view = stored.view
    q = queries(view, n_new, group, batch, n_kv_heads)
    options = {"scale": view.head_dim_k**-0.5, **(params or {})}
    got = attend(rotate(q) if view.rotate_k else q, view, tiling, **options)
    got = rotate(got) if view.rotate_v else got
    exact = exact_attention(q, stored.k, stored.v, window=view.window, **options)
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    assert relative_rmse(got, exact) <= cuda.TOLERANCE


@pytest.mark.parametrize("type_name", mostly_long(TYPES, QUICK))
def test_every_type(type_name: str) -> None:
    """Each type on one side, and another on the other: all pairs are made of these."""
    other = TYPES[(TYPES.index(type_name) + 4) % len(TYPES)]
    check(type_k=type_name, type_v=other, n_new=3, n_rows=20)
    check(type_k=other, type_v=type_name, n_new=1, n_rows=20, head_dim_k=80, head_dim_v=48)


@pytest.mark.parametrize("type_name", mostly_long(WORDS, QUICK))
def test_one_token_of_every_type(type_name: str) -> None:
    other = WORDS[(WORDS.index(type_name) + 4) % len(WORDS)]
    check(type_k=type_name, type_v=other, n_rows=37, n_kv_heads=1, group=8, tiling=replace(ONE_TOKEN, block_n=32))
    check(type_k=other, type_v=type_name, n_rows=20, n_kv_heads=1, group=3, tiling=ONE_TOKEN)


@pytest.mark.parametrize(
    ("type_name", "dim_k", "dim_v"),
    mostly_long(
        [(t, k, v) for t in ("q8_0", "q6_0", "q5_1", "q4_0", "hq3_nl") for k, v in ((64, 128), (128, 64), (256, 256))],
        [("q8_0", 64, 128), ("q5_1", 128, 64)],
    ),
)
def test_one_token_of_every_head_dim(type_name: str, dim_k: int, dim_v: int) -> None:
    options = {"type_k": type_name, "type_v": type_name, "n_rows": 20, "n_kv_heads": 1}
    check(**options, head_dim_k=dim_k, head_dim_v=dim_v, tiling=ONE_TOKEN)


@pytest.mark.parametrize(
    ("warps", "rows", "n_rows"),
    mostly_long(
        [(warps, rows, n) for warps, rows in ((1, 16), (2, 16), (4, 16), (4, 32)) for n in (1, 31, 33, 129)],
        [(1, 16, 33), (4, 16, 1), (4, 32, 31)],
    ),
)
def test_one_token_over_odd_rows(warps: int, rows: int, n_rows: int) -> None:
    check(n_rows=n_rows, n_kv_heads=1, group=8, tiling=Tiling(ONE_TOKEN_ROWS, rows * warps, warps, programs=1))


def test_queries_that_do_not_lie_in_eights() -> None:
    stored = store_parts((Part("q8_0", "q4_0", 20),))
    both = torch.randn(2, 4, 1, 68, generator=torch.Generator().manual_seed(3))
    q = both[..., 3:67]
    exact = exact_attention(q, stored.k, stored.v, scale=0.125)
    assert relative_rmse(attend(q, stored.view, None, scale=0.125), exact) <= cuda.TOLERANCE
    half = attend(q.bfloat16(), stored.view, None, scale=0.125)
    exact = exact_attention(q.bfloat16(), stored.k, stored.v, scale=0.125)
    assert relative_rmse(half, exact) <= cuda.TOLERANCE
    exact = exact_attention(q.half(), stored.k, stored.v, scale=0.125)
    assert relative_rmse(attend(q.half(), stored.view, None, scale=0.125), exact) <= cuda.TOLERANCE


@pytest.mark.cuda
@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device that torch can use")
@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("type_v", TYPES if ON_CUDA else TYPES[:1])
@pytest.mark.parametrize("type_k", TYPES if ON_CUDA else TYPES[:1])
def test_every_pair_on_the_device(type_k: str, type_v: str, n_new: int) -> None:
    check(type_k=type_k, type_v=type_v, n_new=n_new, n_rows=257, head_dim_k=128, head_dim_v=128, tiling=None)


@pytest.mark.parametrize("n_new", [1, 3, 63])
@pytest.mark.parametrize("n_rows", [1, 31, 33, 257])
def test_odd_sizes(n_rows: int, n_new: int) -> None:
    check(n_rows=n_rows, n_new=min(n_new, n_rows), n_kv_heads=1, tiling=Tiling(32, 64, warps=4, programs=1))


@pytest.mark.parametrize(("group", "n_new"), [(1, 5), (4, 1), (6, 2), (8, 3)])
def test_groups(group: int, n_new: int) -> None:
    check(group=group, n_new=n_new, type_k="q6_0")


@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (96, 112), (128, 64), (192, 128), (256, 160)], ids=str)
def test_head_dims(dims: tuple[int, int]) -> None:
    check(head_dim_k=dims[0], head_dim_v=dims[1], type_k="q4_0", type_v="iq4_nl", n_rows=17, n_kv_heads=1)


@pytest.mark.parametrize(("type_name", "dim"), [("f16", 20), ("q8_KV", 20), ("q8_KV", 72)])
def test_head_dims_that_no_block_divides(type_name: str, dim: int) -> None:
    check(head_dim_k=dim, head_dim_v=dim, type_k=type_name, type_v=type_name, n_rows=17, n_kv_heads=1)


@pytest.mark.parametrize("tiling", [None, replace(NARROW, prefetch=False), Tiling(64, 32, warps=4, programs=1)])
def test_tilings(tiling: Tiling | None) -> None:
    check(n_new=5, n_rows=50, tiling=tiling)


@pytest.mark.parametrize(("window", "n_new"), [(1, 1), (8, 7), (40, 1)])
def test_window(window: int, n_new: int) -> None:
    check(window=window, n_new=n_new, n_rows=37)
    if n_new == 1:
        check(window=window, n_rows=37, tiling=ONE_TOKEN)


@pytest.mark.parametrize("n_new", [1, 7])
def test_softcap_and_sinks(n_new: int) -> None:
    check(n_new=n_new, params={"softcap": 2.0, "scale": 1.0}, n_rows=20)
    check(n_new=n_new, params={"sinks": torch.tensor([0.5, -3.0, 4.0, 0.0])}, n_rows=20)
    check(n_new=n_new, params={"sinks": torch.tensor([0.5, -3.0, 4.0, 0.0])}, n_rows=9)  # one part, no sum of parts
    if n_new == 1:
        check(params={"softcap": 2.0, "scale": 1.0}, n_rows=20, tiling=ONE_TOKEN)
        check(params={"sinks": torch.tensor([0.5, -3.0, 4.0, 0.0])}, n_rows=9, tiling=ONE_TOKEN)


@pytest.mark.parametrize(("heads", "n_new"), [(1, 1), (4, 6)])
def test_mask_with_unseen_rows_and_unseeing_queries(heads: int, n_new: int) -> None:
    mask = torch.rand(2, heads, n_new, 33, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[1, :, 0] = False
    check(n_new=n_new, params={"mask": mask}, batch=2)


@pytest.mark.parametrize("n_new", [1, 9])
def test_segments_centers_and_rotation(n_new: int) -> None:
    parts = (Part("f16", "f16", 5, "exact"), Part("q8_0", "q4_0", 21, centered=True), Part("f16", "f16", 9, "exact"))
    check(parts=parts, n_new=n_new, batch=2, n_kv_heads=1, rotated=True)
    check(parts=parts, n_new=n_new, batch=2, n_kv_heads=1, rotated=True, tiling=None)  # a kernel for each segment
    check(parts=parts, n_new=n_new, n_kv_heads=1, params={"softcap": 3.0, "scale": 0.2})


def test_large_scores_do_not_overflow() -> None:
    check(n_new=2, type_k="f32", type_v="f32", params={"scale": 300.0})


def test_queries_and_values_out_of_range_of_float16() -> None:
    stored = store_parts((Part("bf16", "bf16", 9),), batch=1, n_kv_heads=1)
    (s,) = stored.view.segments
    bf16 = FORMATS["bf16"]
    k, v = 1e6 * stored.k, 1e6 * stored.v
    for planes, rows in ((s.k, k), (s.v, v)):
        planes[0][:, :, s.start : s.start + 9] = bf16.encode(rows)[0]
    k, v = k.bfloat16(), v.bfloat16()
    q = 1e6 * queries(stored.view, 1, 2, 1, 1)
    exact = exact_attention(q, k, v, scale=1e-12)
    assert relative_rmse(attend(q, stored.view, NARROW, scale=1e-12), exact) <= cuda.TOLERANCE


def test_weights_far_below_the_largest_keep_their_precision() -> None:
    """One row outweighs each other row e**12 times: as float16 without a factor, the others would lose bits."""
    stored = store_parts((Part("f32", "f32", 257),), batch=1, n_kv_heads=1)
    (s,) = stored.view.segments
    k, v = torch.zeros_like(stored.k), stored.v.clone()
    k[:, :, 100, 0], v[:, :, 100] = 12.0, 0.0
    for planes, rows in ((s.k, k), (s.v, v)):
        planes[0][:, :, s.start : s.start + 257] = FORMATS["f32"].encode(rows)[0]
    f16 = get_format("f16")
    half = replace(stored.view, segments=(replace(s, v=f16.encode(FORMATS["f32"].decode(s.v, 64)), format_v=f16),))
    q = torch.zeros(1, 2, 1, 64)
    q[..., 0] = 1.0
    exact = exact_attention(q, k, v.half(), scale=1.0)
    assert relative_rmse(attend(q, half, NARROW, scale=1.0), exact) <= 1e-3


@pytest.mark.parametrize("types", [("q8_0", "q4_0"), ("f16", "f16"), ("q5_1", "q5_1"), ("q8_KV", "bf16")], ids=str)
def test_stale_rows_under_the_mask_do_not_leak(types: tuple[str, str]) -> None:
    """NaN rows that some queries see and others do not: none of it reaches the latter."""
    n_new, n_rows = 4, 20
    stored = store_parts((Part(*types, n_rows),), batch=2)
    start = stored.view.segments[0].start
    for plane in (*stored.view.segments[0].k, *stored.view.segments[0].v):
        plane[1, :, start : start + 6] = 0xFF
    mask = torch.ones(2, 4, n_new, n_rows, dtype=torch.bool)
    mask[1, :, :, :6] = False
    mask[1, 3, 2, 3] = True
    q = queries(stored.view, n_new, 2, 2, 2)
    got = attend(q, stored.view, NARROW, scale=0.125, mask=mask)
    assert torch.isnan(got[1, 3, 2]).all()
    mask[1, 3, 2, 3] = False
    exact = exact_attention(q, stored.k, stored.v, scale=0.125, mask=mask)
    got[1, 3, 2] = exact[1, 3, 2]
    assert torch.isfinite(got).all()
    assert relative_rmse(got, exact) <= cuda.TOLERANCE


@pytest.mark.parametrize("tiling", [NARROW, ONE_TOKEN])
def test_a_visible_nan_is_not_hidden(tiling: Tiling) -> None:
    stored = store_parts((Part("q8_0", "q8_0", 20),))
    s = stored.view.segments[0]
    s.v[0][0, 0, s.start + 4] = 0xFF
    got = attend(queries(stored.view, 1, 2, 2, 2), stored.view, tiling, scale=0.125)
    assert torch.isnan(got[0, :2]).any()
    assert torch.isfinite(got[0, 2:]).all()
    assert torch.isfinite(got[1]).all()


def each_sequence(stored: Stored, q: Tensor, lengths: list[list[int]], window: int | None = None) -> Tensor:
    """float64 attention of sequences whose segments have the given numbers of rows; zeros without a row."""
    bounds = np.cumsum([0, *(s.length for s in stored.view.segments)])
    outs = []
    for b, counts in enumerate(lengths):
        rows = torch.cat([torch.arange(first, first + n) for first, n in zip(bounds, counts, strict=False)])
        k, v = stored.k[b : b + 1, :, rows], stored.v[b : b + 1, :, rows]
        outs.append(exact_attention(q[b : b + 1], k, v, scale=0.125, window=window))
    return torch.cat(outs)


@pytest.mark.parametrize(("n_new", "window"), [(1, None), (2, None), (3, 7)])
def test_lengths_on_the_device(n_new: int, window: int | None) -> None:
    parts = (Part("f16", "f16", 5), Part("q8_0", "q4_0", 37), Part("f16", "f16", 9))
    stored = store_parts(parts, batch=3, n_kv_heads=1)
    counts = [[5, 37, 9], [5, 0, 3], [4, 18, 1]]
    lengths = torch.tensor(counts, dtype=torch.int32).T
    segments = [replace(s, lengths=lengths[i].contiguous()) for i, s in enumerate(stored.view.segments)]
    segments[0] = replace(segments[0], lengths=None) if n_new == 1 else segments[0]
    counts = [[5, *c[1:]] for c in counts] if n_new == 1 else counts
    q = queries(stored.view, n_new, 2, 3, 1)
    exact = each_sequence(stored, q, counts, window)
    for tiling in (NARROW, None):
        got = attend(q, replace(stored.view, segments=tuple(segments), window=window), tiling, scale=0.125)
        assert relative_rmse(got, exact) <= cuda.TOLERANCE


def test_starts_on_the_device() -> None:
    stored = store_parts((Part("q8_0", "q4_0", 30),), batch=2, n_kv_heads=1)
    (s,) = stored.view.segments
    starts, lengths = torch.tensor([s.start, s.start + 7], dtype=torch.int32), torch.tensor([30, 23], dtype=torch.int32)
    view = replace(stored.view, segments=(replace(s, start=0, starts=starts, lengths=lengths),))
    q = queries(view, 1, 2, 2, 1)
    exact = torch.cat(
        [exact_attention(q[b : b + 1], stored.k[b : b + 1, :, n:], stored.v[b : b + 1, :, n:], scale=0.125)
         for b, n in enumerate((0, 7))]
    )  # fmt: skip
    for tiling in (NARROW, ONE_TOKEN):
        assert relative_rmse(attend(q, view, tiling, scale=0.125), exact) <= cuda.TOLERANCE


def test_sinks_packed_rows_and_a_sliding_tail_on_the_device() -> None:
    """As a recorded step has them: bounds are what the memory holds, behind the rows is nothing."""
    exact = {"memory": "exact"}
    parts = (Part("f16", "f16", 4, **exact), Part("q8_0", "q4_0", 37, centered=True), Part("f16", "f16", 9, **exact))
    stored = store_parts(parts, batch=2, n_kv_heads=1)
    segments = []
    for s in stored.view.segments:
        starts, lengths = (torch.full((2,), n, dtype=torch.int32) for n in (s.start, s.length))
        segments.append(replace(s, start=0, length=s.k[0].shape[2], starts=starts, lengths=lengths))
    q = queries(stored.view, 1, 4, 2, 1)
    want = exact_attention(q, stored.k, stored.v, scale=0.125)
    for tiling in (NARROW, None):
        got = attend(q, replace(stored.view, segments=tuple(segments)), tiling, scale=0.125)
        assert relative_rmse(got, want) <= cuda.TOLERANCE


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """What `prefill.dense` asks torch for, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if causal:
        scores.masked_fill_(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return (scores.softmax(-1) @ v).half(), scores.logsumexp(-1).float()


@pytest.mark.parametrize(
    "type_name", slow_but(("q8_0", "q6_0", "q5_1", "hq3_nl"), ("q8_0", "hq3_nl"), long=["q6_0", "q5_1"])
)
def test_a_prompt_over_unpacked_windows(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of several windows, whose borders lie within segments; and none."""
    if not ON_CUDA:
        monkeypatch.setattr(prefill, "dense", plain_attention)
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 1)
    params = AttentionParams(scale=0.125)
    for history in (90, 0):
        parts = (Part("f16", "f16", 5), Part(type_name, "q4_0", 61 + history))
        stored = store_parts(parts, batch=2)
        q = queries(stored.view, 66, 2, 2, 2)
        assert prefill.takes(q, stored.view, params)
        got = prefill.attend(q.to(DEVICE), on_device(stored.view), params).cpu()
        assert relative_rmse(got, exact_attention(q, stored.k, stored.v, scale=0.125)) <= cuda.TOLERANCE


def test_prompts_that_are_not_plain_are_not_unpacked() -> None:
    stored = store_parts((Part("q8_0", "q4_0", 70),))
    q = queries(stored.view, 64, 2, 1, 2)
    assert prefill.takes(q, stored.view, AttentionParams(scale=1.0))
    assert not prefill.takes(q[:, :, :63], stored.view, AttentionParams(scale=1.0))
    assert not prefill.takes(q, stored.view, AttentionParams(scale=1.0, softcap=2.0))
    assert not prefill.takes(
        q, stored.view, AttentionParams(scale=1.0, mask=torch.ones(1, 1, 64, 70, dtype=torch.bool))
    )
    assert not prefill.takes(q, replace(stored.view, window=8), AttentionParams(scale=1.0))
    exact = store_parts((Part("bf16", "q4_0", 70),))
    assert not prefill.takes(q, exact.view, AttentionParams(scale=1.0))


def store_in(
    x: Tensor, fmt: KVFormat, scale: Scale | None, row: int | Tensor, capacity: int = 9, **options: Any
) -> tuple[Tensor, ...]:
    shape = (*x.shape[:2], capacity)
    planes = [torch.full((*shape, n), 0xFF, dtype=torch.uint8, device=DEVICE) for n in fmt.plane_bytes(x.shape[3])]
    options = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in options.items()}
    store(x.to(DEVICE), fmt, scale, planes, row.to(DEVICE) if isinstance(row, Tensor) else row, **options)
    return tuple(p.cpu() for p in planes)


SCALES = [(name, scale) for name, fmt in FORMATS.items() for scale in fmt.scales]


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(("type_name", "scale"), SCALES, ids=str)
def test_stored_bytes_are_those_of_encode(type_name: str, scale: Scale, head_dim: int) -> None:
    """Bit for bit, but for scales whose sums are taken in another order: one step of float16, or of float32."""
    fmt = FORMATS[type_name]
    x = torch.randn(1, 2, 5, head_dim, generator=torch.Generator().manual_seed(1))
    x[0, 0, 1, :32] = 0.0
    x[0, 0, 2] *= 1e-7
    x[0, 1, 3] *= 1e3
    planes = store_in(x, fmt, scale, 3)
    for plane, got, want in zip(fmt.planes, planes, fmt.encode(x, scale), strict=True):
        assert (got[:, :, :3] == 0xFF).all()
        assert (got[:, :, 8:] == 0xFF).all()
        got = got[:, :, 3:8]
        if scale == "refit" and fmt.refit in ("pairs", "search") and plane.role in ("d", "s"):
            kind = torch.float32 if plane.kind == "d_f32" else torch.float16
            got, want = (p.contiguous().view(kind) for p in (got, want))
            assert torch.allclose(got, want, rtol=1e-6 if kind == torch.float32 else 1e-3, atol=6e-8)
        else:
            assert torch.equal(got, want), plane


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "q5_1", "hq4_nl", "q8_KV"])
def test_what_is_not_finite_stays_so(type_name: str) -> None:
    fmt = FORMATS[type_name]
    x = torch.randn(1, 1, 3, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 5], x[0, 0, 1, 40] = torch.nan, torch.inf
    decoded = fmt.decode([p[:, :, :3] for p in store_in(x, fmt, None, 0)], 64)
    wanted = fmt.decode(fmt.encode(x), 64)
    assert torch.equal(torch.isfinite(decoded), torch.isfinite(wanted))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "hq4_nl"])
def test_rotation_and_center_are_stored(type_name: str, head_dim: int) -> None:
    fmt = FORMATS[type_name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 2, head_dim, generator=generator).bfloat16().transpose(1, 2)  # strides of a projection
    center = torch.randn(2, 2, head_dim, generator=generator)
    planes = store_in(x, fmt, None, 3, rotated=True, center=center)
    want = rotate(x) - center.unsqueeze(2)
    got = fmt.decode([p[:, :, 3:8] for p in planes], head_dim)
    best = fmt.decode(fmt.encode(want), head_dim)
    close = (got - best).abs() <= 1e-3 * best.abs() + 1e-5
    assert close.float().mean() >= 0.98  # a value that lies between two codes may go the other way
    assert (got - want).square().mean() <= 1.01 * (best - want).square().mean()


def test_rows_on_the_device() -> None:
    fmt = FORMATS["q6_0"]
    x = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([1, 5], dtype=torch.int32)
    want = fmt.encode(x, "absmax")
    for got, bytes_ in zip(store_in(x, fmt, "absmax", rows), want, strict=True):
        assert torch.equal(got[0, :, 1:4], bytes_[0])
        assert torch.equal(got[1, :, 5:8], bytes_[1])
        assert (got[0, :, 4:] == 0xFF).all()
        assert (got[1, :, :5] == 0xFF).all()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = AttentionCase("cuda", "q8_0", "q8_0", 64, 64, 1, "decode")
    (kernel,) = cuda.KERNELS
    assert kernel.rejects(case) is None
    assert kernel.rejects(replace(case, device_rows=True)) is None
    assert "20" in str(kernel.rejects(replace(case, head_dim_k=20)))
    assert "512" in str(kernel.rejects(replace(case, head_dim_k=1024)))
    assert "not on cpu" in str(kernel.rejects(replace(case, device="cpu")))


def test_rocm_is_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles the kernels there, with errors that it passes over."""
    monkeypatch.setattr(cuda, "_is_rocm", lambda: True)
    assert "built for ROCm" in str(cuda.KERNELS[0].rejects(AttentionCase("cuda", "q8_0", "q8_0", 64, 64, 1, "decode")))
    assert "built for ROCm" in str(cuda.ENCODERS[0].rejects("cuda", get_format("q8_0"), 64))
    assert "built for ROCm" in str(rejects_packed(build("qwen3_5_text").config, "cuda"))
    assert "built for ROCm" in str(fused.rejects_device("cuda"))


def test_kernels_that_read_rows_from_the_host_refuse_others() -> None:
    stored = store_parts((Part("q8_0", "q8_0", 5),), batch=1, n_kv_heads=1)
    (s,) = stored.view.segments
    view = replace(stored.view, segments=(replace(s, lengths=torch.tensor([3], dtype=torch.int32)),))
    with pytest.raises(NoKernelError, match="lengths"):
        reference.attend(queries(view, 1, 1, 1, 1), view, AttentionParams(scale=1.0))
    case = AttentionCase("cpu", "q8_0", "q8_0", 64, 64, 1, "decode", device_rows=True)
    assert "host" in str(reference.KERNELS[0].rejects(case))
