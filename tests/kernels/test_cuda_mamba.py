"""State spaces and gated convolutions as Triton kernels, against float64: in the interpreter without a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybridkv.kernels.cuda.conv import conv_prompt, conv_step
from hybridkv.kernels.cuda.mamba import Mamba2Shape, gate_norm, mamba1, mamba2_prompt, mamba2_step
from tests.on_device import DEVICE, random

pytestmark = pytest.mark.usefixtures("interpreter")


def close(got: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    assert float((got.double() - exact).norm() / exact.norm()) < tolerance


def mamba2_exactly(
    mixed: Tensor, dt: Tensor, vectors: tuple[Tensor, ...], state: Tensor, shape: Mamba2Shape
) -> tuple[Tensor, Tensor]:
    """Token by token, as the equations say: `[B, T, ...]`."""
    rate, bias, skip = (v.double() for v in vectors)
    x, b, c = torch.split(mixed.double(), [shape.inner] + [shape.n_groups * shape.state_dim] * 2, 2)
    x = torch.unflatten(x, 2, (shape.n_heads, -1))
    each = shape.n_heads // shape.n_groups
    b, c = (torch.unflatten(g, 2, (shape.n_groups, -1)).repeat_interleave(each, 2) for g in (b, c))
    step, memory, out = F.softplus(dt.double() + bias, threshold=1e9), state.double(), []
    for t in range(mixed.shape[1]):
        decay = torch.exp(rate * step[:, t])[..., None, None]
        memory = memory * decay + b[:, t, :, :, None] * (x[:, t] * step[:, t, :, None])[:, :, None]
        out.append((memory * c[:, t, :, :, None]).sum(2) + x[:, t] * skip[:, None])
    return torch.stack(out, 1).flatten(2), memory


@pytest.mark.parametrize(("heads", "groups", "head_dim", "state_dim"), [(4, 1, 16, 16), (6, 3, 20, 24)])
def test_mamba2(heads: int, groups: int, head_dim: int, state_dim: int) -> None:
    """A prompt of several chunks, the last one not full, then a token; time steps from 1e-6 to 30."""
    shape, n = Mamba2Shape(heads, groups, head_dim, state_dim), 37
    mixed, dt = random(2, n + 1, shape.channels + 5)[:, :, : shape.channels], 6 * random(2, n + 1, heads) - 4
    vectors = (-random(heads).abs(), random(heads, seed=1), random(heads, seed=2))
    state = random(2, heads, state_dim, head_dim)
    exact, after = mamba2_exactly(mixed, dt, vectors, state, shape)
    own = state.clone()
    prompt = mamba2_prompt(mixed[:, :n].flatten(0, 1), dt[:, :n].flatten(0, 1), *vectors, own, shape)
    close(torch.unflatten(prompt, 0, (2, n)), exact[:, :n])
    close(mamba2_step(mixed[:, n], dt[:, n], *vectors, own, shape), exact[:, n])
    close(own, after)


@pytest.mark.parametrize(("inner", "state_dim"), [(40, 16), (7, 11)])
def test_mamba1(inner: int, state_dim: int) -> None:
    n, batch = 5, 2
    mixed, dt, z = (random(batch, n, inner, seed=i) for i in range(3))
    left, right = (random(batch, n, state_dim, seed=i) for i in range(2))
    rate, bias, skip = -random(inner, state_dim).abs(), random(inner), random(inner, seed=1)
    state = random(batch, inner, state_dim)
    own, memory, exact = state.clone(), state.double(), []
    step = F.softplus((dt + bias).double())
    for t in range(n):
        gain = (mixed[:, t].double() * step[:, t])[..., None] * left[:, t, None].double()
        memory = memory * torch.exp(rate.double() * step[:, t, :, None]) + gain
        y = (memory * right[:, t, None].double()).sum(2) + mixed[:, t].double() * skip.double()
        exact.append(y * F.silu(z[:, t].double()) / 4)
    parts = [part.flatten(0, 1) for part in (mixed, dt, left, right, z)]
    got = mamba1(*parts, rate, bias, skip, own, factor=1 / 4)
    close(torch.unflatten(got, 0, (batch, n)), torch.stack(exact, 1), 1e-3)  # float16
    close(own, memory)


@pytest.mark.parametrize("groups", [1, 3])
def test_gates_and_norms(groups: int) -> None:
    x, z, weight = random(3, 66), random(3, 70)[:, 2:68], random(66)
    gated = x.double() * F.silu(z.double())
    close(gate_norm(x, z, None, groups, eps=0.0, factor=1 / 8, dtype=torch.float32), gated / 8)
    parts = torch.unflatten(gated, 1, (groups, -1))
    exact = (parts * torch.rsqrt(parts.square().mean(2, keepdim=True) + 1e-5)).flatten(1) * weight.double()
    close(gate_norm(x, z, weight, groups, eps=1e-5, factor=1.0, dtype=torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_convolutions(dtype: torch.dtype) -> None:
    """A short prompt, a longer one and a token: gates before and behind, and no SiLU."""
    channels, taps, lengths = 70, 3, (2, 21, 1)
    before, after, raw = (random(2, sum(lengths), channels, dtype=dtype, seed=i) for i in range(3))
    weight, state = random(channels, 1, taps), torch.zeros(2, channels, taps, device=DEVICE)
    inputs = (before.double() * raw.double()).transpose(1, 2)
    exact = F.conv1d(F.pad(inputs, (taps - 1, 0)), weight.double(), groups=channels).transpose(1, 2) * after.double()
    begin = 0
    for n in lengths:
        x, first, last = (part[:, begin : begin + n].flatten(0, 1) for part in (raw, before, after))
        run = conv_step if n == 1 else conv_prompt
        got = run(x, state, weight, None, gates=(first, last))
        close(torch.unflatten(got, 0, (2, n)), exact[:, begin : begin + n], 2e-3 if dtype == torch.float16 else 1e-5)
        begin += n
    close(state, inputs[:, :, -taps:], 2e-3 if dtype == torch.float16 else 1e-6)
