"""The gated delta rule in float64, token after token, as its papers write it down. Knows nothing of hybridkv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolved(raw: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raw `[B, T, C]` after state `[B, C, K]`, weight `[C, 1, K]`: SiLU of the convolution, and the newest inputs."""
    taps = weight.shape[2]
    inputs = torch.cat([state.double(), raw.double().transpose(1, 2)], 2)
    out = F.conv1d(inputs, weight.double(), None if bias is None else bias.double(), groups=len(weight))
    return F.silu(out[:, :, -raw.shape[1] :]).transpose(1, 2), inputs[:, :, -taps:]


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Q and k `[B, T, Hk, D]`, v `[B, T, Hv, Dv]`, gates `[B, T, Hv]`, state `[B, Hv, D, Dv]`; outputs and state."""
    q, k, v, alpha, beta, state = (x.double() for x in (q, k, v, alpha, beta, state))
    group = v.shape[2] // k.shape[2]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(group, 2) for x in (q * q.shape[-1] ** -0.5, k))
    decay = torch.exp(-a_log.double().exp() * F.softplus(alpha + dt_bias.double()))
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        correction = (v[:, t] - torch.einsum("bhdv,bhd->bhv", state, k[:, t])) * beta[:, t].sigmoid()[..., None]
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, t], correction)
        out.append(torch.einsum("bhdv,bhd->bhv", state, q[:, t]))
    return torch.stack(out, 1), state


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dim, times the weight and `silu(z)`."""
    x = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return x * weight.double() * F.silu(z.double())
