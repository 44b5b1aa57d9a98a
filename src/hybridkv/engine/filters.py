"""Filters of logits: penalties look back at the text so far, the others take unlikely tokens out.

Each is a function of its own, with llama.cpp's arithmetic (`src/llama-sampler.cpp`), top-p and min-p to the bit as
Transformers' warpers (`generation/logits_process.py`); `hybridkv.engine.sampling` calls
them in llama.cpp's order. A token that is taken out has logit -inf. Filters over `[B, N]` take logits in any order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = Sequence[int] | npt.NDArray[np.int64]

OUT = -math.inf
_MAX_EXPONENT = 88.7228391
"""ln of the largest float32: where llama.cpp cuts the exponent of a DRY penalty."""


def penalize(logits: Tensor, recent: Tokens, *, repeat: float, presence: float, frequency: float) -> None:
    """Lower the logits `[V]` of tokens in `recent`, in place: divided by `repeat`, less what their count costs."""
    if not len(recent):
        return
    seen, times = np.unique(np.asarray(recent), return_counts=True)
    tokens, counts = (torch.from_numpy(x).to(logits.device) for x in (seen, times))
    own = logits[tokens]
    own = torch.where(own <= 0, own * repeat, own / repeat)
    logits[tokens] = own - counts * frequency - presence


def dry(
    logits: Tensor, recent: Tokens, *, multiplier: float, base: float, allowed: int, breakers: Collection[int]
) -> None:
    """Lower the logits `[V]` of tokens that would prolong a repetition of the text's end, in place.

    A token costs `multiplier * base ** (length - allowed)` for the longest repetition that it prolongs; what lies
    before a breaker counts for none. Source: p-e-w's DRY, as llama.cpp has it.
    """
    text = np.asarray(recent)
    n = len(text)
    longest = next((back for back in range(n) if int(text[n - 1 - back]) in breakers), n) if breakers else n
    if n <= allowed or longest < allowed:
        return
    ends = np.flatnonzero(text[:-1] == text[-1])  # where an earlier copy of the last token stands
    lengths: dict[int, int] = {}
    length = 1
    while len(ends):
        if length >= allowed:
            lengths.update(dict.fromkeys(text[ends + 1].tolist(), length))
        if length == longest:
            break
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[n - 1 - length]]
        length += 1
    most = int(_MAX_EXPONENT / math.log(base)) if base > 1.000001 else n
    for token, repeated in lengths.items():
        if token not in breakers:
            logits[token] -= multiplier * base ** min(repeated - allowed, most)


def top_n_sigma(logits: Tensor, n: float) -> Tensor:
    """Keep tokens within `n` standard deviations of the likeliest one's logit."""
    there = torch.isfinite(logits)
    count = there.sum(-1, keepdim=True)
    mean = torch.where(there, logits, 0.0).sum(-1, keepdim=True) / count
    spread = (torch.where(there, (logits - mean) ** 2, 0.0).sum(-1, keepdim=True) / count).sqrt()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) - n * spread, OUT)


def typical(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens closest to the surprise that is expected, until they reach probability `p` together."""
    logprobs = torch.log_softmax(logits, -1)
    probabilities = logprobs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1, keepdim=True)
    order = (-logprobs - entropy).abs().argsort(dim=-1, stable=True)
    before = probabilities.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > p)
    return logits.masked_fill(out, OUT)


def xtc(logits: Tensor, threshold: float) -> Tensor:
    """Take out all tokens of at least this probability but the least likely of them: "exclude top choices"."""
    probabilities = logits.softmax(-1)
    above = probabilities >= threshold
    least = torch.where(above, probabilities, math.inf).argmin(-1, keepdim=True)
    out = above.scatter(-1, least, torch.zeros_like(least, dtype=torch.bool))
    return logits.masked_fill(out, OUT)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens that together reach probability p; one at least."""
    ascending, order = logits.sort()
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens of at least p of the most likely one's probability, which stays."""
    probabilities = logits.softmax(-1)
    removed = probabilities < p * probabilities.amax(-1, keepdim=True)
    removed.scatter_(-1, probabilities.argmax(-1, keepdim=True), False)
    return logits.masked_fill(removed, -torch.inf)
