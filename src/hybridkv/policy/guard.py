"""The guard: numbers in, verdict out. Arithmetic only; `hybridkv.hf` measures, the engine acts.

Three opinions exist on 4-bit caches under recurrent layers, and each is a mode: `upgrade` (a rule raises them
to q8_0), `warn` (a rule warns), `check` (evidence decides, layer by layer). `strict` turns a fallback into an
error, `off` measures nothing. Numbers that are not finite lead to a rebuild at the next rung of the ladder;
under `strict` and `off` they end the run, for no mode hands them to the sampler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.errors import GuardError, one_of
from hybridkv.formats import get_format

GuardMode = Literal["check", "upgrade", "warn", "strict", "off"]
GUARD_MODES: tuple[GuardMode, ...] = get_args(GuardMode)

LADDER = ("q6_0", "q8_0", "f16")
"""Where a layer goes when its type does not hold, in order."""

ERROR_LIMIT = 0.25
"""Largest relative RMSE of a layer's attention output that `check` accepts; docs/decisions/guard-limit.md."""

_RULE_BITS = 8.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured on a KV layer: its attention output against float attention on the same activations.

    Attributes
    ----------
    layer
        Model layer.
    types
        The types it was stored at.
    error
        Relative RMSE; NaN or infinite if the quantized output was not finite.
    """

    layer: int
    types: KVTypes
    error: float


@dataclass(frozen=True, slots=True)
class Ok:
    """The types hold."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Store the layer at `types` instead."""

    types: KVTypes
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing on the ladder helps, or the mode forbids it."""

    reason: str


Verdict = Ok | Fallback | Stop


def next_types(types: KVTypes) -> KVTypes | None:
    """`types` at the next rung of the ladder, K and V raised to at least that rung; None past its end."""
    for rung in LADDER:
        if _bits(rung) > min(_bits(types.type_k), _bits(types.type_v)):
            return _raised(types, to=rung, below=_bits(rung))
    return None


def parse_mode(name: str) -> GuardMode:
    """The mode of that name.

    Raises
    ------
    UsageError
        Listing the modes.
    """
    return one_of(name, GUARD_MODES, "unknown guard mode", hint="try check")


@dataclass(frozen=True, slots=True)
class Guard:
    """A mode and a limit.

    Attributes
    ----------
    mode
        What may be done on evidence.
    limit
        Largest relative RMSE of a layer's attention output.
    """

    mode: GuardMode = "check"
    limit: float = ERROR_LIMIT

    @property
    def measures(self) -> bool:
        """Whether the first prompt's attention is compared with float attention."""
        return self.mode in ("check", "strict")

    @property
    def watches(self) -> bool:
        """Whether outputs and logits are watched for numbers that are not finite."""
        return self.mode != "off"

    def judge(self, evidence: Evidence) -> Verdict:
        """What to do with a layer after it was measured."""
        if math.isfinite(evidence.error) and evidence.error <= self.limit:
            return Ok()
        measured = f"error {evidence.error:.3g}" if math.isfinite(evidence.error) else "output not finite"
        reason = f"layer {evidence.layer}: {evidence.types.label}, {measured}, limit {self.limit:g}"
        raised = next_types(evidence.types)
        if self.mode == "strict" or raised is None:
            return Stop(reason)
        return Fallback(raised, reason)

    def before(self, specs: tuple[KVSpec, ...], *, hybrid: bool, n_ctx: int) -> tuple[tuple[KVSpec, ...], list[str]]:
        """Apply the rules of `upgrade` and `warn` before anything is loaded.

        Returns
        -------
        tuple
            The specs to use and the warnings to print. They name layers and bytes at `n_ctx` tokens.
        """
        low = [s for s in specs if min(_bits(s.types.type_k), _bits(s.types.type_v)) < _RULE_BITS]
        if not hybrid or not low or self.mode not in ("upgrade", "warn"):
            return specs, []
        layers = ", ".join(str(s.facts.layer) for s in low)
        labels = ", ".join(sorted({s.types.label for s in low}))
        raised = tuple(replace(s, types=_raised(s.types, to="q8_0", below=_RULE_BITS)) for s in specs)
        added = sum(r.bytes_at(n_ctx) - s.bytes_at(n_ctx) for r, s in zip(raised, specs, strict=True))
        cost = f"{added / 2**20:.1f} MiB at {n_ctx} tokens"
        if self.mode == "upgrade":
            return raised, [f"KV layers {layers} upgraded from {labels} to q8_0 on this hybrid model: +{cost}"]
        return specs, [
            f"KV layers {layers} stay at {labels}, under 8 bits, on this hybrid model; q8_0 would cost +{cost}"
        ]


def _bits(type_name: str) -> float:
    """Bits per value at an ordinary head dim, to compare types by."""
    return get_format(type_name).bits_per_value(256)


def _raised(types: KVTypes, *, to: str, below: float) -> KVTypes:
    """`types` with what has fewer than `below` bits raised to the type `to`."""
    k, v = (to if _bits(name) < below else name for name in (types.type_k, types.type_v))
    return replace(types, type_k=k, type_v=v)


class NonFiniteError(GuardError):
    """Numbers that are not finite, caught where they arose.

    Parameters
    ----------
    layer
        Model layer whose attention output it was, or None for the logits.
    label
        How the layer is stored.
    kernel
        Which kernel computed it.
    n_tokens
        Tokens in the cache at that moment.
    source
        `cache` if what went into the layer was finite, `input` if it was not.
    """

    def __init__(
        self, *, layer: int | None, label: str, kernel: str, n_tokens: int, source: Literal["cache", "input"]
    ) -> None:
        what = "the logits are" if layer is None else f"the attention output of layer {layer} is"
        upstream = "" if source == "cache" else ", and so was what went into it"
        super().__init__(
            f"{what} not finite at token {n_tokens} (KV {label}, kernel {kernel}){upstream}",
            hint="use larger types, for example -ctk f16 -ctv f16, or --kv-guard check",
        )
        self.layer = layer
        self.kernel = kernel
        self.n_tokens = n_tokens
        self.source = source
