"""Fields of a request that say how tokens are drawn, and the engine's parameters that they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field, WithJsonSchema, field_validator

from hybridkv.engine.sampling import SamplingParams
from hybridkv.server.base import Fragment, Strict
from hybridkv.text.breakers import DRY_BREAKERS

MAX_SEED = 2**63 - 1
MAX_BIASED = 1024
MIN_TEMPERATURE = 1e-3
"""Below, and not 0, logits / temperature leaves float32."""

_TEMPERATURE: Fragment = {
    "anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2}, {"type": "null"}]
}

_ID_PATTERN = r"^[0-9]{1,9}$"
_BIASES: Fragment = {
    "anyOf": [
        {
            "type": "object",
            "patternProperties": {_ID_PATTERN: {"type": "number", "minimum": -1e9, "maximum": 1e9}},
            "additionalProperties": False,
            "maxProperties": MAX_BIASED,
        },
        {"type": "null"},
    ]
}

BiasedId = Annotated[str, Field(pattern=_ID_PATTERN)]
Bias = Annotated[float, Field(ge=-1e9, le=1e9)]
Breaker = Annotated[str, Field(min_length=1, max_length=40)]


class SamplerFields(Strict):
    """How tokens are drawn: OpenAI's fields and defaults, and llama.cpp's samplers, which are off unless asked for."""

    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    temperature: Annotated[float | None, WithJsonSchema(_TEMPERATURE)] = Field(
        None, ge=0, le=2, description=f"0 (greedy), or {MIN_TEMPERATURE} to 2; default 1"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="default 1: keeps all")
    presence_penalty: float | None = Field(None, ge=-100, le=100, description="what a token costs that came before")
    frequency_penalty: float | None = Field(None, ge=-100, le=100, description="what it costs each time that it came")
    logit_bias: Annotated[dict[BiasedId, Bias] | None, WithJsonSchema(_BIASES)] = Field(
        None, max_length=MAX_BIASED, description="token id: what is added to its logit"
    )

    top_k: int | None = Field(None, ge=0, lt=2**31, description="not OpenAI's; default 0: keeps all")
    min_p: float | None = Field(None, ge=0, le=1, description="not OpenAI's; default 0: keeps all")
    typical_p: float | None = Field(None, gt=0, le=1, description="not OpenAI's; default 1: keeps all")
    top_n_sigma: float | None = Field(None, ge=-1, le=1000, description="not OpenAI's; default -1: keeps all")
    repeat_penalty: float | None = Field(None, gt=0, le=100, description="not OpenAI's; default 1: none")
    repeat_last_n: int | None = Field(
        None, ge=-1, lt=2**31, description="not OpenAI's; newest tokens that penalties look at; default 64, -1: all"
    )
    dry_multiplier: float | None = Field(None, ge=0, le=100, description="not OpenAI's; default 0: off")
    dry_base: float | None = Field(None, ge=1, le=100, description="not OpenAI's; default 1.75")
    dry_allowed_length: int | None = Field(None, ge=1, lt=2**31, description="not OpenAI's; default 2")
    dry_penalty_last_n: int | None = Field(None, ge=-1, lt=2**31, description="not OpenAI's; default -1: all")
    dry_sequence_breakers: list[Breaker] | None = Field(None, max_length=32, description="not OpenAI's")
    xtc_probability: float | None = Field(None, ge=0, le=1, description="not OpenAI's; default 0: off")
    xtc_threshold: float | None = Field(None, ge=0, le=1, description="not OpenAI's; default 0.1")

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"allowed: 0 (greedy), or {MIN_TEMPERATURE} to 2")
        return value

    def params(self, breakers: Callable[[Sequence[str]], frozenset[int]]) -> SamplingParams:
        """Convert to the engine's parameters.

        Parameters
        ----------
        breakers
            Makes token ids of DRY's sequence breakers; called only where DRY is on.
        """
        dries = bool(self.dry_multiplier)
        words = DRY_BREAKERS if self.dry_sequence_breakers is None else self.dry_sequence_breakers
        return SamplingParams(
            temp=_or(self.temperature, 1.0),
            top_k=self.top_k or 0,
            top_p=_or(self.top_p, 1.0),
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed % 2**63,
            typical_p=_or(self.typical_p, 1.0),
            top_n_sigma=_or(self.top_n_sigma, -1.0),
            repeat_penalty=_or(self.repeat_penalty, 1.0),
            repeat_last_n=64 if self.repeat_last_n is None else self.repeat_last_n,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            dry_multiplier=self.dry_multiplier or 0.0,
            dry_base=_or(self.dry_base, 1.75),
            dry_allowed_length=2 if self.dry_allowed_length is None else self.dry_allowed_length,
            dry_last_n=-1 if self.dry_penalty_last_n is None else self.dry_penalty_last_n,
            dry_breakers=breakers(words) if dries else frozenset(),
            xtc_probability=self.xtc_probability or 0.0,
            xtc_threshold=_or(self.xtc_threshold, 0.1),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
