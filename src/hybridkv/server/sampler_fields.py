"""Fields of a request that say how tokens are drawn, and the engine's parameters that they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, WithJsonSchema, create_model, field_validator

from hybridkv.engine.sampling import SamplingParams
from hybridkv.options import SAMPLERS, SamplerOption
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


def _field(option: SamplerOption) -> Any:
    """Describe an option as a field that may be left out or null."""
    least = option.least if option.for_requests is None else option.for_requests
    bounds: dict[str, Any] = {"gt" if option.open_below else "ge": least}
    bounds |= {"lt": 2**31} if option.most is None else {"le": option.most}
    return (option.kind | None, Field(None, description=option.request, **bounds))


if TYPE_CHECKING:

    class _Filters(Strict):
        dry_multiplier: float | None

else:
    _Filters = create_model("_Filters", __base__=Strict, **{option.in_requests: _field(option) for option in SAMPLERS})


class SamplerFields(_Filters):
    """Settings for drawing tokens: OpenAI's fields and defaults, and llama.cpp's samplers, off unless asked for."""

    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    temperature: Annotated[float | None, WithJsonSchema(_TEMPERATURE)] = Field(
        None, ge=0, le=2, description=f"0 (greedy), or {MIN_TEMPERATURE} to 2; default 1"
    )
    logit_bias: Annotated[dict[BiasedId, Bias] | None, WithJsonSchema(_BIASES)] = Field(
        None, max_length=MAX_BIASED, description="token id: what is added to its logit"
    )

    dry_sequence_breakers: list[Breaker] | None = Field(None, max_length=32, description="not OpenAI's")

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
        words = DRY_BREAKERS if self.dry_sequence_breakers is None else self.dry_sequence_breakers
        filters = {option.name: _value(getattr(self, option.in_requests), option) for option in SAMPLERS}
        return SamplingParams(
            temp=1.0 if self.temperature is None else float(self.temperature),
            seed=None if self.seed is None else self.seed % 2**63,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            dry_breakers=breakers(words) if self.dry_multiplier else frozenset(),
            **filters,
        )


def _value(given: float | None, option: SamplerOption) -> Any:
    return option.kind(option.default_in_requests if given is None else given)
