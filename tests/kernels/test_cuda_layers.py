"""What stands between matrix products, as Triton kernels, against float64: in the interpreter without a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda import delta
from hybridkv.kernels.cuda.activations import Act
from hybridkv.kernels.cuda.conv import conv_prompt, conv_step
from hybridkv.kernels.cuda.delta import DeltaShape, delta_prompt, delta_step
from hybridkv.kernels.cuda.layers import activated, add_norm, gate_heads, norm_rope, regroup_heads, swiglu, watch_finite
from tests.on_device import DEVICE, ON_CUDA, random
from tests.oracles import delta as oracle

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3}


def part(n_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A slice of wider rows, as a joined product gives it."""
    return random(n_rows, width + 37, dtype=dtype, seed=seed)[:, 5 : 5 + width]


def close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    assert float((got.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 1), (3, 65), (2, 1030)])
def test_norm_of_a_sum(n_rows: int, width: int, offset: float, dtype: torch.dtype) -> None:
    x, delta_, weight = part(n_rows, width, dtype), part(n_rows, width, dtype, seed=1), random(width, dtype=dtype)
    total = x.double() + delta_.double()
    for added, exact in ((None, x.double()), (delta_, total)):
        got = add_norm(x, added, weight, 1e-6, offset=offset)
        assert got.dtype == dtype
        close(x, exact, TOLERANCE[dtype])  # the residual is the sum
        wide = x.double()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        close(got, wide * scale * (weight.double() + offset), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    both = part(3, 2 * 1100, dtype)
    gate, up = both.double().chunk(2, 1)
    close(swiglu(both), F.silu(gate) * up, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 16), (48, 48), (80, 20), (16, 0)])
def test_norm_and_rope(head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    x = torch.unflatten(part(5, 6 * head_dim, dtype), 1, (6, head_dim))[:, 0::2]
    weight, positions = random(head_dim, dtype=dtype), torch.tensor([0, 1, 17, 300_000, 4], device=DEVICE)
    frequencies = 1.0 / 1e4 ** (torch.arange(0, rotated, 2, device=DEVICE) / max(rotated, 1))
    got = norm_rope(x, weight, 1e-6, positions, frequencies, offset=1.0)
    wide = x.double()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.double())
    angle = (positions.float()[:, None] * frequencies.float()).double()[:, None]
    low, high, rest = torch.split(wide, [rotated // 2, rotated // 2, head_dim - rotated], 2)
    cos, sin = angle.cos(), angle.sin()
    close(got, torch.cat([low * cos - high * sin, high * cos + low * sin, rest], 2), TOLERANCE[dtype])


def test_rope_of_neighbours_without_a_norm() -> None:
    """And with a magnitude, which what does not turn has not."""
    x, positions = torch.unflatten(part(3, 4 * 24, torch.float32), 1, (4, 24)), torch.tensor([0, 5, 900], device=DEVICE)
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 16, 2, device=DEVICE) / 16)
    got = norm_rope(x, None, 0.0, positions, frequencies, pairs="neighbours", magnitude=1.5)
    angle = (positions.float()[:, None] * frequencies).double()[:, None]
    even, odd, cos, sin = x[..., :16:2].double(), x[..., 1:16:2].double(), angle.cos() * 1.5, angle.sin() * 1.5
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], 3).flatten(2)
    close(got, torch.cat([turned, x[..., 16:].double()], 2), 1e-5)
    still = norm_rope(x, None, 0.0, positions, frequencies[:0], dtype=torch.float16)
    assert torch.equal(still, x.half())


@pytest.mark.parametrize(
    ("act", "exactly"),
    [
        ("silu", F.silu),
        ("gelu", partial(F.gelu, approximate="tanh")),
        ("gelu_erf", F.gelu),
        ("relu2", lambda x: F.relu(x).square()),
    ],
)
def test_activations(act: Act, exactly: Callable[[Tensor], Tensor]) -> None:
    both = 3 * part(3, 2 * 40, torch.float32)
    gate, up = both.double().chunk(2, 1)
    exact = exactly(both.double()) if act == "relu2" else exactly(gate) * up
    close(activated(both, act, factor=1 / 4), exact / 4, 1e-5)


def test_norm_of_a_weighed_sum() -> None:
    x, added, weight = (random(3, 65, seed=i) for i in range(3))
    total = x.double() + 0.25 * added.double()
    got = add_norm(x, added, weight[0], 1e-6, scale=0.25)
    close(x, total, 1e-6)
    close(got, total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-6) * weight[0].double(), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype) -> None:
    x = random(2, 3, 1, 48).transpose(1, 2).flatten(0, 1)
    gate = torch.unflatten(part(2, 6 * 48, dtype), 1, (6, 48))[:, 1::2]
    got = gate_heads(x, gate)
    assert got.dtype == dtype
    close(got, (x.double() * gate.double().sigmoid()).flatten(1), TOLERANCE[dtype])


@pytest.mark.parametrize("n_heads", [1, 3])
def test_parts_of_heads_go_together(n_heads: int) -> None:
    x = part(2, n_heads * (3 + 5 + 7 + 1 + 2), torch.bfloat16)
    first, second = x.split([n_heads * 15, n_heads * 3], 1)
    parts = [torch.unflatten(first, 1, (n_heads, 15)).split([3, 5, 7], 2)]
    parts += [torch.unflatten(second, 1, (n_heads, 3)).split([1, 2], 2)]
    exact = torch.cat([piece.flatten(1) for group in parts for piece in group], 1)
    assert torch.equal(regroup_heads(x, n_heads, ((3, 5, 7), (1, 2))), exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [None, 0, 1, 2, 3])
def test_watch(where: int | None, bad: float) -> None:
    inputs = [random(2, 5, 1, 67), random(2, 5, 1, 67, dtype=torch.bfloat16), *(part(2, 65, torch.bfloat16),) * 2]
    inputs[3] = inputs[3].clone()
    if where is not None:
        inputs[where] = inputs[where].clone()
        inputs[where].view(-1)[-1] = bad
    health = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    watch_finite(*inputs, health[1])
    expected = [0, 0] if where is None else [int(where == 0), int(where > 0)]
    assert health.tolist() == [[0, 0], expected, [0, 0]]


SHAPES = [DeltaShape(1, 1, 16, 16), DeltaShape(2, 6, 16, 24), DeltaShape(2, 2, 40, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_tokens", "taps"), [(1, 4), (2, 4), (19, 4), (5, 3)])
def test_convolution(n_tokens: int, taps: int, bias: bool, dtype: torch.dtype) -> None:
    raw, state = part(2 * n_tokens, 150, dtype), random(2, 150, taps, dtype=dtype)
    weight, offset = random(150, 1, taps, dtype=dtype), random(150, dtype=dtype) if bias else None
    exact, newest = oracle.convolved(torch.unflatten(raw, 0, (2, n_tokens)), state, weight, offset)
    for run in (conv_prompt, conv_step) if n_tokens == 1 else (conv_prompt,):
        # The CPU's native step leaves a state whose channels are innermost.
        own = state.clone() if run is conv_prompt else state.transpose(1, 2).contiguous().transpose(1, 2)
        close(run(raw, own, weight, offset), exact.flatten(0, 1), TOLERANCE[dtype])
        assert torch.equal(own.double(), newest)


def gates(n_rows: int, shape: DeltaShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    both = part(n_rows, 2 * shape.n_value, dtype)
    alpha, beta = both[:, : shape.n_value], both[:, shape.n_value :]
    return alpha, beta, random(shape.n_value, dtype=dtype), random(shape.n_value, dtype=dtype, seed=2)


def exact_delta(
    mixed: Tensor, n_seqs: int, parts: tuple[Tensor, ...], state: Tensor, shape: DeltaShape
) -> list[Tensor]:
    rows = torch.unflatten(mixed, 0, (n_seqs, -1))
    widths = [shape.n_key * shape.head_k] * 2 + [shape.n_value * shape.head_v]
    counts = (shape.n_key, shape.n_key, shape.n_value)
    heads = [torch.unflatten(x, 2, (n, -1)) for x, n in zip(rows.split(widths, 2), counts, strict=True)]
    alpha, beta = (torch.unflatten(x, 0, (n_seqs, -1)) for x in parts[:2])
    return list(oracle.delta_rule(*heads, alpha, beta, *parts[2:], state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_of_the_delta_rule(shape: DeltaShape, dtype: torch.dtype) -> None:
    mixed, z = random(3, shape.channels), part(3, shape.n_value * shape.head_v, dtype)
    state, norm = random(3, shape.n_value, shape.head_k, shape.head_v), random(shape.head_v, dtype=dtype)
    parts = gates(3, shape, dtype)
    out, after = exact_delta(mixed, 3, parts, state, shape)
    exact = oracle.gated_norm(out[:, 0], torch.unflatten(z, 1, (shape.n_value, -1)), norm, 1e-6).flatten(1)
    close(delta_step(mixed, z, *parts, norm, state, shape, eps=1e-6), exact, TOLERANCE[dtype])
    close(state, after, 1e-5)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("n_tokens", [2, 16, 35])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_prompt_of_the_delta_rule(
    shape: DeltaShape, n_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows == 64 and not ON_CUDA and (n_tokens != 35 or shape.n_value > 1):
        pytest.skip("seconds in the interpreter, and nothing new")
    monkeypatch.setattr(delta, "CHUNK", rows)
    mixed, state = random(n_tokens, shape.channels), random(1, shape.n_value, shape.head_k, shape.head_v)
    parts = gates(n_tokens, shape, torch.float32)
    out, after = exact_delta(mixed, 1, parts, state, shape)
    close(delta_prompt(mixed, *parts, state, shape), out[0].flatten(1), 2e-5)
    close(state, after, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_keys_do_not_cancel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token again and again, never forgotten: the system's powers would reach 1e18 in a chunk of 64."""
    if not ON_CUDA and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no product of bfloat16")
    monkeypatch.setattr(delta, "CHUNK", 64)
    shape = DeltaShape(1, 1, 16, 16)
    mixed = random(1, shape.channels, dtype=dtype).expand(64, -1).contiguous()
    mixed[:, 32:] = random(64, 16, dtype=dtype)
    parts = tuple(torch.full((64, 1), x, device=DEVICE, dtype=dtype) for x in (-30.0, 30.0))
    parts += tuple(torch.zeros(1, device=DEVICE, dtype=dtype) for _ in range(2))
    state = random(1, 1, 16, 16)
    out, after = exact_delta(mixed, 1, parts, state, shape)
    close(delta_prompt(mixed, *parts, state, shape), out[0].flatten(1), 2e-5 if dtype == torch.float32 else 3e-2)
    close(state, after, 2e-5 if dtype == torch.float32 else 3e-2)
