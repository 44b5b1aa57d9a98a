"""From logits to the next token: llama.cpp's filters in its order, and a seeded draw.

The order: what a grammar or a budget allows, logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p,
XTC, temperature. `hybridkv.engine.filters` holds each; `hybridkv.engine.sampler_order` reads other orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridkv.engine import filters
from hybridkv.engine.filters import Tokens
from hybridkv.errors import UsageError
from hybridkv.kernels.threads import torch_on_one_thread
from hybridkv.options import SAMPLERS

FILTERS = ("top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""The filters behind the penalties, by llama.cpp's names and in its order."""

Histories = Sequence[Tokens] | npt.NDArray[np.int64]


class Steering(Protocol):
    """Decides which tokens may come next: a grammar, a thinking budget. State of one sequence."""

    def allowed(self) -> Tensor | None:
        """Return the ids of the tokens that may come next, int64, at least one; None for all."""
        ...

    def accept(self, token: int) -> None:
        """Take the token that came."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings for drawing tokens. The defaults are llama-cli's.

    Attributes
    ----------
    temp
        0 takes the most likely token that the filters leave.
    top_k
        Keep the k most likely tokens; 0 keeps all.
    top_p
        Keep the most likely tokens that together reach this probability; 1 keeps all.
    min_p
        Keep tokens of at least this share of the most likely one's probability; 0 keeps all.
    seed
        Of the draw; None takes a fresh one.
    typical_p
        Keep the tokens closest to the expected surprise that together reach this probability; 1 keeps all.
    top_n_sigma
        Keep tokens within so many standard deviations of the likeliest logit; 0 or less keeps all.
    repeat_penalty, presence_penalty, frequency_penalty
        What tokens cost that came before: a factor, once, and each time; 1, 0 and 0 cost nothing.
    repeat_last_n
        Newest tokens, prompt included, that these three look at; 0 for none, -1 for all.
    logit_bias
        `(token, what is added to its logit)`.
    dry_multiplier, dry_base, dry_allowed_length
        A token that prolongs a repetition of more than the allowed length costs `multiplier * base ** (length -
        allowed)`; a multiplier of 0 turns it off.
    dry_last_n
        Newest tokens that DRY looks at; 0 for none, -1 for all.
    dry_breakers
        Tokens that no repetition reaches across.
    xtc_probability, xtc_threshold
        How often all tokens above the threshold but the least likely of them are taken out.
    order
        Of the filters behind the penalties, and of the temperature.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: frozenset[int] = frozenset()
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    order: tuple[str, ...] = FILTERS

    def __post_init__(self) -> None:
        # Beyond these temperatures logits / temp leaves float32.
        if not (self.temp == 0 or 1e-3 <= self.temp <= 1e3):
            raise UsageError(f"--temp {self.temp}; allowed: 0 (greedy), or 0.001 to 1000")
        for option in SAMPLERS:
            value = getattr(self, option.name)
            if not option.allows(value):
                raise UsageError(f"{option.flags[0]} {value}; allowed: {option.allowed}")
        bad = next((bias for bias in self.logit_bias if not abs(bias[1]) <= 1e9), None)
        if bad is not None:
            raise UsageError(f"--logit-bias {bad[0]}:{bad[1]}; allowed: -1e9 to 1e9")

    def check_tokens(self, n_vocab: int) -> None:
        """Refuse a bias on a token that a model of so many does not have.

        Raises
        ------
        UsageError
            Naming the token.
        """
        bad = next((token for token, _ in self.logit_bias if not 0 <= token < n_vocab), None)
        if bad is not None:
            raise UsageError(f"logit_bias {bad}; allowed: 0 to {n_vocab - 1}")

    def for_sample(self, number: int) -> SamplingParams:
        """Derive the parameters of another sample of the same request: with a seed of its own, if there is one."""
        return self if self.seed is None or not number else replace(self, seed=(self.seed + number) % 2**63)

    @property
    def looks_back(self) -> bool:
        """True if the text so far makes a difference."""
        return bool(self._penalizes or self._dries)

    @property
    def moves_the_likeliest(self) -> bool:
        """True if a filter may change which token is the likeliest."""
        return bool(self.looks_back or self.logit_bias or self.typical_p < 1 or self._excludes)

    @property
    def _penalizes(self) -> bool:
        return self.repeat_last_n != 0 and (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )

    @property
    def _dries(self) -> bool:
        return self.dry_multiplier > 0 and self.dry_last_n != 0

    @property
    def _excludes(self) -> bool:
        return self.xtc_probability > 0 and self.xtc_threshold <= 0.5

    def adjust(self, logits: Tensor, history: Tokens) -> None:
        """Add to and take from logits `[V]` what the text so far asks for, in place."""
        for token, bias in self.logit_bias:
            logits[token] += bias
        if self._penalizes:
            filters.penalize(
                logits,
                _newest(history, self.repeat_last_n),
                repeat=self.repeat_penalty,
                presence=self.presence_penalty,
                frequency=self.frequency_penalty,
            )
        if self._dries:
            filters.dry(
                logits,
                _newest(history, self.dry_last_n),
                multiplier=self.dry_multiplier,
                base=self.dry_base,
                allowed=self.dry_allowed_length,
                breakers=self.dry_breakers,
            )


class Sampler:
    """Draws tokens. Holds the random generator's state; one per run.

    Parameters
    ----------
    params
        How tokens are drawn.
    steering
        What may be drawn at all; None for everything.

    Attributes
    ----------
    alike
        The parameters without their seed: logits of samplers that share them are filtered together.
    """

    def __init__(self, params: SamplingParams, steering: Steering | None = None) -> None:
        self.params, self.steering = params, steering
        self.alike = replace(params, seed=None)
        self._allowed: Tensor | None = None
        self._steered = False
        self._generator = torch.Generator()
        self.seed = self._generator.seed() if params.seed is None else params.seed
        self._generator.manual_seed(self.seed)

    def draw(self, logits: Tensor, histories: Histories = ()) -> Tensor:
        """Draw tokens, int64 `[B]`, from finite float32 logits `[B, V]`.

        Parameters
        ----------
        histories
            The tokens of each sequence so far, as lists or int64 arrays; needed only where `params.looks_back`.
        """
        drawn = draw_each([self] * len(logits), logits, histories)
        return torch.tensor(drawn)

    def steer(self) -> None:
        """Ask which tokens may come next. `adjusted` does so otherwise; apart, what goes wrong has one culprit."""
        self._allowed, self._steered = None if self.steering is None else self.steering.allowed(), True

    def adjusted(self, logits: Tensor, history: Tokens) -> Tensor | None:
        """Adjust logits `[V]` for this sequence alone; None where nothing changes."""
        p = self.params
        if not self._steered:
            self.steer()
        ids, self._steered = self._allowed, False
        if ids is None and not (p.looks_back or p.logit_bias):
            return None
        own = logits.float().clone()
        p.adjust(own, history)
        if ids is None:
            return own
        ids = ids.to(own.device)
        return torch.full_like(own, filters.OUT).index_copy_(0, ids, own[ids])

    def excludes(self) -> bool:
        """Draw whether XTC takes out the top choices this time; moves the generator on where XTC is on."""
        p = self.params
        return p._excludes and float(torch.rand(1, generator=self._generator)) <= p.xtc_probability

    def pick(self, probabilities: Tensor) -> int:
        """Pick a token from probabilities `[V]`; moves the generator on."""
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def accept(self, token: int) -> None:
        """Take note of the token that was drawn."""
        if self.steering is not None:
            self.steering.accept(token)


@torch_on_one_thread()
def draw_each(samplers: Sequence[Sampler], logits: Tensor, histories: Histories = ()) -> list[int]:
    """Draw one token per sampler from its line of finite float32 logits `[N, V]`, the same as each draws alone.

    Sequences of equal parameters are filtered together: a filter costs more in calls than in work.

    Parameters
    ----------
    histories
        The tokens of each sequence so far; needed only where a sampler's parameters look back.
    """
    own = [s.adjusted(logits[i], histories[i] if len(histories) else ()) for i, s in enumerate(samplers)]
    changed = [i for i, values in enumerate(own) if values is not None]
    if changed:
        logits = logits.float().clone()
        logits[changed] = torch.stack([values for values in own if values is not None])
    alike: dict[SamplingParams, list[int]] = {}
    for sequence, sampler in enumerate(samplers):
        alike.setdefault(sampler.alike, []).append(sequence)
    drawn = [0] * len(samplers)
    for params, sequences in alike.items():
        mine = logits if len(sequences) == len(samplers) else logits[sequences]
        tokens = _draw_alike([samplers[sequence] for sequence in sequences], params, mine)
        for sequence, token in zip(sequences, tokens, strict=True):
            drawn[sequence] = token
    for sampler, token in zip(samplers, drawn, strict=True):
        sampler.accept(token)
    return drawn


def _draw_alike(samplers: Sequence[Sampler], p: SamplingParams, logits: Tensor) -> list[int]:
    """Draw one token for each of several samplers of the same parameters."""
    if p.temp == 0 and not p.moves_the_likeliest:
        return _largest(logits)
    kept, ids = _kept(samplers, p, logits.float().cpu())
    if p.temp == 0:
        places = kept.argmax(-1).tolist()
    else:
        probabilities = torch.softmax(kept, -1)
        places = [sampler.pick(probabilities[i]) for i, sampler in enumerate(samplers)]
    return places if ids is None else [int(ids[i, place]) for i, place in enumerate(places)]


def _largest(logits: Tensor) -> list[int]:
    """Find each sequence's first largest value; NumPy finds it 13 times as fast as torch."""
    if logits.device.type != "cpu":
        return [int(token) for token in logits.argmax(-1).tolist()]
    return [int(token) for token in np.argmax(logits.float().numpy(), -1)]


def _kept(samplers: Sequence[Sampler], p: SamplingParams, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Filter logits `[B, N]`: set tokens that may not be drawn to -inf; also give the ids where N is less than all."""
    ids = None
    for name in p.order:
        if name == "top_n_sigma" and p.top_n_sigma > 0:
            logits = filters.top_n_sigma(logits, p.top_n_sigma)
        elif name == "top_k" and 0 < p.top_k < logits.shape[-1]:
            logits, ids = logits.topk(p.top_k)
        elif name == "typ_p" and p.typical_p < 1:
            logits = filters.typical(logits, p.typical_p)
        elif name == "top_p" and p.top_p < 1:
            logits = filters.top_p(logits, p.top_p)
        elif name == "min_p" and p.min_p > 0:
            logits = filters.min_p(logits, p.min_p)
        elif name == "xtc" and p._excludes:
            cut = [i for i, sampler in enumerate(samplers) if sampler.excludes()]
            if cut:
                logits = logits.clone()
                logits[cut] = filters.xtc(logits[cut], p.xtc_threshold)
        elif name == "temperature" and p.temp > 0:
            logits = logits / p.temp
    return logits, ids


def _newest(history: Tokens, n: int) -> Tokens:
    return history if n < 0 else history[max(0, len(history) - n) :]
