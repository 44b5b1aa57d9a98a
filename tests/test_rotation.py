"""The rotation mixes, keeps lengths, is its own inverse, and refuses what it cannot mix."""

from __future__ import annotations

import pytest
import torch

from hybridkv.errors import UsageError
from hybridkv.rotation import rotate, rotation_block

DIMS = [(16, 16), (48, 16), (64, 64), (80, 16), (96, 32), (112, 16), (128, 128), (160, 32), (192, 64)]
DIMS += [(256, 256), (512, 512)]


@pytest.mark.parametrize(("dim", "block"), DIMS)
def test_block_is_the_largest_power_of_two(dim: int, block: int) -> None:
    assert rotation_block(dim) == block


@pytest.mark.parametrize("dim", [0, -16, 8, 20, 100, 255])
def test_other_head_dims_are_refused(dim: int) -> None:
    with pytest.raises(UsageError, match=f"head dim {dim}; allowed: multiples of 16"):
        rotation_block(dim)


@pytest.mark.parametrize(("dim", "block"), DIMS)
def test_every_output_depends_on_every_input_of_its_block(dim: int, block: int) -> None:
    """A transform that skips stages is orthonormal and its own inverse too; only this tells it apart."""
    response = rotate(torch.eye(dim))
    expected = torch.zeros(dim, dim)
    for start in range(0, dim, block):
        expected[start : start + block, start : start + block] = block**-0.5
    torch.testing.assert_close(response.abs(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dim", "_block"), DIMS)
def test_is_its_own_inverse_and_keeps_scores(dim: int, _block: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, 3, 5, dim, generator=generator)
    torch.testing.assert_close(rotate(rotate(q)), q, rtol=0, atol=1e-5)
    torch.testing.assert_close((rotate(q) * rotate(k)).sum(-1), (q * k).sum(-1), rtol=1e-4, atol=1e-4)


def test_spreads_an_outlier() -> None:
    row = torch.zeros(256)
    row[17] = 100.0
    assert rotate(row).abs().max() == pytest.approx(100 / 16)


def test_any_float_dtype_and_stride() -> None:
    x = torch.randn(4, 64, 6, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    assert not x.is_contiguous()
    torch.testing.assert_close(rotate(x), rotate(x.contiguous()))
    assert rotate(x.bfloat16()).dtype == torch.float32
