"""Packed experts on the GPU against gguf-py's values in float64: in the interpreter without a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.formats.weights import WEIGHTS
from hybridkv.kernels.cuda import packed_experts
from hybridkv.kernels.cuda.packed_experts import PlainStack, prompt_experts, run_packed_experts
from hybridkv.kernels.cuda.packed_layout import PackedWeight, upload
from tests.kernels.weight_rows import coded, decoded, weight
from tests.on_device import DEVICE, random

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreter")]

N_EXPERTS, TOP, HIDDEN, WIDTH = 5, 2, 256, 40
FACTOR = 1 / 32


def stack(name: str, n: int, n_out: int, n_in: int, seed: int) -> tuple[PackedWeight, Tensor]:
    rows = coded(WEIGHTS[name], n * n_out, n_in, seed)
    held = upload([weight(WEIGHTS[name], rows.reshape(n, n_out, -1), n_in)], torch.device(DEVICE))
    return held, torch.from_numpy(decoded(WEIGHTS[name], rows)).double().view(n, n_out, n_in).to(DEVICE)


def made(up: str, down: str, width: int, shared_width: int) -> tuple[Any, Any]:
    """Packed matrices of experts and of the shared one, and their values."""
    shapes = ((up, N_EXPERTS, 2 * width, HIDDEN), (down, N_EXPERTS, HIDDEN, width))
    own = ((up, 1, 2 * shared_width, HIDDEN), (down, 1, HIDDEN, shared_width))
    both = [stack(*shape, seed=i) for i, shape in enumerate((*shapes, *own))]
    return [held for held, _ in both], [values for _, values in both]


def exact_answer(x: Tensor, index: Tensor, weights: Tensor, values: Any) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for row in range(len(x)):
        chosen = [(values[0][e], values[1][e]) for e in index[row].tolist()] + [(values[2][0], values[3][0])]
        for (gate_up, down), share in zip(chosen, weights[row].double(), strict=True):
            gate, up = (gate_up @ x[row].double()).chunk(2)
            out[row] += share * (down @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize(
    ("up", "down", "width", "shared_width"),
    [
        ("q8_0", "q4_0", 64, 32),
        pytest.param("q4_K", "q6_K", 256, 512, marks=pytest.mark.long),  # minutes in the interpreter
        pytest.param("iq2_xs", "iq3_xxs", 256, 512, marks=pytest.mark.long),
    ],
)
def test_few_tokens(up: str, down: str, width: int, shared_width: int) -> None:
    held, values = made(up, down, width, shared_width)
    x, weights = random(2, HIDDEN, dtype=torch.float16), random(2, TOP + 1).abs()
    index = torch.tensor([[4, 0], [2, 4]], dtype=torch.int32, device=DEVICE)
    got = run_packed_experts(x, (index, weights), (held[0], held[1]), (held[2], held[3]), factor=FACTOR)
    exact = exact_answer(x, index, weights, values)
    assert float((got.double() - exact).norm() / exact.norm()) < 2e-3


def test_squares_without_a_shared_expert() -> None:
    """Few tokens, and the same ones as a prompt; then gated ones, plain and packed."""
    hidden = 96
    x, weights = random(2, hidden, dtype=torch.float16), random(2, TOP + 1).abs()
    index = torch.tensor([[4, 0], [2, 4]], dtype=torch.int32, device=DEVICE)
    for gated in (False, True):
        up, down = (stack("q8_0", N_EXPERTS, n, m, seed=n) for n, m in ((64 * (1 + gated), hidden), (hidden, 64)))
        exact = torch.zeros(2, hidden, dtype=torch.float64, device=DEVICE)
        for row in range(2):
            for e, share in zip(index[row].tolist(), weights[row].double(), strict=False):
                between = up[1][e] @ x[row].double()
                between = F.silu(between[:64]) * between[64:] if gated else F.relu(between).square()
                exact[row] += share * (down[1][e] @ between)
        plain = (PlainStack(up[1].half()), PlainStack(down[1].half()))
        chosen = index, weights
        for got in (
            run_packed_experts(x, chosen, (up[0], down[0]), None, factor=FACTOR, gated=gated),
            prompt_experts(x, chosen, (up[0], down[0]), None, factor=FACTOR, gated=gated),
            prompt_experts(x, chosen, plain, None, factor=FACTOR, gated=gated),
        ):
            assert float((got.double() - exact).norm() / exact.norm()) < 3e-3


def test_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in several windows; of some tiles of rows, of many, and of none."""
    monkeypatch.setattr(packed_experts, "PROMPT_TILE", 16)
    monkeypatch.setattr(packed_experts, "WINDOW_BYTES", 2 * 2 * 256 * HIDDEN * 2)
    held, values = made("q4_K", "q8_0", 256, 64)
    n = 37
    x, weights = random(n, HIDDEN, dtype=torch.float16), random(n, TOP + 1).abs()
    index = torch.stack([torch.full((n,), 3), torch.arange(n) % 2 * 2], 1).to(torch.int32).to(DEVICE)
    got = prompt_experts(x, (index, weights), (held[0], held[1]), (held[2], held[3]), factor=FACTOR)
    exact = exact_answer(x, index, weights, values)
    assert float((got.double() - exact).norm() / exact.norm()) < 3e-3
