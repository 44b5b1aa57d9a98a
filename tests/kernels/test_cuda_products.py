"""A matrix times one row as a Triton kernel, against float64: in the interpreter without a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda import products
from hybridkv.kernels.cuda.products import multiply, multiply_swiglu, one_row
from tests.on_device import DEVICE, random

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def exact_product(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    both = x.double() @ weight.double().T
    gate, up = both.chunk(2, 1)
    return F.silu(gate) * up if gated else both


def close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 2), (37, 6), (1024, 10), (1030, 4), (3080, 6), (9216, 2)])
def test_one_row(n_in: int, n_out: int, gated: bool, dtype: torch.dtype) -> None:
    """One and several pieces of a row, one and two rows a program; beside the matrix lies what must not be read."""
    x, weight = random(1, n_in, dtype=dtype), torch.full((n_out + 4, n_in), torch.nan, dtype=dtype, device=DEVICE)
    weight[2:-2] = random(n_out, n_in, dtype=dtype)
    weight = weight[2:-2]
    close(one_row(x, weight, gated=gated), exact_product(x, weight, gated), dtype)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_any_number_of_rows(n_rows: int) -> None:
    x, weight = random(n_rows, 40, dtype=torch.float32), random(12, 40, dtype=torch.float32)
    close(multiply(x, weight), exact_product(x, weight, False), torch.float32)
    close(multiply_swiglu(x, weight), exact_product(x, weight, True), torch.float32)


def test_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and rows of the matrix one after the other, where a kernel may begin before its turn."""
    monkeypatch.setattr(products, "overlaps", lambda device: True)
    given = []
    monkeypatch.setattr(products, "one_row", lambda x, weight, **_: given.append(weight.shape))
    x, weight = random(2, 40, dtype=torch.float32), random(12, 48, dtype=torch.float32)
    multiply(x[:1], weight[:, :40].contiguous())
    assert given == [(12, 40)]
    multiply(x, weight[:, :40].contiguous())
    multiply(x[:1], weight[:, :40])
    most = products.MOST_INPUTS + 1
    multiply(torch.ones(1, most, device=DEVICE), torch.ones(1, most, device=DEVICE))
    assert len(given) == 1
