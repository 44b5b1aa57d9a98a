"""The rules by which a block of floats becomes a scale and codes.

Owns the arithmetic: scale rules, rounding rules, and the refit of a scale to its codes. Codes are compared
bit for bit with ggml's C, so every operation has the operands, the order and the float32 roundings that it
has there. Knows nothing of bytes. Called by `hybridkv.formats.block`.

Shapes: blocks are float32 [N, lanes], scales and minima [N, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

ScaleRule = Literal["cast", "abs_max", "signed_max", "min_max"]
"""`cast` stores the value. The others take the scale from the largest magnitude, from the signed value of
largest magnitude (the first, if several), or from the range between minimum and maximum."""

Scale = Literal["absmax", "refit"]
"""`absmax` takes the scale from the extreme values alone, `refit` fits it to the codes by least squares."""

Rounding = Literal["away", "even", "up", "nearest"]
"""Halves go away from zero, to even, or up; `nearest` is the nearest entry of a codebook."""

Refit = Literal["pairs", "search", "starts", "line"]
"""`refit_pairs`, `refit_search`, `refit_starts` or `refit_line`."""


def extremes(x: Tensor, rule: ScaleRule) -> tuple[Tensor, Tensor | None]:
    """Find the extreme value of each block, and its minimum where the rule has one.

    A block with a NaN or an infinity has a non-finite extreme, which makes its scale, and so all that it
    decodes to, non-finite. ggml's C differs here: its comparisons skip NaN and it stores finite garbage.
    """
    if rule == "abs_max":
        return x.abs().amax(-1, keepdim=True), None
    if rule == "signed_max":
        return x.gather(-1, x.abs().argmax(-1, keepdim=True)), None
    assert rule == "min_max"
    low = x.amin(-1, keepdim=True)
    return x.amax(-1, keepdim=True) - low, low


def divide(x: Tensor, divisor: int) -> Tensor:
    """Divide with IEEE rounding: on CUDA, torch multiplies with the reciprocal of a Python number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def inverse(d: Tensor) -> Tensor:
    """Compute 1/d, or 0 where that is not finite: for d = 0, NaN, and a subnormal d, which float16 stores as 0."""
    inverse = 1 / d
    return inverse.where(inverse.isfinite(), 0.0)


def _away(y: Tensor, zero: int) -> Tensor:
    # C's roundf. The addend is the float below one half; one half would take the float below 0.5 to 1.
    return y.add_(torch.full_like(y, 0.49999997).copysign_(y)).trunc_().add_(zero)


def _even(y: Tensor, zero: int) -> Tensor:
    return y.round_().add_(zero)


def _up(y: Tensor, zero: int) -> Tensor:
    # One sum, as in C: (y + zero) + 0.5 would round twice.
    return y.add_(zero + 0.5).trunc_()


_ROUND: Final[Mapping[Rounding, Callable[[Tensor, int], Tensor]]] = {
    "away": _away,
    "even": _even,
    "up": _up,
}


def to_codes(y: Tensor, rounding: Rounding, zero: int, lowest: int, highest: int) -> Tensor:
    """Round scaled values to codes, uint8; two's complement if `lowest` is negative. Overwrites `y`.

    NaN becomes a code like any other: its block is known by its scale.
    """
    codes = _ROUND[rounding](y, zero).nan_to_num_(0.0).clamp_(lowest, highest)
    return codes.to(torch.int8).view(torch.uint8) if lowest < 0 else codes.to(torch.uint8)


def to_nearest(y: Tensor, codebook: Tensor) -> Tensor:
    """Find the nearest entry of a codebook (ascending, float32): its index, uint8; the upper of two equally near."""
    middles = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(y, middles, out_int32=True, right=True).to(torch.uint8)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute `a * b + c` in float32, rounded once.

    C compilers fuse `a*b + c` where the processor can, so the compiled reference sums with this rounding. The
    product is exact in float64, and the sum there is so close that rounding it to float32 goes astray about
    once in 2**29 times.
    """
    return torch.addcmul(c.double(), a.double(), b.double()).float()


def refit_pairs(x: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Fit the scale to given codes: `sum(w*q*x) / sum(w*q*q)` with w = (x/d)**2; `d` if not finite.

    The lanes are summed in order, the two halves of the block side by side: (0, 16), (1, 17), ...

    Parameters
    ----------
    x, q
        Values, and codes minus zero, float32 [N, lanes].
    d
        Scale that gave the codes [N, 1].

    Source: `quantize_row_q6_0_ref` in ik_llama.cpp's ggml-quants.c.
    """
    n_pairs = (x.shape[1] + 1) // 2
    if x.shape[1] % 2:
        x, q = (torch.nn.functional.pad(lanes, (0, 1)) for lanes in (x, q))
    x, q = x.T.contiguous(), q.T.contiguous()
    w = (x * inverse(d).T).square_()
    wx, wq = w * x, w * q
    terms_qx = fma(wx[:n_pairs], q[:n_pairs], wx[n_pairs:] * q[n_pairs:])
    terms_q2 = fma(wq[:n_pairs], q[:n_pairs], wq[n_pairs:] * q[n_pairs:])
    sumqx, sumq2 = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for term_qx, term_q2 in zip(terms_qx, terms_q2, strict=True):
        sumqx += term_qx
        sumq2 += term_q2
    fitted = sumqx / sumq2
    return torch.where(fitted.isfinite(), fitted, d[:, 0])[:, None]


def refit_search(x: Tensor, codes: Tensor, d: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the scale, then move codes, one by one, to a neighbour in the codebook while the fit improves.

    The fit is that of `refit_pairs` but with w = x*x and the lanes summed one by one. The code to move is the
    one for which the smallest step along the gradient of the weighted error reaches the neighbour.

    Parameters
    ----------
    x, codes
        Values, float32, and nearest codes, uint8 [N, lanes].
    d
        Scale that gave the codes [N, 1].
    codebook
        Ascending, float32.

    Returns
    -------
    tuple
        Codes and scale.

    Source: `quantize_row_iq4_nl_ref` in ik_llama.cpp's ggml-quants.c.
    """
    gaps, no_gap = codebook.diff(), codebook.new_full((1,), torch.inf)
    gap_up, gap_down = torch.cat([gaps, no_gap]), torch.cat([no_gap, gaps])

    x, codes = x.T.contiguous(), codes.T.to(torch.int32)
    w = x * x
    sumqx, sumq2 = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for x_j, w_j, code_j in zip(x, w, codes, strict=True):
        q_j = codebook[code_j]
        sumqx = fma(w_j * q_j, x_j, sumqx)
        sumq2 = fma(w_j * q_j, q_j, sumq2)
    fitted = sumqx / sumq2
    d = torch.where(fitted.isfinite(), fitted, d[:, 0])
    best = d * sumqx

    live = torch.arange(x.shape[1], device=x.device)  # blocks that still improve
    for _ in range(32 * x.shape[0]):
        if not live.numel():
            break
        xs, ws, old = x[:, live], w[:, live], codes[:, live]
        slope = (d[live] * ws) * fma(-d[live], codebook[old], xs)
        step, lane = (torch.where(slope > 0, gap_up[old], gap_down[old]) / slope.abs()).min(0)
        x_j, w_j, old_j, slope_j = (t.gather(0, lane[None])[0] for t in (xs, ws, old, slope))
        new_j = torch.where(slope_j > 0, old_j + 1, old_j - 1).clamp_(0, len(codebook) - 1)
        q_old, q_new = codebook[old_j], codebook[new_j]
        new_qx = fma(w_j * x_j, q_new - q_old, sumqx[live])
        new_q2 = fma(w_j, q_new * q_new - q_old * q_old, sumq2[live])
        better = (step < torch.inf) & (new_q2 > 0) & (new_qx * new_qx > best[live] * new_q2)

        live = live[better]
        codes[lane[better], live] = new_j[better]
        sumqx[live], sumq2[live] = new_qx[better], new_q2[better]
        d[live] = sumqx[live] / sumq2[live]
        best[live] = d[live] * sumqx[live]
    return codes.T.to(torch.uint8), d[:, None]


def fold(terms: Tensor) -> Tensor:
    """Sum of 32 lanes, the upper half onto the lower until one is left; [N, 32] to [N, 1].

    The order is that of vector registers. It also makes the sum over 16 lanes given twice exactly twice the sum
    over the 16, so that a padded block is fitted as if it had its own lanes alone.
    """
    while terms.shape[1] > 1:
        low, high = terms.chunk(2, dim=1)
        terms = low + high
    return terms


def refit_starts(x: Tensor, d: Tensor, codebook: Tensor, starts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Choose the fit with the least squared error among several: each takes the nearest codes, then the scale by least
    squares, `sum(q*x) / sum(q*q)`.

    What a fit explains of `sum(x*x)` is its scale times `sum(q*x)`; of equally good fits the first counts. Where
    none is a number, `d` stays, and so what is not finite shows.

    Parameters
    ----------
    x, d
        Values [N, 32], and the scale to keep where nothing fits [N, 1].
    codebook
        Ascending, its second half the negative of its first; float32.
    starts
        What the largest magnitude of a block is scaled to, in units of the codebook, one per fit.

    Returns
    -------
    tuple
        Codes, uint8, and scale.
    """
    half = codebook[len(codebook) // 2 :]
    size, largest = x.abs(), x.abs().amax(-1, keepdim=True)
    levels = torch.zeros_like(x, dtype=torch.uint8)
    best = torch.full_like(d, -1.0)
    for start in starts:
        scale = torch.full_like(largest, start) / largest  # a Python number would be multiplied by 1/largest
        tried = to_nearest(size * scale.where(scale.isfinite(), 0.0), half)
        q = half[tried.int()]
        explained = fold(size * q)
        fitted = explained / (q * q).sum(-1, keepdim=True)  # whole numbers below 2**24: exact in any order
        explained = fitted * explained
        better = explained > best
        best, d, levels = explained.where(better, best), fitted.where(better, d), tried.where(better, levels)
    return torch.where(x < 0, len(half) - 1 - levels, len(half) + levels), d


def refit_line(x: Tensor, q: Tensor, d: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Fit scale and minimum to given codes by least squares; `d` and `low` where all codes are the same.

    The sums are over `x - low`: they stay small where a block lies far from 0.

    Parameters
    ----------
    x, q
        Values and codes, float32 [N, 32].
    d, low
        Scale and minimum that gave the codes [N, 1].

    Returns
    -------
    tuple
        Scale and minimum.
    """
    n = torch.full_like(d, x.shape[1])
    above = x - low
    sum_q, sum_q2 = q.sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)  # whole numbers: exact in any order
    sum_x, sum_qx = fold(above), fold(q * above)
    slope = (n * sum_qx - sum_q * sum_x) / (n * sum_q2 - sum_q * sum_q)
    shift = (sum_x - slope * sum_q) / n
    fits = slope.isfinite() & shift.isfinite()
    return slope.where(fits, d), (low + shift).where(fits, low)
