"""The native CPU kernels against float64 attention over the decoded cache, and against the torch encoder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridkv.formats import FORMATS, Scale
from hybridkv.kernels import Segment, cpu_native
from tests.isas import ISAS, isas_with
from tests.thin import pairs_in_turn, slow_but

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")

TOLERANCE = 2e-3
TYPES = tuple(FORMATS)


@lru_cache(maxsize=64)
def stored(name: str, shape: tuple[int, int, int, int], start: int, seed: int) -> tuple[Tensor, ...]:
    """Random rows [B, Hkv, S, D] in poisoned memory; to encode them in torch takes longer than their attention."""
    fmt, (n_batch, n_kv_heads, n_stored, _) = FORMATS[name], shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    planes = []
    for data in fmt.encode(x):
        plane = torch.full((n_batch, n_kv_heads, start + n_stored + 5, data.shape[-1]), 0xFF, dtype=torch.uint8)
        plane[:, :, start : start + n_stored] = data
        planes.append(plane)
    return tuple(planes)


@dataclass(frozen=True)
class Case:
    """One attention: shapes, options, and its cache with poisoned memory around the valid rows."""

    type_k: str = "q8_0"
    type_v: str = "q8_0"
    n_batch: int = 1
    n_kv_heads: int = 2
    group: int = 4
    n_new: int = 1
    n_stored: int = 100
    dk: int = 64
    dv: int = 64
    start: int = 3
    options: dict[str, object] = field(default_factory=dict)
    mask: Tensor | None = None
    n_threads: int = 2

    def store(self, name: str, head_dim: int, seed: int) -> tuple[Tensor, ...]:
        shape = (self.n_batch, self.n_kv_heads, self.n_stored, head_dim)
        return tuple(plane.clone() for plane in stored(name, shape, self.start, seed))

    def query(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        shape = (self.n_batch, self.n_kv_heads * self.group, self.n_new, self.dk)
        return torch.randn(shape, generator=generator)

    def visible(self) -> Tensor:
        """bool [B, Hq, T, S]."""
        rows = torch.arange(self.n_stored)
        position = torch.arange(self.n_stored - self.n_new, self.n_stored)[:, None]
        seen = torch.ones(self.n_new, self.n_stored, dtype=torch.bool)
        if self.options.get("causal", True):
            seen &= rows <= position
        if self.options.get("window"):
            seen &= rows > position - self.options["window"]
        seen = seen.expand(self.n_batch, self.n_kv_heads * self.group, -1, -1).clone()
        if self.mask is not None:
            seen &= self.mask
        return seen


def oracle(case: Case, q: Tensor, k_planes: tuple[Tensor, ...], v_planes: tuple[Tensor, ...]) -> Tensor:
    """float64 attention over the decoded rows; masked lanes are excluded by select."""

    def decode(name: str, planes: tuple[Tensor, ...], head_dim: int) -> Tensor:
        valid = tuple(p[:, :, case.start : case.start + case.n_stored] for p in planes)
        return FORMATS[name].decode(valid, head_dim).double().repeat_interleave(case.group, dim=1)

    k, v = decode(case.type_k, k_planes, case.dk), decode(case.type_v, v_planes, case.dv)
    seen = case.visible()
    scores = q.double() @ k.transpose(-1, -2) * case.dk**-0.5
    softcap = case.options.get("softcap")
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sinks = case.options.get("sinks")
    if sinks is not None:
        sinks = sinks.double().view(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    dead = ~seen.any(dim=(0, 1, 2))
    v = v.masked_fill(dead.view(1, 1, -1, 1), 0.0)
    out = weights @ v / total.masked_fill(total == 0, 1.0)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def run(case: Case, q: Tensor, k_planes: tuple[Tensor, ...], v_planes: tuple[Tensor, ...]) -> Tensor:
    rows = Segment(k_planes, v_planes, FORMATS[case.type_k], FORMATS[case.type_v], case.start, case.n_stored)
    return cpu_native.attend(
        q, [rows], case.dk, case.dv, case.dk**-0.5,
        mask=case.mask, n_threads=case.n_threads, **case.options,
    )  # fmt: skip


def error(case: Case) -> float:
    q = case.query()
    k_planes, v_planes = case.store(case.type_k, case.dk, 1), case.store(case.type_v, case.dv, 2)
    expected = oracle(case, q, k_planes, v_planes)
    got = run(case, q, k_planes, v_planes).double()
    assert torch.isfinite(got).all()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_formats_agree_with_the_table() -> None:
    native = cpu_native._native()
    assert list(native.FORMATS) == list(FORMATS)
    for name, fmt in FORMATS.items():
        for head_dim in (16, 64, 80, 96, 112, 256, 576):
            assert tuple(native.plane_bytes(name, head_dim)) == fmt.plane_bytes(head_dim), (name, head_dim)


@pytest.mark.parametrize(
    ("isa", "type_k", "type_v"),
    slow_but(
        [(isa, k, v) for isa in ISAS for k in TYPES for v in TYPES],
        [(isa, *pair) for i, isa in enumerate(ISAS) for pair in pairs_in_turn(TYPES, 1 + 3 * i)],
    ),
    indirect=["isa"],
)
def test_every_pair(isa: str, type_k: str, type_v: str) -> None:
    for n_new in (1, 3):
        case = Case(type_k, type_v, n_new=n_new, n_stored=257, dk=128, dv=128)
        assert error(case) <= TOLERANCE


DIMS = [(16, 16), (64, 80), (80, 64), (96, 96), (112, 112), (192, 128), (256, 256), (512, 512), (576, 512)]


@isas_with("dims, name", DIMS, TYPES)
def test_head_dims(isa: str, name: str, dims: tuple[int, int]) -> None:
    for n_new, n_stored in ((2, 70), (1, 140)):
        assert error(Case(name, name, dk=dims[0], dv=dims[1], n_stored=n_stored, n_new=n_new)) <= TOLERANCE, n_new


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_KV"])
@pytest.mark.parametrize("head_dim", [1, 7, 33, 100])
def test_head_dims_that_no_block_divides(isa: str, name: str, head_dim: int) -> None:
    assert error(Case(name, name, dk=head_dim, dv=head_dim)) <= TOLERANCE


@isas_with(
    "n_stored, n_new, name, group", (1, 31, 33, 64, 257, 1100), (1, 3, 63), ("f16", "q4_0", "q5_1"), (1, 4, 6, 8)
)
def test_sizes(isa: str, n_stored: int, n_new: int, name: str, group: int) -> None:
    case = Case(name, name, n_batch=2, group=group, n_stored=n_stored, n_new=min(n_new, n_stored))
    assert error(case) <= TOLERANCE


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 12, 16, 71])
def test_groups(isa: str, group: int) -> None:
    for name in ("bf16", "q6_0"):
        assert error(Case(name, name, group=group, n_kv_heads=1, n_new=5)) <= TOLERANCE


OPTIONS: dict[str, dict[str, object]] = {
    "window": {"window": 9},
    "wide window": {"window": 10_000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-3, 8, 8)},
    "all": {"window": 77, "softcap": 3.0, "sinks": torch.linspace(-3, 8, 8)},
    "not causal": {"causal": False},
}


@isas_with("option, name", OPTIONS, ("f32", "q8_0", "q4_1"))
def test_options(isa: str, option: str, name: str) -> None:
    for n_new, n_stored in ((1, 100), (1, 1500), (63, 130), (200, 200)):
        case = Case(name, name, n_new=n_new, n_stored=n_stored, options=OPTIONS[option])
        assert error(case) <= TOLERANCE, (n_new, n_stored)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "wide window"])
def test_options_change_the_result(isa: str, option: str) -> None:
    plain, changed = Case(n_new=5), Case(n_new=5, options=OPTIONS[option])
    q, k, v = plain.query(), plain.store("q8_0", 64, 1), plain.store("q8_0", 64, 2)
    assert not torch.allclose(run(plain, q, k, v), run(changed, q, k, v), atol=1e-3)


def poison(planes: tuple[Tensor, ...], name: str, rows: slice, batch: int) -> None:
    """Overwrite stored rows: 0xFF is NaN in every float plane."""
    for plane in planes:
        plane[batch, :, rows] = 0xFF
    assert FORMATS[name].decode(tuple(p[batch, :, rows] for p in planes), 64).isnan().any()


@isas_with("type_v, type_k", TYPES, ("f16", "q8_0", "q4_1"))
def test_masked_rows_never_leak(isa: str, type_k: str, type_v: str) -> None:
    """Left padding, NaN beneath it."""
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[1, :, :, :40] = False
    for n_new in (1, 3):
        case = Case(type_k, type_v, n_batch=2, n_new=n_new, n_stored=150, mask=mask.expand(-1, -1, n_new, -1))
        q, k, v = case.query(), case.store(type_k, 64, 1), case.store(type_v, 64, 2)
        clean = run(case, q, k, v)
        for planes, name in ((k, type_k), (v, type_v)):
            poison(planes, name, slice(case.start, case.start + 40), batch=1)
        # AMX sums blocks without a NaN in 16 bits, those with one in float32.
        torch.testing.assert_close(run(case, q, k, v), clean, rtol=1e-4, atol=4e-4 if isa == "amx" else 1e-4)


@isas_with("type_v, n_new", TYPES, (1, 3))
def test_rows_masked_for_some_queries_never_leak_to_them(isa: str, type_v: str, n_new: int) -> None:
    mask = torch.rand(1, 8, n_new, 150, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[:, ::2, :, 60] = False
    mask[:, 1::2, :, 60] = True
    case = Case(type_v, type_v, n_new=n_new, n_stored=150, mask=mask)
    q, k, v = case.query(), case.store(type_v, 64, 1), case.store(type_v, 64, 2)
    clean = run(case, q, k, v)
    expected = oracle(case, q, k, v)
    assert float((clean - expected).square().mean().sqrt() / expected.square().mean().sqrt()) <= TOLERANCE
    for planes in (k, v):
        poison(planes, type_v, slice(case.start + 60, case.start + 61), batch=0)
    got = run(case, q, k, v)
    torch.testing.assert_close(got[:, ::2], clean[:, ::2], rtol=2e-3, atol=2e-3)
    assert got[:, 1::2].isnan().any(-1).all()  # and a NaN that is attended shows


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_whole_tiles_under_a_mask(isa: str, name: str) -> None:
    """Left padding and a gap, wider than any tile: neither read nor missed."""
    for n_new in (1, 40):
        mask = torch.ones(2, 1, n_new, 900, dtype=torch.bool).tril(900 - n_new)
        mask[0, :, :, :391] = False
        mask[1, :, :, 200:601] = False
        case = Case(name, name, n_batch=2, n_new=n_new, n_stored=900, mask=mask, options={"causal": False})
        assert error(case) <= TOLERANCE, n_new


def test_mask_broadcasts(isa: str) -> None:
    for shape in ((1, 1), (2, 1), (1, 8), (2, 8)):
        mask = torch.rand(*shape, 5, 100, generator=torch.Generator().manual_seed(3)) < 0.5
        assert error(Case("q5_0", "q8_KV", n_batch=2, n_new=5, mask=mask)) <= TOLERANCE


def test_queries_that_see_nothing_give_zeros(isa: str) -> None:
    mask = torch.ones(1, 1, 4, 700, dtype=torch.bool)
    mask[:, :, 2] = False
    for name in TYPES:
        for options in ({}, {"sinks": torch.zeros(8)}):
            case = Case(name, name, n_new=4, n_stored=700, mask=mask, options=options)
            q, k, v = case.query(), case.store(name, 64, 1), case.store(name, 64, 2)
            out = run(case, q, k, v)
            assert (out[:, :, 2] == 0).all()
            assert (out[:, :, 1] != 0).any()


def test_nan_query_shows(isa: str) -> None:
    for name in ("f16", "q8_0", "q4_1"):
        case = Case(name, name, n_new=2)
        q = case.query()
        q[0, 3, 1, 5] = torch.nan
        out = run(case, q, case.store(name, 64, 1), case.store(name, 64, 2))
        assert out[0, 3, 1].isnan().all()
        assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("name", TYPES)
def test_scores_far_apart(isa: str, name: str) -> None:
    """Large logits and rows whose scale is far from the others' keep the accuracy."""
    case = Case(name, name, n_stored=300)
    q, k = case.query() * 30, case.store(name, 64, 1)
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(5))
    x[:, :, :4] *= 200
    v = list(case.store(name, 64, 2))
    for plane, data in zip(v, FORMATS[name].encode(x), strict=True):
        plane[:, :, case.start : case.start + 300] = data
    expected = oracle(case, q, k, tuple(v))
    got = run(case, q, k, tuple(v)).double()
    assert float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()) <= TOLERANCE


def test_threads_give_the_same(isa: str) -> None:
    for n_new in (1, 70):
        case = Case("q4_0", "q6_0", n_stored=3000, n_new=n_new)
        q, k, v = case.query(), case.store("q4_0", 64, 1), case.store("q6_0", 64, 2)
        one = run(Case("q4_0", "q6_0", n_stored=3000, n_new=n_new, n_threads=1), q, k, v)
        torch.testing.assert_close(run(case, q, k, v), one, rtol=1e-4, atol=1e-5)


SCALES = [(name, scale) for name, fmt in FORMATS.items() for scale in fmt.scales]


@cache
def rows_and_codes(name: str, scale: Scale, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows of all kinds, and what the torch encoder makes of them."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 70, 3, head_dim, generator=generator).exp2()
    x *= torch.randn(2, 70, 3, 1, generator=generator)
    x[0, :5] = 0.0
    x[0, 5, :, 1::2] = 0.0
    x[1, 6] *= 1e-30
    x[1, 7] = x[1, 7, :, :1]
    x = x.sub_(0.7).to(dtype).transpose(1, 2)
    return x, tuple(FORMATS[name].encode(x, scale))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@isas_with("of, dtype", SCALES, DTYPES)
def test_encode_writes_the_bytes_of_the_torch_encoder(isa: str, of: tuple[str, Scale], dtype: torch.dtype) -> None:
    name, scale = of
    for head_dim in (16, 64, 80, 256):
        x, codes = rows_and_codes(name, scale, dtype, head_dim)
        n_bytes = FORMATS[name].plane_bytes(head_dim)
        planes = tuple(torch.full((2, 3, 80, n), 0xAB, dtype=torch.uint8) for n in n_bytes)
        cpu_native.encode_into(x, name, scale, planes, 4, n_threads=2)
        for plane, expected in zip(planes, codes, strict=True):
            assert torch.equal(plane[:, :, 4:74], expected), head_dim
            assert (plane[:, :, :4] == 0xAB).all()
            assert (plane[:, :, 74:] == 0xAB).all()


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_encode_takes_the_torch_encoder_s_side_between_two_codes(isa: str, name: str, scale: Scale) -> None:
    """Halves of a unit: values as far from one code as from the next, and many that are the largest of their block."""
    fmt = FORMATS[name]
    x = torch.randint(-254, 255, (1, 2, 600, 64), generator=torch.Generator().manual_seed(5)) / 2
    x[0, 0, :, ::32] = 127.0
    x[0, 1] = (x[0, 1] / 30).round()
    planes = tuple(torch.zeros(1, 2, 600, n, dtype=torch.uint8) for n in fmt.plane_bytes(64))
    cpu_native.encode_into(x, name, scale, planes, 0)
    for plane, expected in zip(planes, fmt.encode(x, scale), strict=True):
        assert torch.equal(plane, expected)


@isas_with("of, bad", SCALES, (torch.nan, torch.inf, -torch.inf))
def test_encoding_what_is_not_finite_shows(isa: str, of: tuple[str, Scale], bad: float) -> None:
    name, scale = of
    fmt = FORMATS[name]
    x = torch.randn(1, 1, 2, 96, generator=torch.Generator().manual_seed(1))
    x[..., 0, 40] = bad
    planes = tuple(torch.zeros(1, 1, 2, n, dtype=torch.uint8) for n in fmt.plane_bytes(96))
    cpu_native.encode_into(x, name, scale, planes, 0)
    decoded = fmt.decode(planes, 96)
    assert not decoded[0, 0, 0, 40].isfinite()
    assert decoded[0, 0, 1].isfinite().all()


def test_works_in_a_forked_child() -> None:
    """With threads of its own: those of its parent are not there."""
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from tests.kernels.test_cpu_native import Case, run
case = Case(n_stored=4000)
q, k, v = case.query(), case.store("q8_0", 64, 1), case.store("q8_0", 64, 2)
expected = run(case, q, k, v)
child = os.fork()
if child == 0:
    same = torch.equal(run(case, q, k, v), expected)
    alone = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    os._exit(0 if same and not alone else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=env, check=False).returncode == 0


@pytest.mark.parametrize("wanted", ["sse9", ""])
def test_unknown_isa_is_an_error(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    from hybridkv.errors import UsageError

    monkeypatch.setenv("HYBRIDKV_ISA", wanted)
    with pytest.raises(UsageError, match="allowed"):
        cpu_native.isa()
