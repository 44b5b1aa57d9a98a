"""Experts for few tokens: a router's choice and the chosen experts' products, as three Triton kernels.

For each token every chosen expert's matrices are read once, with 16-byte loads, and multiplied as the vectors that they
meet are few. The expert that is shared by all tokens is one more of the chosen. Nothing is gathered, sorted or added
in memory: a program owns its outputs and adds up what all experts give to them, so results do not depend on who comes
first. Arithmetic is float32.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridkv.kernels.cuda.overlap import begin, overlapping

UP_INPUTS, UP_OUTPUTS = 1024, 4
"""Elements of a matrix row that a program of `_up` takes at a time, and rows of an up and a gate matrix that it owns:
few of these, so that one token's experts keep a whole card busy. As with `DOWN_INPUTS`, the fastest of those tried."""

DOWN_INPUTS = 256
"""Elements that a program of `_down`, one warp, takes at a time of all chosen experts' rows that give a number."""


@triton.jit
def _route(logits, bias, index, weights, row_stride, bias_stride, n_experts, eps, scale, TOP: tl.constexpr,
           NORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
           OVERLAPS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    experts, slots = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    there = experts < n_experts
    own = logits + row * row_stride
    begin(OVERLAPS)
    score = tl.load(own + experts, mask=there, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        share = tl.sigmoid(score)
    else:
        share = tl.exp(score - tl.max(score, 0))
    total = tl.sum(share, 0)
    left = share
    if BIAS:
        left += tl.load(bias + row * bias_stride + experts, mask=there, other=0.0)
    # Scores that are not finite choose the first experts, which are there, and give them weights that are NaN.
    left = tl.where(there, tl.where(left == left, left, 0.0), -float("inf"))
    chosen = tl.zeros((SLOTS,), tl.int32)
    weight = tl.zeros((SLOTS,), tl.float32)
    for slot in range(TOP):
        best = tl.argmax(left, 0)
        chosen = tl.where(slots == slot, best, chosen)
        weight = tl.where(slots == slot, tl.sum(tl.where(experts == best, share, 0.0), 0), weight)
        left = tl.where(experts == best, -float("inf"), left)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + eps)
    elif not SIGMOID:
        weight = weight / total
    weight = weight * scale + (total - total)
    if SHARED == "weighed":
        weight = tl.where(slots == TOP, tl.sigmoid(tl.load(own + n_experts).to(tl.float32)), weight)
    else:
        weight = tl.where(slots == TOP, 1.0 if SHARED == "always" else 0.0, weight)
    tl.store(index + row * TOP + slots, chosen, mask=slots < TOP)
    tl.store(weights + row * (TOP + 1) + slots, weight, mask=slots <= TOP)


def route(
    logits: Tensor,
    top_k: int,
    *,
    normalize: bool,
    gating: Literal["softmax", "sigmoid"] = "softmax",
    bias: Tensor | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    shared: Literal["weighed", "always", "none"] = "weighed",
) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by their shares, the best first, of equals the lower.

    Parameters
    ----------
    logits
        Any float dtype, `[N, experts]`, the last dim contiguous, and one column more for the gate of a shared expert
        that is `weighed`.
    top_k
        Experts per token.
    normalize
        Whether the weights of the chosen are made to sum to 1, but for `eps`.
    gating
        What makes shares of scores: the softmax of all, or each one's sigmoid.
    bias
        float32 `[experts]`, or `[N, experts]`: added to shares for the choice alone.
    scale
        Factor on the weights of the chosen.
    shared
        Whether an expert that all tokens share has the sigmoid of its gate as its weight, or 1, or is none.

    Returns
    -------
    tuple of Tensor
        int32 `[N, top_k]`, and float32 `[N, top_k + 1]`: the weights, that of the shared expert last.
    """
    n_rows, n_experts = logits.shape[0], logits.shape[1] - (shared == "weighed")
    index = torch.empty((n_rows, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((n_rows, top_k + 1), dtype=torch.float32, device=logits.device)
    _route[(n_rows,)](
        logits, logits if bias is None else bias, index, weights, logits.stride(0),
        0 if bias is None or bias.dim() == 1 else bias.stride(0), n_experts, eps, scale, TOP=top_k,
        NORMALIZE=normalize, SIGMOID=gating == "sigmoid", BIAS=bias is not None, SHARED=shared,
        BLOCK=triton.next_power_of_2(n_experts), SLOTS=triton.next_power_of_2(top_k + 1), num_warps=1,
        **overlapping(logits.device),
    )  # fmt: skip
    return index, weights


def bias_of_groups(logits: Tensor, bias: Tensor, n_groups: int, n_used: int) -> Tensor:
    """Return what `route` adds to sigmoids, `[N, experts]`: experts outside of the best groups are out of the question.

    A group is as good as its two best experts together.
    """
    grouped = torch.unflatten(torch.sigmoid(logits.float()) + bias, 1, (n_groups, -1))
    best = grouped.topk(2, 2).values.sum(2).topk(n_used, 1).indices
    used = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, 1)
    return torch.where(used.unsqueeze(2), bias.view(n_groups, -1), -torch.inf).flatten(1)


@triton.jit
def _up(x, index, each, shared, out, x_row, hidden, width, shared_width, most,
        TOP: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    row, slot = (tl.program_id(1) // (TOP + 1)).to(tl.int64), tl.program_id(1) % (TOP + 1)
    own = tl.where(slot < TOP, width, shared_width)
    matrix = shared
    begin(OVERLAPS)
    if slot < TOP:
        matrix = each + tl.load(index + row * TOP + slot).to(tl.int64) * 2 * width * hidden
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    gates = matrix + outs[:, None].to(tl.int64) * hidden
    ups = gates + own.to(tl.int64) * hidden
    everywhere = tl.zeros((OUT, 1), tl.int32)
    gate = tl.zeros((OUT, IN), tl.float32)
    up = tl.zeros((OUT, IN), tl.float32)
    for start in range(0, hidden, IN):
        cols = start + tl.arange(0, IN)
        inside = (outs < own)[:, None] & (cols < hidden)[None, :]
        # Each matrix row's threads read the vector for themselves: handing it round would take two barriers.
        value = tl.load(x + row * x_row + cols[None, :] + everywhere, mask=inside, other=0.0).to(tl.float32)
        gate += value * tl.load(gates + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        up += value * tl.load(ups + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(gate, 1)
    total = total * tl.sigmoid(total) * tl.sum(up, 1)
    at = out + (row * (TOP + 1) + slot) * most + outs
    tl.store(at, total.to(out.dtype.element_ty), mask=outs < own)


@triton.jit
def _down(x, index, weights, each, shared, out, hidden, width, shared_width, most,
          TOP: tl.constexpr, SLOTS: tl.constexpr, IN: tl.constexpr, OVERLAPS: tl.constexpr):  # fmt: skip
    row, output = tl.program_id(1).to(tl.int64), tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    slots = slot[:, None]
    begin(OVERLAPS)
    # All chosen experts' rows at once: one after the other each would wait for its own number and then for its row.
    expert = tl.load(index + row * TOP + slots, mask=slots < TOP, other=0).to(tl.int64)
    weight = tl.load(weights + row * (TOP + 1) + slot, mask=slot < TOP, other=0.0)
    values = x + row * (TOP + 1) * most
    total = tl.zeros((SLOTS, IN), tl.float32)
    for start in range(0, width, IN):
        cols = start + tl.arange(0, IN)[None, :]
        inside = (slots < TOP) & (cols < width)
        value = tl.load(values + slots * most + cols, mask=inside, other=0.0).to(tl.float32)
        at = each + (expert * hidden + output) * width + cols
        total += value * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    own = tl.zeros((IN,), tl.float32)
    for start in range(0, shared_width, IN):
        cols = start + tl.arange(0, IN)
        inside = cols < shared_width
        value = tl.load(values + TOP * most + cols, mask=inside, other=0.0).to(tl.float32)
        at = shared + output.to(tl.int64) * shared_width + cols
        own += value * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    result = tl.sum(weight * tl.sum(total, 1), 0) + tl.load(weights + row * (TOP + 1) + TOP) * tl.sum(own, 0)
    tl.store(out + row * hidden + output, result.to(out.dtype.element_ty))


def run_experts(x: Tensor, chosen: tuple[Tensor, Tensor], each: tuple[Tensor, Tensor],
                shared: tuple[Tensor, Tensor]) -> Tensor:  # fmt: skip
    """Sum the weighted answers of SwiGLU experts.

    Parameters
    ----------
    x
        Any float dtype, `[N, hidden]`, the last dim contiguous.
    chosen
        What `route` gives.
    each
        The experts' matrices in x's dtype, contiguous: gate and up `[experts, 2 * width, hidden]`, and down
        `[experts, hidden, width]`.
    shared
        Those of the shared expert: `[2 * width, hidden]` and `[hidden, width]`, with a width of its own.

    Returns
    -------
    Tensor
        In x's dtype, `[N, hidden]`, contiguous.
    """
    assert all(matrix.is_contiguous() for matrix in (*each, *shared))
    index, weights = chosen
    (n_rows, hidden), top_k = x.shape, index.shape[1]
    width, shared_width = each[1].shape[2], shared[1].shape[1]
    most = max(width, shared_width)
    between = torch.empty((n_rows, top_k + 1, most), dtype=x.dtype, device=x.device)
    _up[(triton.cdiv(most, UP_OUTPUTS), n_rows * (top_k + 1))](
        x, index, each[0], shared[0], between, x.stride(0), hidden, width, shared_width, most,
        TOP=top_k, OUT=UP_OUTPUTS, IN=min(UP_INPUTS, triton.next_power_of_2(hidden)),
        **overlapping(x.device),
    )  # fmt: skip
    out = torch.empty((n_rows, hidden), dtype=x.dtype, device=x.device)
    _down[(hidden, n_rows)](
        between, index, weights, each[1], shared[1], out, hidden, width, shared_width, most,
        TOP=top_k, SLOTS=triton.next_power_of_2(top_k), IN=min(DOWN_INPUTS, triton.next_power_of_2(most)),
        num_warps=1, **overlapping(x.device),
    )  # fmt: skip
    return out
