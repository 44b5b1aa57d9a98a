"""Products with 8-bit activations: against float64, the same bits beside any rows, and sums at the end of 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.formats.weights import WEIGHTS, WeightFormat
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Weight, matmul, takes_int8
from tests.kernels.weight_rows import Bytes, coded, decoded, quantized, weight, with_scales

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason=f"{cpu_native.available()}")

# Relative RMSE: a scale per 32 activations, levels -127..127; of normal values 5e-3.
LIMIT = 7e-3
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K")
N_ROWS = (1, 2, 3, 4, 5, 8, 9, 33)


@pytest.fixture(params=TYPES)
def fmt(request: pytest.FixtureRequest) -> WeightFormat:
    return WEIGHTS[request.param]


def _isas() -> list[str]:
    """The instruction sets of this processor that have such products."""
    if cpu_native.available() is not None:
        return []
    return [name for name in cpu_native._native().isas() if name not in ("portable", "neon", "dotprod")]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of them, asked for by `HYBRIDKV_ISA`."""
    monkeypatch.setenv("HYBRIDKV_ISA", request.param)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(x: Tensor, w: Weight, n_threads: int = 1) -> Tensor:
    return matmul(x, w, activations="int8", n_threads=n_threads)


def scales(x: Tensor) -> Tensor:
    """The scale of every activation: a 127th of the largest of its 32; rows end within a group."""
    wide = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    return (wide.abs().amax(2, keepdim=True) / 127).expand_as(wide).reshape(len(x), -1)[:, : x.shape[1]]


def rounded(x: Tensor) -> Tensor:
    """What 8 bits with a scale per 32 keep of activations, in float64."""
    scale = scales(x)
    levels = torch.where(scale > 0, torch.round(x * (1 / scale).nan_to_num(posinf=0.0)), 0.0).clamp(-127, 127)
    return levels.double() * scale.double()


def check(got: Tensor, x: Tensor, values: np.ndarray) -> None:
    """Near the float64 product of what was kept of x, and as near as half a level allows to that of x itself."""
    weights = torch.from_numpy(values).double()
    size = (x.double().square().mean() * weights.square().mean() * x.shape[1]).sqrt()
    assert (got - rounded(x) @ weights.T).square().mean().sqrt() <= 3e-4 * size
    bound = 0.5 * scales(x).double() @ weights.abs().T
    assert ((got - x.double() @ weights.T).abs() <= 1.01 * bound + 1e-6 * size).all()


def test_which_types_have_them(isa: str) -> None:
    assert tuple(name for name in WEIGHTS if takes_int8(name)) == tuple(name for name in WEIGHTS if name in TYPES)


def test_products_are_those_of_float64(isa: str, fmt: WeightFormat) -> None:
    for n_in in (32, 96, 256 + 128, 256 + 192, 800) if fmt.block == 32 else (256, 768, 1024):
        for n_out in (1, 15, 17, 50):
            data = coded(fmt, n_out, n_in)
            for n_rows in (1, 2, 3, 4, 5, 16, 33) if n_out == 17 else (1, 9):
                x = normal(n_rows, n_in, seed=n_rows)
                check(int8(x, weight(fmt, data, n_in), 1 + n_rows % 2), x, decoded(fmt, data))


def test_products_with_normal_rows(isa: str, fmt: WeightFormat) -> None:
    data, x = quantized(fmt, 40, 1024), normal(40, 1024)
    exact = x.double() @ torch.from_numpy(decoded(fmt, data)).double().T
    error = (int8(x, weight(fmt, data, 1024)) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 3e-3 <= error <= LIMIT  # 8 bits were used, and kept


def test_rows_have_the_same_bits_beside_any_others(isa: str, fmt: WeightFormat) -> None:
    for n_in in (3 * max(fmt.block, 32), 1024):
        w, x = weight(fmt, coded(fmt, 75, n_in), n_in), normal(33, n_in, seed=8)
        alone = torch.cat([int8(x[i : i + 1], w) for i in range(33)])
        for n in N_ROWS:
            assert torch.equal(int8(x[:n], w, 2), alone[:n]), n
        ids = torch.tensor([8, 0, 0, 5, 32])
        for chosen in (ids[:1], ids):
            assert torch.equal(matmul(x, w, x_rows=chosen, activations="int8"), alone[chosen])


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_no_sum_of_products_overflows(isa: str, fmt: WeightFormat, byte: int) -> None:
    """Levels and scales of one byte throughout, activations at the ends of their range."""
    n_in = 2 * max(fmt.block, 256)
    data = with_scales(fmt, np.full((16, n_in // fmt.block, fmt.block_bytes), byte, dtype=np.uint8)).reshape(16, -1)
    values, w = decoded(fmt, data), weight(fmt, data, n_in)
    for signs in ([1.0], [-1.0], [1.0, -1.0], [1.0, 1.0, -1.0, -1.0]):
        for n_rows in (1, 4, 9):
            x = 127 / 32 * torch.tensor([signs]).repeat(n_rows, n_in // len(signs))
            assert torch.equal(rounded(x), x.double())
            got, exact = int8(x, w), x.double() @ torch.from_numpy(values).double().T
            size = 4 * np.abs(values.astype(np.float64)).sum(1).max()
            assert (got - exact).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("n_rows", [1, 5, 40])
def test_writes_its_outputs_and_nothing_else(isa: str, fmt: WeightFormat, n_rows: int) -> None:
    n_out, n_in = 37, max(fmt.block, 96)
    w, poison = weight(fmt, coded(fmt, n_out, n_in), n_in), torch.full((n_rows + 2, n_out + 11), torch.nan)
    wide = torch.full((n_rows, n_in + 5), torch.nan)
    wide[:, 3 : 3 + n_in] = normal(n_rows, n_in, seed=3)
    x, out = wide[:, 3 : 3 + n_in], poison[1:-1, 4 : 4 + n_out]
    assert matmul(x, w, out=out, activations="int8", n_threads=2) is out
    once = out.clone()
    assert torch.equal(once, int8(x.contiguous(), w))
    matmul(x, w, out=out, into="add", activations="int8")
    assert torch.equal(out, once + once)
    out.fill_(torch.nan)
    assert poison.isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_a_number_never_comes_from_one_that_is_none(isa: str, fmt: WeightFormat, n_rows: int, value: float) -> None:
    n_in = 2 * max(fmt.block, 32)
    w, x = weight(fmt, coded(fmt, 50, n_in), n_in), normal(n_rows, n_in, seed=6)
    clean, dirty, bad = int8(x, w), x.clone(), n_rows // 2
    dirty[bad, n_in - 3] = value
    got = int8(dirty, w)
    assert not got[bad].isfinite().any()
    others = torch.arange(n_rows) != bad
    assert torch.equal(got[others], clean[others])


def test_scales_of_activations_are_free(isa: str, fmt: WeightFormat) -> None:
    """Rows of very different size, groups of zeros, and values whose inverse is no float32."""
    n_in = max(fmt.block, 128)
    data = coded(fmt, 64, n_in)
    w, values = weight(fmt, data, n_in), decoded(fmt, data)
    x = normal(20, n_in, seed=7) * torch.tensor([1e30, 1e-25, 1.0, 1e6, 1e-12]).repeat(4)[:, None]
    x[:, 32:64] = 0
    got = int8(x, w)
    for i in range(20):
        check(got[i : i + 1], x[i : i + 1], values)
    for tiny in (0.0, 1e-38, 1e-45):
        assert int8(torch.full((4, n_in), tiny), w).abs().max() <= 1e-28


@pytest.mark.parametrize("name", ["q8_0", "iq4_nl", "iq4_xs", "mxfp4", "f16"])
def test_other_types_have_the_bits_of_16(isa: str, name: str) -> None:
    fmt = WEIGHTS[name]
    data: Bytes = coded(fmt, 19, 512)
    w = weight(fmt, data, 512)
    for n_rows in (1, 9):
        x = normal(n_rows, 512)
        assert torch.equal(int8(x, w), matmul(x, w))
