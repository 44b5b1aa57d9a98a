"""The guard: measurements in, verdict out. Arithmetic only; `hybridkv.runtime` measures, the engine acts.

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
"""Relative RMSE of a layer's attention output that a model bears, whatever its types; docs/decisions/guard-limit.md."""

STEP_ERROR = 1.35
"""What K or V alone adds to that error on ordinary rows, in units of 2^-w for codes of w bits."""

HEADROOM = 2.0
"""How many times what its types promise a layer's error may be."""

STORE_LIMIT = 0.005
"""How much more a stored row may err than the type's own encoding of it, relative to the row."""

KERNEL_LIMIT = 0.01
"""Largest relative error of a query's attention against float attention over the rows as they are stored."""

_RULE_BITS = 8.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measurements on a KV layer: its attention output against float attention on the same activations.

    Attributes
    ----------
    layer
        Model layer.
    types
        The types it was stored at.
    error
        Relative RMSE against attention over the activations before they were stored; NaN or infinite if the quantized
        output was not finite. Says whether the types suit the layer.
    store_error
        How much more the worst sampled row errs than the same row encoded again by other code, relative to the row.
    kernel_error
        Relative error of the worst sampled query against float attention over the rows as they are stored. This and
        `store_error` say whether the code does what the types mean; both are near 0 if it does, at any number of bits.
    """

    layer: int
    types: KVTypes
    error: float
    store_error: float = 0.0
    kernel_error: float = 0.0


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
    """Raise `types` to the next rung of the ladder, K and V to at least that rung; None past its end."""
    for rung in LADDER:
        if _bits(rung) > min(_bits(types.type_k), _bits(types.type_v)):
            return _raised(types, to=rung, below=_bits(rung))
    return None


def parse_mode(name: str) -> GuardMode:
    """Parse the name of a guard mode.

    Raises
    ------
    UsageError
        Listing the modes.
    """
    return one_of(name, GUARD_MODES, "unknown guard mode", hint="try check")


def promised_error(types: KVTypes) -> float:
    """Estimate the relative RMSE of the attention output that these types have on ordinary rows."""
    widths = (get_format(name).code_bits for name in (types.type_k, types.type_v) if get_format(name).is_quantized)
    return math.hypot(*(STEP_ERROR * 2.0**-width for width in widths))


@dataclass(frozen=True, slots=True)
class Guard:
    """A mode and a limit.

    Attributes
    ----------
    mode
        What may be done on evidence.
    limit
        Largest relative RMSE of a layer's attention output; None for what its types promise, see `limit_for`.
    """

    mode: GuardMode = "check"
    limit: float | None = None

    @property
    def measures(self) -> bool:
        """True if the first prompt's attention is compared with float attention."""
        return self.mode in ("check", "strict")

    @property
    def watches(self) -> bool:
        """True if outputs and logits are watched for non-finite values."""
        return self.mode != "off"

    def limit_for(self, types: KVTypes) -> float:
        """Return the largest relative RMSE that a layer of these types may have in its attention output.

        What a model bears or, for types of few bits, what they promise with headroom: who asks for 2 bits gets them
        where they measure as 2 bits do.
        """
        return max(ERROR_LIMIT, HEADROOM * promised_error(types)) if self.limit is None else self.limit

    def judge(self, evidence: Evidence) -> Verdict:
        """Decide what to do with a layer after it was measured."""
        found = self._complaint(evidence)
        if found is None:
            return Ok()
        reason = f"layer {evidence.layer}: {evidence.types.label}, {found}"
        raised = next_types(evidence.types)
        if self.mode == "strict" or raised is None:
            return Stop(reason)
        return Fallback(raised, reason)

    def _complaint(self, evidence: Evidence) -> str | None:
        """Describe what does not hold, with the measured error and its limit."""
        limit = self.limit_for(evidence.types)
        if not math.isfinite(evidence.error):
            return f"output not finite, limit {limit:g}"
        if not evidence.store_error <= STORE_LIMIT:
            return f"stored rows err {evidence.store_error:.3g} more than these types do, limit {STORE_LIMIT:g}"
        if not evidence.kernel_error <= KERNEL_LIMIT:
            return f"attention over the stored rows is off by {evidence.kernel_error:.3g}, limit {KERNEL_LIMIT:g}"
        return None if evidence.error <= limit else f"error {evidence.error:.3g}, limit {limit:.3g}"

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
    """Count bits per value at an ordinary head dim, to compare types by."""
    return get_format(type_name).bits_per_value(256)


def _raised(types: KVTypes, *, to: str, below: float) -> KVTypes:
    """Raise the sides of `types` that have fewer than `below` bits to the type `to`."""
    k, v = (to if _bits(name) < below else name for name in (types.type_k, types.type_v))
    return replace(types, type_k=k, type_v=v)


class MismatchError(GuardError):
    """A call after the first prompt whose rows or attention are not what the layer's types mean.

    Rows that were stored before it cannot be stored again from here, but from the token history.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the guard stopped at {reason}", hint="use a larger type; `hybridkv doctor` prints the kernels"
        )


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
