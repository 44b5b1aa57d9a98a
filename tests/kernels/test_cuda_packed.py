"""Packed weights on the GPU against gguf-py's values in float64: in the interpreter without a CUDA device."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.formats.weights import WEIGHTS
from hybridkv.kernels.cuda import grid_layout, packed, packed_layout, streamed
from hybridkv.kernels.cuda.packed import multiply_gated, multiply_packed
from hybridkv.kernels.cuda.packed_layout import PACKED, PackedWeight, upload
from hybridkv.kernels.cuda.packed_rows import decode_rows, gather_rows
from hybridkv.kernels.cuda.streamed import Staging, StreamedStack
from hybridkv.kernels.grids import grid_bytes
from tests.kernels.weight_rows import coded, decoded, weight, with_scales
from tests.on_device import DEVICE, random
from tests.thin import mostly_long, slow_but

pytestmark = pytest.mark.usefixtures("interpreter")

VALUES = 4e-4
"""A value is a float16: half a unit in its last place, and as much for a minimum or a scale."""
QUICK = ("q8_0", "q2_K", "q4_K", "q6_K")
"""What runs in the interpreter by default: no minima, minima, minima beside small codes, and codes of two planes."""
SUMS = 5e-4  # the interpreter cuts where the card rounds


def made(name: str, n_out: int, n_in: int, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A matrix on the device, and gguf-py's values."""
    rows = coded(WEIGHTS[name], n_out, n_in, seed)
    held = upload([weight(WEIGHTS[name], rows, n_in)], torch.device(DEVICE))
    return held, torch.from_numpy(decoded(WEIGHTS[name], rows)).double().to(DEVICE)


def error(got: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", slow_but(PACKED, QUICK))
def test_values(name: str) -> None:
    """All rows, and some by their numbers; two units of inputs."""
    held, exact = made(name, 37, 512)
    got = decode_rows(held, 0, 37)
    assert got.dtype == torch.float16
    assert error(got, exact) < VALUES
    assert (got.double() - exact).abs().max() <= 1.2e-3 * exact.abs().max()
    ids = torch.tensor([36, 0, 5, 5], device=DEVICE)
    assert torch.equal(gather_rows(held, ids), got[ids])
    assert torch.equal(decode_rows(held, 3, 9), got[3:12])


@pytest.mark.parametrize(("name", "n_rows"), mostly_long(product(PACKED, (1, 3)), [("q4_K", 3), ("q8_0", 1)]))
def test_few_rows(name: str, n_rows: int) -> None:
    held, exact = made(name, 37, 768)
    x = random(n_rows, 768, dtype=torch.float16)
    assert error(multiply_packed(x, (held,)), x.double() @ exact.T) < SUMS


@pytest.mark.parametrize("names", [("q4_K", "q6_K"), ("q8_0", "q8_0"), ("iq2_xs", "q4_K"), ("iq3_s", "iq1_m")])
def test_two_matrices_of_types_of_their_own(names: tuple[str, str]) -> None:
    """Nine rows of activations are two tiles of columns, of which the second has one."""
    (a, exact_a), (b, exact_b) = made(names[0], 20, 512), made(names[1], 35, 512, seed=1)
    x = random(9, 512, dtype=torch.float16)
    got = multiply_packed(x, (a, b), dtype=torch.float16, factor=0.5)
    assert got.dtype == torch.float16
    assert error(got, 0.5 * x.double() @ torch.cat([exact_a, exact_b]).T) < 2 * SUMS


@pytest.mark.parametrize("name", ["q4_K", "q8_0", "iq2_s", "iq1_s"])
@pytest.mark.parametrize("n_rows", [1, packed.FEW_ROWS + 1])
def test_swiglu(name: str, n_rows: int) -> None:
    held, exact = made(name, 2 * 19, 256)
    x = random(n_rows, 256, dtype=torch.float16)
    gate, up = (x.double() @ exact.T).chunk(2, 1)
    assert error(multiply_gated(x, held, factor=1 / 32), F.silu(gate) * up / 32) < 4 * SUMS


def test_many_rows_go_through_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WINDOW_BYTES", 16 * 512 * 2)
    (a, exact_a), (b, exact_b) = made("q5_K", 37, 512), made("q4_0", 5, 512)
    x = random(packed.FEW_ROWS + 3, 512, dtype=torch.float16)
    got = multiply_packed(x, (a, b), factor=2.0)
    assert error(got, 2 * x.double() @ torch.cat([exact_a, exact_b]).T) < 2 * SUMS


@pytest.mark.parametrize(
    ("name", "n_in"), slow_but(product(("q8_0", "q4_1", "mxfp4"), (32, 288)), [("q4_1", 32), ("mxfp4", 288)])
)
def test_rows_that_do_not_fill_their_units(name: str, n_in: int) -> None:
    """What lies beyond a row of activations is another, and not a number."""
    held, exact = made(name, 21, n_in)
    x = torch.full((4, n_in), torch.nan, dtype=torch.float16, device=DEVICE)
    x[1:3] = random(2, n_in, dtype=torch.float16)
    assert error(multiply_packed(x[1:3], (held,)), x[1:3].double() @ exact.T) < SUMS
    assert error(decode_rows(held, 0, 21), exact) < VALUES


def test_scales_and_minima_that_are_zero_or_far_apart() -> None:
    """A block without a scale is its minima; one without both is zero."""
    rows = coded(WEIGHTS["q4_K"], 4, 256).reshape(4, -1, 144)
    halves = rows[:, :, :4].view("float16")
    halves[0, :, 0], halves[1, :, 1], halves[2] = 0, 0, 0
    halves[3, :, 0], halves[3, :, 1] = 6e-8, 1.0
    exact = torch.from_numpy(decoded(WEIGHTS["q4_K"], rows.reshape(4, -1))).double().to(DEVICE)
    held = upload([weight(WEIGHTS["q4_K"], rows.reshape(4, -1), 256)], torch.device(DEVICE))
    got = decode_rows(held, 0, 4)
    for row in range(4):
        assert (got[row].double() - exact[row]).norm() <= VALUES * exact[row].norm(), row


def test_stacks_are_joined_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that end within a matrix and within a stack, and take what the file takes."""
    fmt, parts, exact = WEIGHTS["q6_K"], [], []
    for n_out, seed in ((7, 0), (4, 1)):
        rows = coded(fmt, 3 * n_out, 512, seed)
        parts.append(weight(fmt, rows.reshape(3, n_out, -1), 512))
        exact.append(torch.from_numpy(decoded(fmt, rows)).double().view(3, n_out, 512))
    for n_bytes in (fmt.row_bytes(512) * 3, fmt.row_bytes(512) * 14, 1 << 23):
        monkeypatch.setattr(packed_layout, "CHUNK_BYTES", n_bytes)
        held = upload(parts, torch.device(DEVICE))
        assert (held.n_stack, held.n_out, held.nbytes) == (3, 11, sum(part.nbytes for part in parts))
        got = decode_rows(held, 0, 33).view(3, 11, 512)
        assert error(got, torch.cat(exact, 1).to(DEVICE)) < VALUES


@pytest.mark.parametrize("name", ["q6_K", "q4_K", "q8_0"])
def test_windows_of_a_stack_in_main_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what the whole stack is on the card, through slots that are used again."""
    fmt = WEIGHTS[name]
    parts = [weight(fmt, coded(fmt, 5 * n, 512, n).reshape(5, n, -1), 512) for n in (7, 4)]
    whole = upload(parts, torch.device(DEVICE))
    for n_bytes in (fmt.row_bytes(512) * 3, fmt.row_bytes(512) * 14, fmt.row_bytes(512) - 1):
        for module in (packed_layout, streamed):
            monkeypatch.setattr(module, "CHUNK_BYTES", n_bytes)
        stack = StreamedStack(parts, Staging(torch.device(DEVICE)), torch.device(DEVICE))
        assert (stack.n_stack, stack.n_out, stack.n_in) == (5, 11, 512)
        for first, n in ((0, 2), (2, 3), (4, 1)):
            window = stack.window(first, n)
            assert window.n_stack == n
            for got, expected in zip(window.planes, whole.planes, strict=True):
                assert torch.equal(got, expected[first * 11 : (first + n) * 11])


@pytest.mark.parametrize("name", PACKED)
def test_bytes_are_those_of_the_file(name: str) -> None:
    """But for types whose scales become bytes, or whose seven bits of signs become eight."""
    more = {"q3_K": 4, "iq4_xs": 2, "iq2_xxs": 4, "iq2_xs": 4, "iq3_xxs": 4}.get(name, 0)
    in_file = WEIGHTS[name].block_bytes * (packed_layout.UNIT // WEIGHTS[name].block)
    assert sum(PACKED[name].plane_bytes) == in_file + more


def test_types_that_are_not_held_packed() -> None:
    assert packed_layout.rejects("q4_K") is None
    assert "tq2_0 is not multiplied packed on cuda; it knows q8_0, " in str(packed_layout.rejects("tq2_0"))
    assert {name for name, fmt in WEIGHTS.items() if fmt.is_quantized} == set(PACKED)


@pytest.mark.parametrize("name", grid_layout.GRIDS)
def test_all_weights_of_a_type_share_its_grid(name: str) -> None:
    """It is gguf-py's, and every entry is found: each block of a row has another index."""
    fmt, grid = WEIGHTS[name], grid_layout.GRIDS[name]
    (a, _), (b, _) = made(name, 3, 256), made(name, 2, 512, seed=4)
    assert a.planes[2].data_ptr() == b.planes[2].data_ptr()
    assert a.nbytes == 3 * sum(PACKED[name].plane_bytes)
    table = a.planes[2].cpu().view(-1, grid.values // 4, 4)[:, :, [0, 2, 1, 3]].reshape(-1, grid.values)
    assert len(table) == 256 << grid.high
    assert table.tolist() == grid_bytes(fmt).tolist()


@pytest.mark.parametrize("name", grid_layout.GRIDS)
def test_blocks_of_ones_and_of_zeros(name: str) -> None:
    """The largest index, every sign and the largest scale, which no sum of random blocks singles out; and the first."""
    fmt = WEIGHTS[name]
    rows = np.stack([np.full(fmt.block_bytes, byte, np.uint8) for byte in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F)])
    rows = with_scales(fmt, rows)
    held = upload([weight(fmt, rows, 256)], torch.device(DEVICE))
    exact = torch.from_numpy(decoded(fmt, rows)).double().to(DEVICE)
    got = decode_rows(held, 0, len(rows)).double()
    assert ((got - exact).abs() <= 1e-3 * exact.abs()).all()


@pytest.mark.parametrize(("name", "n_rows"), [("q4_K", 1), ("q8_0", 9)])
def test_programs_that_walk_over_tiles(monkeypatch: pytest.MonkeyPatch, name: str, n_rows: int) -> None:
    """Three programs for five tiles, of which the last is cut; units of the next tile are on their way meanwhile."""
    monkeypatch.setattr(
        packed, "_programs", lambda tiling, device, *tiles: [min(n, 3 - i) for i, n in enumerate(tiles)]
    )
    (a, exact_a), (b, exact_b) = made(name, 70, 768), made("q6_K", 35, 768, seed=1)
    x = random(n_rows, 768, dtype=torch.float16)
    assert error(multiply_packed(x, (a,)), x.double() @ exact_a.T) < SUMS
    assert error(multiply_packed(x, (a, b)), x.double() @ torch.cat([exact_a, exact_b]).T) < SUMS
    gate, up = (x.double() @ exact_a.T).chunk(2, 1)
    assert error(multiply_gated(x, a, factor=1 / 32), F.silu(gate) * up / 32) < 4 * SUMS


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_of_a_row_add_up(monkeypatch: pytest.MonkeyPatch, shares: int) -> None:
    """Five units in two shares or three, of which the last has one less."""
    monkeypatch.setattr(packed, "tiling_of", lambda weight, n_tiles: packed.Tiling(2, shares=shares))
    held, exact = made("q4_K", 37, 1280)
    x = random(1, 1280, dtype=torch.float16)
    parts = multiply_packed(x, (held,), shared=True)
    assert parts.shape == (shares, 1, 37)
    assert error(parts.sum(0), x.double() @ exact.T) < SUMS
    assert multiply_packed(x, (held,)).shape == (1, 37)
