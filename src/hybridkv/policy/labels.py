"""Types of the KV cache as one word, written and read back.

A label is `TYPE` or `TYPE/TYPE`, followed by options: `q4_0+kv+tail128+sink4+center`, `q8_0/q4_0+k`, `q4_1+absmax`.
Options on the command line multiply: every type with every rotation, scale rule, tail and sink that were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any, Literal, get_args

from hybridkv.cache import KVTypes
from hybridkv.errors import UsageError
from hybridkv.formats import Scale, get_format
from hybridkv.options import EXACT
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
    exact = ((option, getattr(types, option.name)) for option in EXACT)
    options += [option.name if option.is_switch else f"{option.name}{value}" for option, value in exact if value]
    return "+".join([types.label, *options])


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


def _with(types: KVTypes, word: str, text: str) -> KVTypes:
    if word in ROTATIONS:
        return replace(types, rotate_k="k" in word, rotate_v="v" in word)
    if word in get_args(Scale):
        return replace(types, scale=parse_scale(word))
    for option in EXACT:
        match = re.fullmatch(option.name if option.is_switch else rf"{option.name}(\d{{1,7}})", word)
        if match is not None:
            given: dict[str, Any] = {option.name: True if option.is_switch else int(match[1])}
            return replace(types, **given)
    allowed = [*ROTATIONS[1:], *get_args(Scale), *(o.name if o.is_switch else f"{o.name}N" for o in EXACT)]
    raise UsageError(
        f"{text!r}: unknown option {word!r} of a cache type; allowed: {', '.join(allowed)}",
        hint="for example q4_0+kv+tail128+sink4",
    )


def expand_types(
    types: Iterable[str],
    *,
    rotations: Sequence[str] = (),
    common: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> list[KVTypes]:
    """Combine every type with every option; what an option cannot change appears once.

    Parameters
    ----------
    types
        Labels.
    rotations
        Sides to rotate.
    common
        Values of options that hold for all layers, by their names; without values a label's own stays.

    Raises
    ------
    UsageError
        For a type, option or rotation that does not exist.
    """
    for name in rotations:
        if name not in ROTATIONS:
            raise UsageError(f"--rotate {name!r}; allowed: {', '.join(ROTATIONS)}")
    made: dict[str, KVTypes] = {}
    named = {name: values for name, values in common.items() if values}
    for text, rotate, *values in product(types, rotations or (None,), *named.values()):
        chosen = parse(text)
        if rotate is not None:
            chosen = replace(chosen, rotate_k="k" in rotate, rotate_v="v" in rotate)
        given = dict(zip(named, values, strict=True))
        if "scale" in given:
            given["scale"] = parse_scale(given["scale"])
        chosen = _effective(replace(chosen, **given))
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
