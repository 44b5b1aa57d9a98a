"""Experts as Triton kernels, against float64: in the interpreter without a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda import experts
from hybridkv.kernels.cuda.experts import bias_of_groups, route, run_experts
from tests.on_device import DEVICE, random

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # two roundings, which the interpreter makes cuts


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (4, 4), (13, 3), (256, 8)])
def test_choice(n_experts: int, top_k: int, normalize: bool, dtype: torch.dtype) -> None:
    logits = random(3, n_experts + 20, dtype=dtype)[:, 7 : 8 + n_experts]
    for row in range(3):  # no two are equal in bfloat16
        logits[row, :-1] = torch.randperm(n_experts, generator=torch.Generator().manual_seed(row)) / 16
    index, weights = route(logits, top_k, normalize=normalize)
    exact, best = logits[:, :-1].double().softmax(1).topk(top_k)
    assert torch.equal(index.long(), best)
    exact = exact / exact.sum(1, keepdim=True) if normalize else exact
    assert torch.allclose(weights[:, :-1].double(), exact, atol=1e-6)
    assert torch.allclose(weights[:, -1].double(), logits[:, -1].double().sigmoid(), atol=1e-6)


def test_of_equals_the_lower_is_chosen() -> None:
    logits = torch.zeros(1, 6, device=DEVICE)
    logits[0, 3] = 1.0
    assert route(logits, 3, normalize=True)[0].tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n_groups", "n_used"), [(1, 1), (4, 2)])
def test_choice_by_sigmoids(n_groups: int, n_used: int, normalize: bool) -> None:
    """A bias decides who is chosen and weighs nothing; experts of the best groups alone."""
    logits, bias, top_k = random(7, 12), random(12, seed=1), 3
    shares = torch.sigmoid(logits.double())
    wanted = shares + bias.double()
    if n_groups > 1:
        best = torch.unflatten(wanted, 1, (n_groups, -1)).topk(2, 2).values.sum(2).topk(n_used, 1).indices
        used = torch.zeros(7, n_groups, device=DEVICE).scatter(1, best, 1).repeat_interleave(12 // n_groups, 1)
        wanted = wanted.masked_fill(used == 0, -torch.inf)
        bias = bias_of_groups(logits, bias, n_groups, n_used)
    index, weights = route(
        logits, top_k, normalize=normalize, gating="sigmoid", bias=bias, eps=0.5, scale=2.5, shared="always"
    )
    assert index.tolist() == wanted.topk(top_k, 1).indices.tolist()
    chosen = shares.gather(1, index.long())
    exact = 2.5 * (chosen / (chosen.sum(1, keepdim=True) + 0.5) if normalize else chosen)
    assert torch.allclose(weights[:, :-1].double(), exact, atol=1e-6)
    assert weights[:, -1].tolist() == [1.0] * 7


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy's, of the interpreter's maximum
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_choose_what_is_there(bad: float, normalize: bool) -> None:
    """And leave a number that is not finite, which is found at the next layer that looks."""
    index, weights = route(torch.full((2, 6), bad, device=DEVICE), 4, normalize=normalize)
    assert index.tolist() == [[0, 1, 2, 3]] * 2
    assert not torch.isfinite(weights[:, :-1]).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden", "width", "shared"), [(1, 1, 1), (37, 21, 5), (18, 6, 37)])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_experts(
    n_rows: int, hidden: int, width: int, shared: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UP_INPUTS", "DOWN_INPUTS"):
        monkeypatch.setattr(experts, name, 16)  # several pieces of a row
    n_experts, top_k = 5, 2
    x = random(n_rows, hidden + 9, dtype=dtype)[:, 4 : 4 + hidden]
    each = [random(n_experts, 2 * width, hidden, dtype=dtype), random(n_experts, hidden, width, dtype=dtype)]
    own = [random(2 * shared, hidden, dtype=dtype), random(hidden, shared, dtype=dtype)]
    index = torch.tensor([[4, 0], [2, 4], [1, 3]], dtype=torch.int32, device=DEVICE)[:n_rows].contiguous()
    weights = random(n_rows, top_k + 1)
    for unread in set(range(n_experts)) - set(index.flatten().tolist()):
        each[0][unread] = torch.nan
        each[1][unread] = torch.nan
    got = run_experts(x, (index, weights), (each[0], each[1]), (own[0], own[1]))
    exact = torch.zeros(n_rows, hidden, dtype=torch.float64, device=DEVICE)
    for row in range(n_rows):
        chosen = [(each[0][e], each[1][e]) for e in index[row].tolist()] + [(own[0], own[1])]
        for (gate_up, down), weight in zip(chosen, weights[row].double(), strict=True):
            gate, up = (gate_up.double() @ x[row].double()).chunk(2)
            between = (F.silu(gate) * up).to(dtype).double()
            exact[row] += weight * (down.double() @ between)
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    assert float((got.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]
