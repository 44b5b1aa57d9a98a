"""The order in which filters take tokens out, by llama.cpp's names: `--samplers` and `--sampler-seq`.

A filter that an order leaves out is off. What looks back at the text, penalties and DRY, comes before the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybridkv.engine.sampling import FILTERS, SamplingParams
from hybridkv.errors import UsageError

_LOOK_BACK = ("penalties", "dry")
NAMES = (*_LOOK_BACK, *FILTERS)
"""All of them, in llama.cpp's own order."""

_LETTERS = dict(zip("edskypmxt", NAMES, strict=True))
_OTHERS = {
    "top_nsigma": "top_n_sigma",
    "nucleus": "top_p",
    "typ": "typ_p",
    "typical": "typ_p",
    "typical_p": "typ_p",
    "temp": "temperature",
}
_OFF: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "top_n_sigma": {"top_n_sigma": -1.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temp": 1.0},
}


def order_from(names: str | None, letters: str | None) -> tuple[str, ...] | None:
    """Read `--samplers top_k;temperature` or `--sampler-seq kt`; None for neither.

    Raises
    ------
    UsageError
        For a name or a letter that is none.
    """
    if names is not None and letters is not None:
        raise UsageError("--samplers and --sampler-seq were given together", hint="one of them will do")
    if letters is not None:
        bad = next((letter for letter in letters if letter not in _LETTERS), None)
        if bad is not None:
            allowed = ", ".join(f"{letter} ({name})" for letter, name in _LETTERS.items())
            raise UsageError(f"--sampler-seq {letters!r}: {bad!r}; allowed: {allowed}", hint="try --sampler-seq kpmt")
        return tuple(dict.fromkeys(_LETTERS[letter] for letter in letters))
    if names is None:
        return None
    found = []
    for word in names.replace(",", ";").split(";"):
        name = word.strip().lower().replace("-", "_")
        name = _OTHERS.get(name, name)
        if name and name not in NAMES:
            raise UsageError(
                f"--samplers: {word.strip()!r}; allowed: {', '.join(NAMES)}",
                hint="try --samplers 'top_k;top_p;min_p;temperature'",
            )
        found += [name] * bool(name)
    return tuple(dict.fromkeys(found))


def in_order(params: SamplingParams, order: Sequence[str] | None) -> SamplingParams:
    """Put filters in an order; those that are not in it are off.

    Raises
    ------
    UsageError
        For penalties or DRY behind a filter that is on.
    """
    if order is None:
        return params
    off: dict[str, Any] = {}
    for name in NAMES:
        off |= {} if name in order else _OFF[name]
    params = replace(params, **off, order=tuple(name for name in order if name in FILTERS))
    seen: list[str] = []
    for name in order:
        if name in _LOOK_BACK and _is_on(params, name) and seen:
            raise UsageError(
                f"--samplers: {name} behind {seen[-1]}; allowed: penalties and dry before the others",
                hint=f"put {name} first, or switch it off",
            )
        seen += [name] * (name in FILTERS and _is_on(params, name))
    return params


def _is_on(params: SamplingParams, name: str) -> bool:
    return any(getattr(params, field) != value for field, value in _OFF[name].items())
