"""What every record's encode and decode must do, whatever the format."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS, KVFormat, Scale, packing

CASES = [(fmt, scale) for fmt in FORMATS.values() for scale in fmt.scales]
QUANTIZED = [case for case in CASES if case[0].is_quantized]
# Padded, and with a scale that is a function of the set of values: the search also depends on their order.
SCALED_IN_BLOCKS = [
    (fmt, scale) for fmt, scale in QUANTIZED if fmt.block and (scale == "absmax" or fmt.refit != "search")
]
REFITS = [fmt for fmt in FORMATS.values() if fmt.refit]
WEIGHTED = [fmt for fmt in REFITS if fmt.refit in ("pairs", "search")]
UNWEIGHTED = [fmt for fmt in REFITS if fmt not in WEIGHTED]
F16_EPS = 2.0**-10


def ids(cases: list[tuple[KVFormat, Scale]]) -> list[str]:
    return [f"{fmt.name}-{scale}" for fmt, scale in cases]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(fmt: KVFormat, planes: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Number planes by role, float64 [..., n_blocks]."""
    return {
        plane.role: packing.unpack_number(plane, data).double()
        for plane, data in zip(fmt.planes, planes, strict=True)
        if plane.role != "codes"
    }


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(a, b, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 112, 256])
def test_shapes_and_ggml_round_trip(fmt: KVFormat, scale: Scale, head_dim: int) -> None:
    x = normal(3, 5, head_dim)
    planes = fmt.encode(x, scale)
    assert [tuple(p.shape) for p in planes] == [(3, 5, n) for n in fmt.plane_bytes(head_dim)]
    assert all(p.dtype == torch.uint8 and p.is_contiguous() for p in planes)
    rows = fmt.to_ggml(planes, head_dim)
    assert rows.shape == (3, 5, fmt.row_bytes(head_dim))
    assert_same(fmt.from_ggml(rows, head_dim), planes)
    y = fmt.decode(planes, head_dim)
    assert y.shape == x.shape
    assert y.dtype == torch.float32


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.is_quantized], ids=lambda f: f.name)
def test_error_is_bounded_by_the_scale(fmt: KVFormat) -> None:
    """Half a step; one for the extreme that a signed maximum clips; half the widest gap of a codebook.

    iq4_nl's clips up to 14, the distance between the magnitudes of its ends.
    """
    x = torch.cat([normal(200, 96), 50 + normal(200, 96, seed=1), normal(200, 96, seed=2).pow(5)])
    planes = fmt.encode(x, "absmax")
    d = numbers(fmt, planes)["d"].abs()
    gap = max(b - a for a, b in pairwise(fmt.codebook)) / 2 if fmt.codebook else 0.0
    step = max(gap, 14.0) if fmt.codebook else 1.0 if fmt.rule == "signed_max" else 0.5
    rounded = F16_EPS * x.abs().amax(-1, keepdim=True)  # scale and minimum are float16
    bound = step * d.repeat_interleave(96 // d.shape[-1], -1) + rounded
    assert ((fmt.decode(planes, 96) - x).abs() <= bound).all()


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
def test_leading_shapes_and_memory_order_do_not_matter(fmt: KVFormat, scale: Scale) -> None:
    x = normal(4, 6, 80)
    flat = fmt.encode(x.reshape(24, 80), scale)
    for ours, row in zip(fmt.encode(x, scale), flat, strict=True):
        assert torch.equal(ours.reshape(24, -1), row)
    assert_same(fmt.encode(x[0, 0], scale), tuple(p[0] for p in flat))
    transposed = fmt.encode(x.transpose(0, 1), scale)
    assert_same(tuple(p.transpose(0, 1) for p in transposed), fmt.encode(x, scale))
    strided = normal(5, 160)[:, ::2]
    assert_same(fmt.encode(strided, scale), fmt.encode(strided.contiguous(), scale))
    for shape in [(0, 80), (2, 0, 80)]:
        empty = fmt.encode(torch.empty(shape), scale)
        assert [tuple(p.shape) for p in empty] == [(*shape[:-1], n) for n in fmt.plane_bytes(80)]
        assert fmt.decode(empty, 80).shape == shape
        assert_same(fmt.from_ggml(fmt.to_ggml(empty, 80), 80), empty)


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
def test_decode_reads_slices_of_a_larger_buffer(fmt: KVFormat, scale: Scale) -> None:
    """As a cache holds them: allocated for more rows than are stored, the rest poisoned."""
    x = normal(2, 5, 80)
    planes = fmt.encode(x, scale)
    buffers = [torch.full((2, 9, p.shape[-1]), 0xFF, dtype=torch.uint8) for p in planes]
    for buffer, plane in zip(buffers, planes, strict=True):
        buffer[:, 3:8] = plane
    views = tuple(buffer[:, 3:8] for buffer in buffers)
    assert torch.equal(fmt.decode(views, 80), fmt.decode(planes, 80))
    assert torch.equal(fmt.to_ggml(views, 80), fmt.to_ggml(planes, 80))


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_encode_as_their_float32_values(fmt: KVFormat, scale: Scale, dtype: torch.dtype) -> None:
    x = normal(6, 80).to(dtype)
    assert_same(fmt.encode(x, scale), fmt.encode(x.float(), scale))


@pytest.mark.parametrize(("fmt", "scale"), QUANTIZED, ids=ids(QUANTIZED))
def test_input_is_left_alone_and_needs_no_grad(fmt: KVFormat, scale: Scale) -> None:
    x = normal(6, 80).requires_grad_()
    before = x.detach().clone()
    y = fmt.decode(fmt.encode(x, scale), 80)
    assert torch.equal(x, before)
    assert not y.requires_grad


@pytest.mark.parametrize(("fmt", "scale"), QUANTIZED, ids=ids(QUANTIZED))
def test_chunks_do_not_matter(fmt: KVFormat, scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(50, 80)
    whole = fmt.encode(x, scale)
    monkeypatch.setattr("hybridkv.formats.block._CHUNK_VALUES", 200)
    assert_same(fmt.encode(x, scale), whole)
    assert_same(tuple(p[17:18] for p in whole), fmt.encode(x[17:18], scale))


@pytest.mark.parametrize(("fmt", "scale"), SCALED_IN_BLOCKS, ids=ids(SCALED_IN_BLOCKS))
@pytest.mark.parametrize("head_dim", [16, 48, 80, 112])
@pytest.mark.parametrize("offset", [0.0, 6.0, -6.0])
def test_padding_lanes_join_nothing(fmt: KVFormat, scale: Scale, head_dim: int, offset: float) -> None:
    """The last block's 16 values, padded, have the scale and codes of the same 16 values given twice."""
    x = normal(100, head_dim) + offset
    padded = fmt.encode(x, scale)
    doubled = fmt.encode(torch.cat([x, x[:, -16:]], dim=-1), scale)
    ours, theirs = numbers(fmt, padded), numbers(fmt, doubled)
    tolerance = 0.0 if scale == "absmax" else F16_EPS  # the sums of a refit round differently
    torch.testing.assert_close(ours["d"], theirs["d"], rtol=tolerance, atol=0)
    if fmt.has_min:
        assert torch.equal(ours["m"], theirs["m"])
    a, b = fmt.decode(padded, head_dim), fmt.decode(doubled, head_dim + 16)[:, :head_dim]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
    if "s" in ours:
        sums = a.double()[:, -16:].sum(-1)
        atol = 4 * F16_EPS * float(a.abs().max())
        torch.testing.assert_close(ours["s"][:, -1], sums, rtol=2 * F16_EPS, atol=atol)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if {"s", "sum"} & {p.role for p in f.planes}])
@pytest.mark.parametrize("scale", ["absmax", "refit"])
def test_stored_sums(fmt: KVFormat, scale: Scale) -> None:
    planes = fmt.encode(normal(50, 96) + 0.3, scale)
    stored = numbers(fmt, planes)
    codes = planes[-1].view(torch.int8).reshape(50, -1, fmt.lanes(96)).double().sum(-1)
    if "sum" in stored:
        assert torch.equal(stored["sum"], codes)
    else:  # of the scale before it was rounded to float16
        torch.testing.assert_close(stored["s"], codes * stored["d"], rtol=F16_EPS, atol=1e-6)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.block == 32], ids=lambda f: f.name)
def test_decode_ignores_poisoned_padding(fmt: KVFormat) -> None:
    clean = fmt.encode(normal(20, 48))
    poisoned = list(clean)
    for i, plane in enumerate(fmt.planes):
        if plane.role == "codes":
            codes = packing.unpack_codes(plane, clean[i].reshape(20, 2, -1), 32).clone()
            codes[:, 1, 16:] = 0xFF
            poisoned[i] = packing.pack_codes(plane, codes).flatten(-2)
    assert any(not torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert torch.equal(fmt.decode(poisoned, 48), fmt.decode(clean, 48))


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
def test_zero_constant_and_tiny_rows(fmt: KVFormat, scale: Scale) -> None:
    zeros = fmt.decode(fmt.encode(torch.zeros(3, 80), scale), 80)
    assert not zeros.any()
    for value in (1.0, -3.5, 1e-3):
        x = torch.full((2, 80), value)
        y = fmt.decode(fmt.encode(x, scale), 80)
        torch.testing.assert_close(y, x, rtol=2**-8 if fmt.name == "bf16" else F16_EPS, atol=0)
    for magnitude in (1e-6, 1e-8, 1e-20, 1e-38, 1e-45):  # down to float32's least subnormal
        x = normal(20, 80) * magnitude
        y = fmt.decode(fmt.encode(x, scale), 80)
        assert y.isfinite().all()
        assert y.abs().max() <= 1.01 * x.abs().max() + 2.0**-24 * 127


@pytest.mark.parametrize(("fmt", "scale"), QUANTIZED, ids=ids(QUANTIZED))
def test_values_whose_scale_has_no_inverse_decode_to_zeros(fmt: KVFormat, scale: Scale) -> None:
    x = normal(20, 80) * 1e-38
    assert x.all()
    assert not fmt.decode(fmt.encode(x, scale), 80).any()


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    lane=st.integers(0, 79),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
)
def test_non_finite_input_never_decodes_to_finite_values(
    fmt: KVFormat, scale: Scale, bad: float, lane: int, magnitude: float
) -> None:
    x = normal(3, 80) * magnitude
    x[1, lane] = bad
    y = fmt.decode(fmt.encode(x, scale), 80)
    lanes = fmt.lanes(80)
    start = lane // lanes * lanes
    hit = y[1, start : start + lanes]
    assert not hit.isfinite().any()
    rest = torch.cat([y[0], y[1, :start], y[1, start + lanes :], y[2]])
    clean = fmt.decode(fmt.encode(normal(3, 80) * magnitude, scale), 80)
    assert torch.equal(rest, torch.cat([clean[0], clean[1, :start], clean[1, start + lanes :], clean[2]]))


@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
@pytest.mark.parametrize("magnitude", [1e5, 1e7, 1e9, 1e20, 3e37])
def test_large_input_decodes_right_or_non_finite(fmt: KVFormat, scale: Scale, magnitude: float) -> None:
    """Never finite and wrong: a scale beyond float16 must show."""
    x = (normal(20, 80) * magnitude).clamp(-3.4e38, 3.4e38)
    y = fmt.decode(fmt.encode(x, scale), 80)
    error = (y - x).abs() / x.abs().amax(-1, keepdim=True)
    limit = 0.6 if fmt.code_bits in (2, 3) else 0.2
    assert ((error < limit) | ~y.isfinite()).all()
    wide = {"f32", "bf16", "q8_KV"}
    if fmt.name in wide:
        assert y.isfinite().all()
    elif magnitude >= 1e9:
        assert not y.isfinite().any()


@pytest.mark.parametrize("fmt", REFITS, ids=[fmt.name for fmt in REFITS])
def test_refit_lowers_the_error_that_it_fits(fmt: KVFormat) -> None:
    x = torch.cat([normal(300, 96), normal(300, 96, seed=1).pow(3)])
    lanes = fmt.lanes(96)
    blocks = x.double().reshape(-1, lanes)
    weight = blocks.square() if fmt in WEIGHTED else torch.ones_like(blocks)
    error = {}
    for scale in fmt.scales:
        y = fmt.decode(fmt.encode(x, scale), 96).double().reshape(-1, lanes)
        error[scale] = (weight * (y - blocks).square()).sum(-1)
    # Rounding scale and minimum to float16 costs at most their relative errors, squared, of the weighted energy.
    slack = (F16_EPS / 2) ** 2 * (weight * blocks.square()).sum(-1)
    if fmt.has_min:
        slack += (F16_EPS / 2) ** 2 * lanes * (blocks.amin(-1).square() + blocks.abs().amax(-1).square())
    if fmt.refit != "starts":  # which do not hold the scale of absmax: better in all, not in each
        assert (error["refit"] <= error["absmax"] + slack).all()
    assert error["refit"].sum() < 0.97 * error["absmax"].sum()


@pytest.mark.parametrize("fmt", WEIGHTED, ids=[fmt.name for fmt in WEIGHTED])
def test_refit_is_the_weighted_least_squares_scale_of_its_codes(fmt: KVFormat) -> None:
    x = normal(300, 96)
    planes = fmt.encode(x, "refit")
    d = numbers(fmt, planes)["d"]
    x64 = x.double().reshape(-1, fmt.lanes(96))
    q = fmt.decode(planes, 96).double().reshape(x64.shape) / d.reshape(-1, 1)
    fitted = (x64.pow(3) * q).sum(-1) / (x64.square() * q.square()).sum(-1)
    tolerance = 1e-6 if fmt.block is None else F16_EPS
    torch.testing.assert_close(d.flatten(), fitted, rtol=tolerance, atol=0)
    if fmt.refit == "pairs":  # only the search moves codes
        for plane, kept, refitted in zip(fmt.planes, fmt.encode(x, "absmax"), planes, strict=True):
            if plane.role == "codes":
                assert torch.equal(kept, refitted)


@pytest.mark.parametrize("fmt", UNWEIGHTED, ids=[fmt.name for fmt in UNWEIGHTED])
def test_refit_is_the_least_squares_fit_of_its_codes(fmt: KVFormat) -> None:
    """NumPy's solver on every block gives the stored scale, and minimum."""
    x = normal(40, 96) + (5 if fmt.has_min else 0)
    planes = fmt.encode(x, "refit")
    stored = numbers(fmt, planes)
    codes = torch.zeros(40, 3, 32, dtype=torch.uint8)
    for plane, data in zip(fmt.planes, planes, strict=True):
        if plane.role == "codes":
            codes |= packing.unpack_codes(plane, data.reshape(40, 3, -1), 32)
    q = torch.tensor(fmt.codebook).double()[codes.int()] if fmt.codebook else codes.double()
    for q_block, x_block, d, m in zip(
        q.reshape(-1, 32).numpy(),
        x.double().reshape(-1, 32).numpy(),
        stored["d"].flatten(),
        stored.get("m", stored["d"]).flatten(),
        strict=True,
    ):
        columns = [q_block, np.ones(32)] if fmt.has_min else [q_block]
        fitted = np.linalg.lstsq(np.stack(columns, 1), x_block)[0]
        assert float(d) == pytest.approx(fitted[0], rel=F16_EPS)
        if fmt.has_min:
            assert float(m) == pytest.approx(fitted[1], rel=F16_EPS)


@pytest.mark.parametrize("fmt", [f for f in REFITS if f.refit == "starts"], ids=lambda f: f.name)
def test_fits_from_several_starts_come_near_the_best_scale(fmt: KVFormat) -> None:
    """Against the least error of a fine grid of scales, tried one after another with exact arithmetic."""
    assert fmt.codebook is not None
    x = normal(300, 32).double()
    book = torch.tensor(fmt.codebook).double()
    best = torch.full((300,), torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(0.6, 2.5, 400, dtype=torch.float64):
        d = x.abs().amax(-1, keepdim=True) / (127 * ratio)
        y = d * book[(x[..., None] / d[..., None] - book).abs().argmin(-1)]
        best = torch.minimum(best, (y - x).square().sum(-1))
    ours = (fmt.decode(fmt.encode(x.float(), "refit"), 32).double() - x).square().sum(-1)
    assert (ours.sum() / best.sum()).sqrt() < 1.01


@pytest.mark.parametrize("fmt", [f for f in REFITS if f.codebook], ids=lambda f: f.name)
def test_codebooks_are_int8_and_ascend(fmt: KVFormat) -> None:
    """So that the integer kernels take them; those of refit `starts` are their own mirror image."""
    book = fmt.codebook
    assert book is not None
    assert len(book) == 2**fmt.code_bits
    assert all(-127 <= a < b <= 127 for a, b in pairwise(book))
    if fmt.refit == "starts":
        assert book == tuple(-value for value in reversed(book))
        assert all(start > 0 for start in fmt.starts)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.refit], ids=lambda f: f.name)
def test_refit_where_it_does_not_apply_is_refused(fmt: KVFormat) -> None:
    with pytest.raises(UsageError, match=f"{fmt.name} has no scale rule 'refit'; allowed: absmax"):
        fmt.encode(torch.zeros(1, 32), "refit")
    assert_same(fmt.encode(torch.ones(1, 32)), fmt.encode(torch.ones(1, 32), "absmax"))


@pytest.mark.parametrize("fmt", REFITS, ids=[fmt.name for fmt in REFITS])
def test_scale_option_has_an_effect(fmt: KVFormat) -> None:
    x = normal(20, 64)
    d = {scale: numbers(fmt, fmt.encode(x, scale))["d"] for scale in fmt.scales}
    assert (d["absmax"] != d["refit"]).float().mean() > 0.5
    assert torch.equal(numbers(fmt, fmt.encode(x))["d"], d[fmt.default_scale])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to compare with the CPU")
@pytest.mark.parametrize(("fmt", "scale"), CASES, ids=ids(CASES))
def test_cuda_equals_cpu_bit_for_bit(fmt: KVFormat, scale: Scale) -> None:
    x = torch.cat([normal(400, 80), normal(400, 80, seed=1).bfloat16().float(), torch.zeros(3, 80)])
    x[-1, 5] = 1e9
    planes = fmt.encode(x, scale)
    on_device = fmt.encode(x.cuda(), scale)
    assert_same(tuple(p.cpu() for p in on_device), planes)
    decoded = fmt.decode(on_device, 80).cpu()
    torch.testing.assert_close(decoded, fmt.decode(planes, 80), rtol=0, atol=0, equal_nan=True)
