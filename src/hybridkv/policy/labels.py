"""Types of the KV cache as one word, written and read back.

A label is `TYPE` or `TYPE/TYPE`, followed by options: `q4_0+kv+tail128+sink4+center`, `q8_0/q4_0+k`, `q4_1+absmax`.
Options on the command line multiply: every type with every rotation, scale rule, tail and sink that were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, get_args

from hybridkv.cache import KVTypes
from hybridkv.errors import UsageError
from hybridkv.formats import get_format
from hybridkv.policy.rules import parse_scale

Rotation = Literal["none", "k", "v", "kv"]
ROTATIONS: tuple[Rotation, ...] = get_args(Rotation)
_EXACT = ("f32", "f16", "bf16")


def rotation(types: KVTypes) -> Rotation:
    """Name the sides that are rotated."""
    return ROTATIONS[types.rotate_k + 2 * types.rotate_v]


def label(types: KVTypes) -> str:
    """Write types as a label, which `parse` reads back."""
    options: list[str] = [rotation(types)] if rotation(types) != "none" else []
    options += [types.scale] if types.scale else []
    options += [f"{name}{count}" for name, count in (("tail", types.tail), ("sink", types.sink)) if count]
    return "+".join([types.label, *options, *(["center"] if types.center else [])])


def parse(text: str) -> KVTypes:
    """Read the types that a label names.

    Raises
    ------
    UsageError
        For an unknown type or option.
    """
    pair, *options = text.strip().split("+")
    k, slash, v = pair.partition("/")
    types = KVTypes(get_format(k).name, get_format(v if slash else k).name)
    for option in options:
        types = _with(types, option, text)
    return types


def _with(types: KVTypes, option: str, text: str) -> KVTypes:
    if option in ROTATIONS:
        return replace(types, rotate_k="k" in option, rotate_v="v" in option)
    if option in ("absmax", "refit"):
        return replace(types, scale=parse_scale(option))
    if option == "center":
        return replace(types, center=True)
    if match := re.fullmatch(r"tail(\d{1,7})", option):
        return replace(types, tail=int(match[1]))
    if match := re.fullmatch(r"sink(\d{1,7})", option):
        return replace(types, sink=int(match[1]))
    raise UsageError(
        f"{text!r}: unknown option {option!r} of a cache type; allowed: k, v, kv, absmax, refit, tailN, sinkN, center",
        hint="for example q4_0+kv+tail128+sink4",
    )


def expand_types(
    types: Iterable[str],
    *,
    rotations: Sequence[str] = (),
    scales: Sequence[str] = (),
    tails: Sequence[int] = (),
    sinks: Sequence[int] = (),
    centers: Sequence[bool] = (),
) -> list[KVTypes]:
    """Combine every type with every option; what an option cannot change appears once.

    Raises
    ------
    UsageError
        For a type, option or rotation that does not exist.
    """
    for name in rotations:
        if name not in ROTATIONS:
            raise UsageError(f"--rotate {name!r}; allowed: {', '.join(ROTATIONS)}")
    made: dict[str, KVTypes] = {}
    for text, rotate, scale, tail, sink, center in product(
        types, rotations or (None,), scales or (None,), tails or (None,), sinks or (None,), centers or (None,)
    ):
        asked = parse(text)
        chosen = replace(
            asked,
            rotate_k=asked.rotate_k if rotate is None else "k" in rotate,
            rotate_v=asked.rotate_v if rotate is None else "v" in rotate,
            scale=asked.scale if scale is None else parse_scale(scale),
            tail=asked.tail if tail is None else tail,
            sink=asked.sink if sink is None else sink,
            center=asked.center if center is None else center,
        )
        chosen = _effective(chosen)
        made.setdefault(label(chosen), chosen)
    return list(made.values())


def _effective(types: KVTypes) -> KVTypes:
    """Drop what changes nothing from `types`: a scale rule without a choice, anything where no code is stored."""
    names = (types.type_k, types.type_v)
    if all(name in _EXACT for name in names):
        return KVTypes(*names)
    if not any(len(get_format(name).scales) > 1 for name in names):
        types = replace(types, scale=None)
    return types
