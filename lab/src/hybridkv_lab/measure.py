"""The difference of two runs over the same tokens: values per token, and their summary.

Arithmetic only: logits in, numbers out. The measures are those of `llama-perplexity --kl-divergence`; a standard error
counts tokens as independent, as it does there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

HISTOGRAM_EDGES = tuple(range(-9, 2))
"""Decades of the divergence, log10; the first also counts what lies below."""

N_BUCKETS = 32
"""Parts of the context by which the divergence is followed."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One number per token: what the candidate says of the next token, beside what the reference says.

    Attributes
    ----------
    position
        Tokens before it in its window.
    nll, reference_nll
        Minus the log probability of the token that follows, in nats.
    kld
        Divergence of the candidate's distribution from the reference's, in nats; NaN where logits are not finite.
    same_top
        1 where both find the same token likeliest.
    delta_p
        Probability of the token that follows, less the reference's.
    """

    position: Floats
    nll: Floats
    reference_nll: Floats
    kld: Floats
    same_top: Floats
    delta_p: Floats

    @property
    def n(self) -> int:
        """Tokens."""
        return len(self.nll)


def join(traces: list[Trace]) -> Trace:
    """Join traces one after the other."""
    return Trace(*(np.concatenate([getattr(t, f.name) for t in traces]) for f in fields(Trace)))


class Expected:
    """The reference's answers for some tokens, prepared once for all that are compared with it.

    Parameters
    ----------
    logits
        The reference's, float32 `[T, V]`.
    following
        int64 `[T]`: the token after each.
    position
        Of the first token in its window.
    """

    @torch.inference_mode()
    def __init__(self, logits: Tensor, following: Tensor, position: int) -> None:
        self._log_p = logits.double().log_softmax(-1)
        self._p = self._log_p.exp()
        self._index = following.unsqueeze(1)
        self._top = logits.argmax(-1)
        self._position = torch.arange(position, position + len(following))

    @torch.inference_mode()
    def compare(self, logits: Tensor) -> Trace:
        """Measure the differences of a candidate's logits, float32 `[T, V]`."""
        log_q = logits.double().log_softmax(-1)
        p, q = (x.gather(1, self._index).squeeze(1) for x in (self._log_p, log_q))
        # A token of no probability adds nothing, whatever the candidate says of it: 0 * inf would be NaN.
        terms = torch.sub(self._log_p, log_q, out=log_q).mul_(self._p).masked_fill_(self._p == 0, 0.0)
        kld = terms.sum(-1).clamp_min(0.0)
        same = self._top == logits.argmax(-1)
        return Trace(*(x.float().numpy() for x in (self._position, -q, -p, kld, same, q.exp() - p.exp())))


def compare(reference: Tensor, candidate: Tensor, following: Tensor, position: int) -> Trace:
    """Compare logits, float32 `[T, V]`, after tokens that stand at `position` and on.

    Parameters
    ----------
    following
        int64 `[T]`: the token after each.
    """
    return Expected(reference, following, position).compare(candidate)


@dataclass(frozen=True, slots=True)
class Summary:
    """A trace in figures. Divergences are in nats; tokens whose logits are not finite are counted and left out."""

    n_tokens: int
    n_non_finite: int
    perplexity: float
    perplexity_se: float
    ratio: float
    ratio_se: float
    kld_mean: float
    kld_mean_se: float
    kld_median: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: float
    rms_delta_p: float


def summarize(trace: Trace) -> Summary:
    """Summarize a trace in figures."""
    finite = np.isfinite(trace.kld) & np.isfinite(trace.nll)
    nll, base = trace.nll[finite].astype(np.float64), trace.reference_nll[finite].astype(np.float64)
    kld = trace.kld[finite].astype(np.float64)
    if not len(kld):
        nothing = [math.nan] * (len(fields(Summary)) - 2)
        return Summary(trace.n, int((~finite).sum()), *nothing)
    median, p95, p99, p999 = np.quantile(kld, (0.5, 0.95, 0.99, 0.999))
    perplexity, ratio = math.exp(nll.mean()), math.exp((nll - base).mean())
    return Summary(
        n_tokens=trace.n,
        n_non_finite=int((~finite).sum()),
        perplexity=perplexity,
        perplexity_se=perplexity * _standard_error(nll),
        ratio=ratio,
        ratio_se=ratio * _standard_error(nll - base),
        kld_mean=float(kld.mean()),
        kld_mean_se=_standard_error(kld),
        kld_median=float(median),
        kld_p95=float(p95),
        kld_p99=float(p99),
        kld_p999=float(p999),
        kld_max=float(kld.max()),
        same_top=float(trace.same_top[finite].mean()),
        rms_delta_p=float(np.sqrt(np.square(trace.delta_p[finite].astype(np.float64)).mean())),
    )


def by_position(trace: Trace, n_ctx: int) -> tuple[tuple[int, float, int], ...]:
    """Average the divergence along the context: first position of a bucket, mean, tokens in it."""
    width = max(1, -(-n_ctx // N_BUCKETS))
    finite = np.isfinite(trace.kld)
    buckets = (trace.position[finite] // width).astype(int)
    kld = trace.kld[finite].astype(np.float64)
    return tuple(
        (int(b * width), float(kld[buckets == b].mean()), int((buckets == b).sum())) for b in np.unique(buckets)
    )


def histogram(trace: Trace) -> tuple[tuple[float, int], ...]:
    """Count tokens by the decade of their divergence: lower edge, log10, and count."""
    kld = trace.kld[np.isfinite(trace.kld)]
    with np.errstate(divide="ignore"):
        decade = np.clip(np.floor(np.log10(kld)), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return tuple((float(edge), int((decade == edge).sum())) for edge in HISTOGRAM_EDGES)


def worst(trace: Trace, n: int = 5) -> list[tuple[int, float]]:
    """Find the tokens that differ most: index into the trace and divergence; what is not finite comes first."""
    kld = np.where(np.isfinite(trace.kld), trace.kld, np.inf)
    return [(int(i), float(trace.kld[i])) for i in np.argsort(-kld, kind="stable")[:n]]


def _standard_error(x: NDArray[np.float64]) -> float:
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
