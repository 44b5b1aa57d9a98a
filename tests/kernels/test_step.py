"""The native operations of a step against float64 torch: odd sizes, poisoned memory, every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor

from hybridkv.formats import FORMATS
from hybridkv.kernels import KVView, Segment, cpu_native
from hybridkv.kernels.cache_rows import CacheRows
from hybridkv.kernels.routing import Routing
from hybridkv.kernels.step import Gate, StepProgram, delta_rejects
from hybridkv.kernels.weights import encode
from hybridkv.rotation import rotate, rotation_block
from tests.isas import isas_with
from tests.kernels.stored import Part, store_parts

if cpu_native.available() is not None:
    pytest.skip("the native extension is not built", allow_module_level=True)

TOLERANCE = 3e-6


@pytest.fixture(autouse=True)
def _isa(isa: str) -> None:
    """Run every test on each instruction set."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffer(*shape: int) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(shape, torch.nan)


def error(got: Tensor, exact: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 31), (3, 33), (2, 128), (1, 384)])
def test_norm(heads: int, width: int) -> None:
    x, out, weight = normal(5, heads, width), buffer(5, heads, width), normal(width, seed=1)
    program = StepProgram()
    program.norm(x, out, weight, factor=1 / width, eps=1e-6)
    program.run(0, 1, 1, 4)
    x64 = x[:4].double()
    exact = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6) * weight
    assert error(out[:4], exact) < TOLERANCE
    assert out[4].isnan().all()


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "product": lambda g: g,
    "gelu": partial(torch.nn.functional.gelu, approximate="tanh"),
    "gelu_erf": torch.nn.functional.gelu,
    "relu": torch.relu,
}


@isas_with("kind, width", GATES, (1, 17, 64, 257))
def test_gate(kind: str, width: int) -> None:
    """Heads strided as queries and gates are: side by side within a row."""
    both, out = normal(3, 2, 2 * width), buffer(3, 2, width)
    both[0, 0, width:] = torch.linspace(-200, 200, width)
    x, by = both.split(width, dim=2)
    program = StepProgram()
    program.gate(x, by, out, kind)  # type: ignore[arg-type]
    program.run(0, 1, 3, 1)
    g = by.double()
    exact = x.double() * GATES[kind](g)
    assert error(out, exact) < TOLERANCE


def test_exact_gelu_where_it_bends() -> None:
    """Also its tail, which a formula by tanh misses."""
    by, out = torch.linspace(-6, 6, 4096).view(1, -1), buffer(1, 4096)
    program = StepProgram()
    program.gate(torch.ones(1, 4096), by, out, "gelu_erf")
    program.run(0, 1, 1, 1)
    exact = torch.nn.functional.gelu(by.double())
    assert torch.allclose(out.double(), exact, rtol=2e-5, atol=1e-9)


def test_a_copy_fills_its_columns() -> None:
    x, out = normal(3, 5), buffer(3, 9)
    program = StepProgram()
    program.copy(x, out[:, 4:])
    program.run(0, 1, 2, 1)
    assert torch.equal(out[:2, 4:], x[:2])
    assert out[2].isnan().all()
    assert out[:, :4].isnan().all()


def test_gate_in_place_on_many_rows() -> None:
    x, g = normal(700, 96), normal(700, 96, seed=1)
    exact = x.double() * torch.nn.functional.silu(g.double())
    program = StepProgram()
    program.gate(x, g, x, "silu")
    program.run(0, 1, 7, 100, n_threads=3)
    assert error(x, exact) < TOLERANCE


@pytest.mark.parametrize(("n_seqs", "n_tokens"), [(1, 1), (1, 5), (3, 4)])
def test_rope(n_seqs: int, n_tokens: int) -> None:
    """Every sequence takes the angles of its own tokens; what is behind the rotated part stays."""
    x = normal(n_seqs * n_tokens, 3, 20)
    angles = normal(n_tokens, 6, seed=1)
    before = x.clone()
    program = StepProgram()
    program.rope(x, 12)
    program.run(0, 1, n_seqs, n_tokens, angles=[(angles.cos(), angles.sin())])
    a, b, rest = before.double().view(n_seqs, n_tokens, 3, 20).split([6, 6, 8], dim=-1)
    c, s = angles.double().cos().view(1, n_tokens, 1, 6), angles.double().sin().view(1, n_tokens, 1, 6)
    exact = torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1)
    assert error(x.view_as(exact), exact) < TOLERANCE


@isas_with(
    "channels, chunks, with_bias, silu",
    (1, 19, 300), ([1], [2, 1, 1], [7, 3], [1, 1, 1, 1, 1, 9]), (False, True), (False, True),
)  # fmt: skip
def test_conv_continues_its_state(channels: int, chunks: list[int], with_bias: bool, silu: bool) -> None:
    """In whatever pieces two sequences come, the result is that of one convolution over each."""
    kernel, total = 4, sum(chunks)
    x = normal(2, total, channels)
    weight, bias = normal(channels, kernel, seed=1), normal(channels, seed=2) if with_bias else None
    raw, out = buffer(2 * total, channels), buffer(2 * total, channels)
    state = torch.zeros(2, kernel, channels)
    program = StepProgram()
    program.conv(raw, out, weight, bias, 0, silu=silu)
    got, done = [], 0
    for n in chunks:
        raw[: 2 * n] = x[:, done : done + n].reshape(2 * n, channels)
        program.run(0, 1, 2, n, states=program.addresses([state], 2))
        got.append(out[: 2 * n].view(2, n, channels).clone())
        done += n
    padded = torch.nn.functional.pad(x.double().transpose(1, 2), (kernel - 1, 0))
    exact = torch.nn.functional.conv1d(
        padded, weight.double().unsqueeze(1), None if bias is None else bias.double(), groups=channels
    )
    exact = (torch.nn.functional.silu(exact) if silu else exact).transpose(1, 2)
    assert error(torch.cat(got, dim=1), exact) < TOLERANCE
    newest = torch.cat([torch.zeros(2, kernel, channels), x], dim=1)[:, -kernel:]
    assert torch.equal(state, newest)


def test_decay() -> None:
    a, b = normal(6, 5) * 30, normal(6, 5, seed=1) * 30
    rate, bias = -normal(5, seed=2).exp(), normal(5, seed=3)
    decay, beta = buffer(6, 5), buffer(6, 5)
    program = StepProgram()
    program.decay(a, b, decay, beta, rate, bias)
    program.run(0, 1, 2, 3)
    exact = (rate.double() * torch.nn.functional.softplus(a.double() + bias)).exp()
    assert torch.allclose(decay.double(), exact, rtol=2e-5, atol=1e-30)
    assert error(beta, b.double().sigmoid()) < TOLERANCE


@pytest.mark.parametrize("width", [1, 16, 37])
def test_sums(width: int) -> None:
    x, dst, bias = normal(5, width), normal(5, width, seed=1), normal(width, seed=2)
    exact = dst.double() + 0.25 * x.double() + bias.double()
    program = StepProgram()
    program.add(x, dst, 0.25)
    program.bias(dst, bias)
    program.run(0, 2, 5, 1)
    assert error(dst, exact) < TOLERANCE


def test_norm_with_a_weight_for_each_head() -> None:
    x, weight, out = normal(4, 3, 21), normal(3, 21, seed=1), buffer(4, 3, 21)
    program = StepProgram()
    program.norm(x, out, weight, factor=1 / 21, eps=1e-6)
    program.run(0, 1, 4, 1)
    exact = x.double() * weight / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert error(out, exact) < TOLERANCE


def test_rope_by_tables() -> None:
    """Each operation turns by the angles of its own table."""
    x, angles = normal(3, 2, 8), (normal(3, 4, seed=1), normal(3, 4, seed=2))
    first, second = x.clone(), x.clone()
    program = StepProgram()
    program.rope(first, 8, table=1)
    program.rope(second, 8, table=0)
    program.run(0, 2, 1, 3, angles=[(a.cos(), a.sin()) for a in angles])
    for turned, a in ((first, angles[1]), (second, angles[0])):
        c, s = a.double().cos().unsqueeze(1), a.double().sin().unsqueeze(1)
        left, right = x.double().chunk(2, dim=-1)
        assert error(turned, torch.cat([left * c - right * s, right * c + left * s], dim=-1)) < TOLERANCE


LENGTHS = [(1, 1), (2, 1), (2, 9)]
"""Sequences and their tokens."""


@isas_with("shape, length", [(1, 1, 1, 1), (4, 2, 33, 16), (6, 3, 64, 128), (2, 1, 7, 37)], LENGTHS)
def test_mamba2(shape: tuple[int, int, int, int], length: tuple[int, int]) -> None:
    """Against float64, token by token; inputs strided as they leave the convolution, and the state goes on."""
    (n_heads, n_groups, d, n), (n_seqs, n_tokens) = shape, length
    rows = n_seqs * n_tokens
    mixed = normal(rows, n_heads * d + 2 * n_groups * n + n_heads)
    x, b, c, dt = mixed.split([n_heads * d, n_groups * n, n_groups * n, n_heads], dim=1)
    x, b, c = x.unflatten(1, (n_heads, d)), b.unflatten(1, (n_groups, n)), c.unflatten(1, (n_groups, n))
    rate, bias, skip = -normal(n_heads, seed=1).exp(), normal(n_heads, seed=2), normal(n_heads, seed=3)
    state, out = normal(n_seqs, n_heads, n, d, seed=4), buffer(rows, n_heads, d)
    program = StepProgram()
    program.mamba2(x, b, c, dt, out, 0, rate=rate, bias=bias, skip=skip)
    exact_state, exact = state.double(), torch.empty(n_seqs, n_tokens, n_heads, d, dtype=torch.float64)
    lifted = (each.double().unflatten(0, (n_seqs, n_tokens)) for each in (x, b, c, dt))
    xs, bs, cs, steps = lifted
    bs, cs = (each.repeat_interleave(n_heads // n_groups, dim=2) for each in (bs, cs))
    for t in range(n_tokens):
        step = torch.nn.functional.softplus(steps[:, t] + bias)
        decay = (rate * step)[..., None, None].exp()
        exact_state = decay * exact_state + torch.einsum("bh,bhd,bhn->bhnd", step, xs[:, t], bs[:, t])
        exact[:, t] = torch.einsum("bhnd,bhn->bhd", exact_state, cs[:, t]) + skip[:, None] * xs[:, t]
    program.run(0, 1, n_seqs, n_tokens, states=program.addresses([state], n_seqs), n_threads=2)
    assert error(out.view(exact.shape), exact) < TOLERANCE
    assert error(state, exact_state) < TOLERANCE


@isas_with("shape, length", [(1, 1), (40, 16), (300, 11)], LENGTHS)
def test_mamba1(shape: tuple[int, int], length: tuple[int, int]) -> None:
    """Against float64, token by token, in place as it is used."""
    (channels, n), (n_seqs, n_tokens) = shape, length
    rows = n_seqs * n_tokens
    x, dt, b, c = (
        normal(rows, channels),
        normal(rows, channels, seed=1),
        normal(rows, n, seed=2),
        normal(rows, n, seed=3),
    )
    rate, bias, skip = -normal(channels, n, seed=4).exp(), normal(channels, seed=5), normal(channels, seed=6)
    state = normal(n_seqs, channels, n, seed=7)
    exact_state, exact = state.double(), torch.empty(n_seqs, n_tokens, channels, dtype=torch.float64)
    xs, steps, bs, cs = (each.double().unflatten(0, (n_seqs, n_tokens)) for each in (x, dt, b, c))
    for t in range(n_tokens):
        step = torch.nn.functional.softplus(steps[:, t] + bias)
        change = torch.einsum("bc,bn->bcn", step * xs[:, t], bs[:, t])
        exact_state = (rate * step.unsqueeze(-1)).exp() * exact_state + change
        exact[:, t] = torch.einsum("bcn,bn->bc", exact_state, cs[:, t]) + skip * xs[:, t]
    program = StepProgram()
    program.mamba1(x, b, c, dt, x, 0, rate=rate, bias=bias, skip=skip)
    program.run(0, 1, n_seqs, n_tokens, states=program.addresses([state], n_seqs), n_threads=2)
    assert error(x.view(exact.shape), exact) < TOLERANCE
    assert error(state, exact_state) < TOLERANCE


ROUTINGS = {
    "softmax of the chosen": Routing(3, scale=2.0),
    "softmax of all": Routing(3, normalised=False),
    "sigmoid": Routing(3, "sigmoid", eps=1e-6),
    "sigmoid, biased": Routing(2, "sigmoid", bias=normal(8, seed=9), normalised=False, scale=2.5),
    "groups": Routing(3, "sigmoid", bias=normal(8, seed=9), n_groups=4, n_used_groups=2),
    "one expert": Routing(1),
    "all experts": Routing(8, "sigmoid"),
}


def weights_of(routing: Routing, scores: Tensor) -> Tensor:
    """Of all experts `[rows, experts]`, 0 for those not chosen. Source: transformers, modeling_nemotron_h.py."""
    shares = scores.softmax(-1) if routing.gating == "softmax" else scores.sigmoid()
    values = shares if routing.bias is None else shares + routing.bias
    grouped = values.unflatten(1, (routing.n_groups, -1))
    if routing.n_groups > 1:
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(routing.n_used_groups, dim=-1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        grouped = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf)
    chosen = grouped.flatten(1).topk(routing.n_used, dim=-1).indices
    weights = torch.zeros_like(shares).scatter(1, chosen, shares.gather(1, chosen))
    return routing.scale * (weights / (weights.sum(-1, keepdim=True) + routing.eps) if routing.normalised else weights)


@isas_with("routing, gated, add", ROUTINGS, (True, False), (True, False))
def test_experts(routing: str, gated: bool, add: bool) -> None:
    """Experts with a gate and SiLU, and without one and squared ReLU; added, or written over what is there."""
    how, x, dst = ROUTINGS[routing], normal(9, 24), normal(9, 24, seed=1) if add else buffer(9, 24)
    scores = normal(9, 8, seed=2)
    gate, up, down = normal(8, 20, 24, seed=3), normal(8, 20, 24, seed=4), normal(8, 24, 20, seed=5)
    exact = dst.double() if add else torch.zeros(9, 24, dtype=torch.float64)
    inner = torch.einsum("rn,emn->rem", x.double(), up.double())
    if gated:
        inner = inner * torch.nn.functional.silu(torch.einsum("rn,emn->rem", x.double(), gate.double()))
    else:
        inner = torch.relu(inner).square()
    exact = exact + torch.einsum("re,rem,enm->rn", weights_of(how, scores.double()), inner, down.double())
    program = StepProgram()
    stacks = [encode(each, "f32") for each in (gate, up, down)]
    act: Gate = "silu" if gated else "relu"
    program.experts(x, scores, stacks[0] if gated else None, stacks[1], stacks[2], dst, how, act=act, add=add)
    program.run(0, 1, 9, 1, n_threads=2)
    assert error(dst, exact) < TOLERANCE


def test_groups_are_chosen_by_their_two_best() -> None:
    """The largest score is in the first group, the largest pair in the second."""
    x, dst = normal(1, 16), buffer(1, 16)
    scores = torch.tensor([[3.0, -9.0, 2.0, 1.9]])
    gate, up, down = (normal(4, 16, 16, seed=seed) for seed in (2, 3, 4))
    routing = Routing(1, "sigmoid", bias=torch.zeros(4), normalised=False, n_groups=2, n_used_groups=1)
    program = StepProgram()
    program.experts(x, scores, *(encode(each, "f32") for each in (gate, up, down)), dst, routing, add=False)
    program.run(0, 1, 1, 1)
    inner = torch.nn.functional.silu(gate[2].double() @ x[0].double()) * (up[2].double() @ x[0].double())
    assert error(dst[0], torch.sigmoid(scores[0, 2].double()) * (down[2].double() @ inner)) < TOLERANCE


def test_shares_that_are_next_to_nothing_weigh_nothing() -> None:
    """Three experts of a share of 4e-18 each: their sum is that of `eps` alone, and theirs of it a millionth."""
    x, dst, scores = normal(1, 16), buffer(1, 16), torch.full((1, 4), -40.0)
    scores[0, 3] = -41.0
    stacks = [normal(4, 16, 16, seed=seed) for seed in (2, 3, 4)]
    routing = Routing(3, "sigmoid", eps=1e-12)
    program = StepProgram()
    program.experts(x, scores, *(encode(each, "f32") for each in stacks), dst, routing, add=False)
    program.run(0, 1, 1, 1)
    gate, up, down = (stack.double() for stack in stacks)
    inner = torch.nn.functional.silu(gate @ x[0].double()) * (up @ x[0].double())
    weights = weights_of(routing, scores.double())
    assert error(dst[0], torch.einsum("e,enm,em->n", weights[0], down, inner)) < TOLERANCE
    assert dst.abs().max() < 1e-3


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_a_score_that_is_no_number_shows(gating: str) -> None:
    x, dst, scores = normal(2, 16), buffer(2, 16), normal(2, 4, seed=1)
    scores[1, 2] = torch.nan
    stack = encode(normal(4, 16, 16, seed=2), "f32")
    program = StepProgram()
    program.experts(x, scores, stack, stack, stack, dst, Routing(2, gating), add=False)  # type: ignore[arg-type]
    program.run(0, 1, 2, 1)
    assert dst[0].isfinite().all()
    assert dst[1].isnan().all()


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, values: str
) -> tuple[Tensor, Tensor]:
    """Float64, token by token: `[B, T, heads, D]`, state `[B, heads, D, Dv]`."""
    group = v.shape[2] // k.shape[2]
    q, k = (
        x.double().repeat(1, 1, group, 1) if values == "tiled" else x.double().repeat_interleave(group, dim=2)
        for x in (q, k)
    )
    state, out = state.double(), torch.empty(v.shape, dtype=torch.float64)
    for t in range(v.shape[1]):
        state = state * decay[:, t].double()[..., None, None]
        known = torch.einsum("bhdv,bhd->bhv", state, k[:, t])
        change = beta[:, t].double().unsqueeze(-1) * (v[:, t].double() - known)
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, t], change)
        out[:, t] = torch.einsum("bhdv,bhd->bhv", state, q[:, t])
    return out, state


@isas_with(
    "shape, length, values",
    [(1, 1, 2, 16), (2, 4, 24, 48), (2, 2, 128, 128), (1, 3, 32, 80)],
    LENGTHS,
    ("grouped", "tiled"),
)
def test_delta(shape: tuple[int, int, int, int], length: tuple[int, int], values: Literal["grouped", "tiled"]) -> None:
    """Heads strided as they leave the convolution; the state goes on."""
    (n_key, n_value, d, dv), (n_seqs, n_tokens) = shape, length
    rows = n_seqs * n_tokens
    mixed = normal(rows, 2 * n_key * d + n_value * dv) / d**0.5
    q, k, v = mixed.split([n_key * d, n_key * d, n_value * dv], dim=1)
    q, k, v = q.unflatten(1, (n_key, d)), k.unflatten(1, (n_key, d)), v.unflatten(1, (n_value, dv))
    decay, beta = normal(rows, n_value, seed=1).sigmoid(), normal(rows, n_value, seed=2).sigmoid()
    state, out = normal(n_seqs, n_value, d, dv, seed=3), buffer(rows, n_value, dv)
    lifted = (x.unflatten(0, (n_seqs, n_tokens)) for x in (q, k, v, decay, beta))
    exact, exact_state = delta_rule(*lifted, state, values)
    program = StepProgram()
    program.delta(q, k, v, decay, beta, out, 0, values=values)
    program.run(0, 1, n_seqs, n_tokens, states=program.addresses([state], n_seqs), n_threads=2)
    assert error(out.view(exact.shape), exact) < TOLERANCE
    assert error(state, exact_state) < TOLERANCE


def test_delta_refuses_what_it_cannot_run(isa: str) -> None:
    assert isa
    assert delta_rejects(128, 128) is None
    assert delta_rejects(3, 16) is not None
    assert delta_rejects(4, 24) is not None


ROTATED = ((16, 16), (48, 16), (128, 128), (192, 64))
PAST = {
    "one": (Part("q8_0", "q8_0", 5),),
    "tail": (Part("f16", "f16", 4, memory="float"), Part("q4_0", "q8_0", 41), Part("f16", "f16", 7, memory="float")),
    "first of a tail": (Part("q8_0", "q4_0", 300, centered=True), Part("f16", "f16", 1)),
    "newest is centered": (Part("f16", "f16", 3), Part("q8_0", "q8_0", 20, centered=True)),
}


@isas_with("rotated, past", ROTATED, PAST)
def test_attend_rotates_stores_and_attends(rotated: tuple[int, int], past: str) -> None:
    """Against float64 attention over what the planes then hold; a rotated row mixes its whole block."""
    head_dim, block = rotated
    assert rotation_block(head_dim) == block
    view = store_parts(PAST[past], head_dim_k=head_dim, head_dim_v=head_dim, rotated=True).view
    newest = view.segments[-1]
    around = [p.clone() for p in (*newest.k, *newest.v)]
    for plane in (*newest.k, *newest.v):
        plane[:, :, newest.start + newest.length - 1] = 0xFF
    q, k, v, out = (
        normal(2, 6, head_dim),
        normal(2, 2, head_dim, seed=1),
        normal(2, 2, head_dim, seed=2),
        buffer(2, 6, head_dim),
    )
    exact_q, new_k, new_v = rotate(q).double(), rotate(k), rotate(v)
    program = StepProgram()
    program.attend(q, k, v, out, head_dim**-0.5)
    assert program.run(0, 1, 2, 1, rows=[CacheRows(view, refit_k=True, refit_v=True)]) == ["finite"]
    keys, values = decoded(view)
    for rows, new in ((keys, new_k), (values, new_v)):
        assert error(rows[:, :, -1], new.double()) < 0.02
    row = newest.start + newest.length - 1
    for plane, before in zip((*newest.k, *newest.v), around, strict=True):
        assert torch.equal(plane[:, :, :row], before[:, :, :row])
        assert torch.equal(plane[:, :, row + 1 :], before[:, :, row + 1 :])
    keys, values = (x.double().repeat_interleave(3, dim=1) for x in (keys, values))
    weights = torch.softmax(torch.einsum("bhd,bhsd->bhs", exact_q, keys) * head_dim**-0.5, dim=-1)
    exact = rotate(torch.einsum("bhs,bhsd->bhd", weights, values).float()).double()
    assert error(out, exact) < 2e-3


def decoded(view: KVView) -> tuple[Tensor, Tensor]:
    """Rows of all segments, centers added, still rotated."""
    k, v = [], []
    for s in view.segments:
        rows = slice(s.start, s.start + s.length)
        k.append(s.format_k.decode([p[:, :, rows] for p in s.k], view.head_dim_k))
        v.append(s.format_v.decode([p[:, :, rows] for p in s.v], view.head_dim_v))
        if s.center is not None:
            k[-1] = k[-1] + s.center.unsqueeze(2)
    return torch.cat(k, dim=2), torch.cat(v, dim=2)


@pytest.mark.parametrize(("where", "found"), [("cache", "bad output"), ("q", "bad input"), ("v", "bad input")])
def test_attend_says_what_is_not_finite(where: str, found: str) -> None:
    f16 = FORMATS["f16"]
    planes = [f16.encode(normal(1, 1, 4, 16)) for _ in "kv"]
    q, k, v, out = normal(1, 2, 16), normal(1, 1, 16), normal(1, 1, 16), buffer(1, 2, 16)
    if where == "cache":
        planes[1][0][:, :, 1] = 0xFF
    else:
        {"q": q, "v": v}[where][0, 0, 3] = torch.inf
    program = StepProgram()
    program.attend(q, k, v, out, 0.25)
    view = KVView((Segment(*planes, f16, f16, 0, 4),), 16, 16)
    assert program.run(0, 1, 1, 1, rows=[CacheRows(view, refit_k=False, refit_v=False)]) == [found]


def test_a_run_takes_its_states_from_its_caller() -> None:
    """Two caches on one program: neither sees the other."""
    x, out = normal(1, 8), buffer(1, 8)
    program = StepProgram()
    program.conv(x, out, torch.ones(8, 2), None, 0)
    first, second = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    program.run(0, 1, 1, 1, states=program.addresses([first], 1))
    program.run(0, 1, 1, 1, states=program.addresses([first], 1))
    alone = out.clone()
    program.run(0, 1, 1, 1, states=program.addresses([second], 1))
    assert not torch.equal(out, alone)
    assert torch.equal(second[:, 0], torch.zeros(1, 8))
    with pytest.raises(AssertionError):
        program.addresses([first.repeat(2, 1, 1)], 1)
