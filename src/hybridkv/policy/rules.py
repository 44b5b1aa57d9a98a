"""The choice of each KV layer's type: the asked types, first and last layers, rotation, and what has no effect.

Layers are counted among the *KV layers*, so `-ctk-first q8_0,2` means the first two layers that have a cache,
wherever they stand in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.cache.spec import EXACT_TYPE, LEAVING_ROWS
from hybridkv.errors import UsageError, one_of
from hybridkv.formats import Scale, get_format
from hybridkv.options import COMMON, EXACT, kv_option

MAX_EXACT = 2**40
"""Tokens; more are a slip of the finger."""


@dataclass(frozen=True, slots=True)
class TypeOverride:
    """A type for the first or the last `n_layers` KV layers."""

    type_name: str
    n_layers: int


def parse_override(text: str, option: str) -> TypeOverride:
    """Parse `q8_0,2` as a `TypeOverride`.

    Raises
    ------
    UsageError
        If it is not a known type, a comma and a count of at least 1.
    """
    name, comma, count = text.partition(",")
    if not comma or not count.isdigit() or int(count) < 1:
        raise UsageError(f"{option} {text!r}; allowed: TYPE,N with N at least 1", hint=f"for example {option} q8_0,2")
    return TypeOverride(get_format(name).name, int(count))


def parse_scale(text: str) -> Scale:
    """Parse the name of a scale rule.

    Raises
    ------
    UsageError
        Listing the rules.
    """
    kinds: tuple[Scale, ...] = get_args(Scale)
    return one_of(text, kinds, "unknown scale rule", hint="leave --kv-scale out for what measures better")


@dataclass(frozen=True, slots=True)
class Policy:
    """The request for the KV cache's types.

    Attributes
    ----------
    types
        The types of every KV layer, unless an override says otherwise.
    k_first, k_last, v_first, v_last
        Overrides of K's and V's type.
    """

    types: KVTypes = field(default_factory=KVTypes)
    k_first: TypeOverride | None = None
    k_last: TypeOverride | None = None
    v_first: TypeOverride | None = None
    v_last: TypeOverride | None = None

    def resolve(self, facts: Sequence[AttentionFacts]) -> tuple[KVSpec, ...]:
        """Resolve the spec of every KV layer, in order.

        Raises
        ------
        UsageError
            If a type is unknown, an override asks for more KV layers than there are, or a count of exact rows is
            not one.
        """
        for name in (self.types.type_k, self.types.type_v):
            get_format(name)
        check_exact(self.types)
        n = len(facts)
        k_types = _override([self.types.type_k] * n, self.k_first, self.k_last, "K")
        v_types = _override([self.types.type_v] * n, self.v_first, self.v_last, "V")
        return tuple(KVSpec(f, with_types(self.types, k, v)) for f, k, v in zip(facts, k_types, v_types, strict=True))

    def notices(self, specs: Sequence[KVSpec], n_ctx: int | None = None) -> list[str]:
        """List options that change nothing, or less than asked, for these layers."""
        messages = []
        asked_scale = self.types.scale
        used = {t for s in specs for t in (s.types.type_k, s.types.type_v)}
        if asked_scale is not None and used and not any(get_format(t).refit for t in used):
            messages.append(f"--kv-scale {asked_scale} has no effect: {', '.join(sorted(used))} have no scale to fit")
        if not specs and (self.types != KVTypes() or any((self.k_first, self.k_last, self.v_first, self.v_last))):
            messages.append("this model has no attention layer: the KV cache options have no effect")
        return messages + exact_notices(self.types, specs, n_ctx)


def policy_of(given: Mapping[str, Any], *, default_type: str, in_python: bool = False) -> Policy:
    """Build the policy of options by their names; those that are not given have their defaults.

    Parameters
    ----------
    given
        Values by the options' names, as they are written: texts, counts, true or false.
    default_type
        The type of K and V if none is given.
    in_python
        Whether messages name options as arguments, and not as on the command line.

    Raises
    ------
    UsageError
        For an unknown type or rule, or a count that is none.
    """
    types: dict[str, Any] = {"type_k": default_type, "type_v": default_type}
    overrides: dict[str, TypeOverride] = {}
    for name, value in given.items():
        option = kv_option(name)
        if option.kind == "override":
            overrides[name] = parse_override(value, name if in_python else option.flag)
        else:
            types[name] = parse_scale(value) if option.kind == "rule" else value
    types |= {name: get_format(types[name]).name for name in ("type_k", "type_v")}
    return Policy(types=KVTypes(**types), **overrides)


def common_types(given: Mapping[str, Any]) -> KVTypes:
    """Build what holds for all layers, whatever their types, from options by their names.

    Raises
    ------
    UsageError
        For a rule or a count that is none.
    """
    named = {option.name: given[option.name] for option in COMMON if option.name in given}
    types = policy_of(named, default_type=KVTypes().type_k).types
    check_exact(types)
    return types


def check_exact(types: KVTypes) -> None:
    """Refuse counts that are none, and a center without rows to take it from.

    Raises
    ------
    UsageError
        Naming the option.
    """
    for option in COMMON:
        if option.kind == "count":
            count = getattr(types, option.name)
            if type(count) is not int or not 0 <= count <= MAX_EXACT:
                raise UsageError(f"{option.flag} {count!r}; allowed: 0 to {MAX_EXACT} tokens")
    if types.center and types.tail < LEAVING_ROWS:
        raise UsageError(
            f"--kv-center with --kv-tail {types.tail}; allowed: a tail of at least {LEAVING_ROWS} tokens",
            hint="the center is a mean over rows that the tail gathers; try --kv-tail 128 --kv-center",
        )


def exact_notices(types: KVTypes, specs: Sequence[KVSpec], n_ctx: int | None) -> list[str]:
    """List where exact rows and the center change nothing, or less than asked."""
    texts = {o.name: o.flag if o.is_switch else f"{o.flag} {getattr(types, o.name)}" for o in EXACT}
    asked = " ".join(text for name, text in texts.items() if getattr(types, name))
    quantized = [spec for spec in specs if spec.is_quantized]
    if not asked or not specs:
        return []
    if not quantized:
        return [f"{asked} has no effect: no layer's K or V is quantized"]
    messages = []
    if types.sink and (windowed := [s for s in quantized if s.facts.window is not None]):
        messages.append(f"{texts['sink']}: none in {_layers(windowed)}, whose window moves on from the first tokens")
    if shorter := [s for s in quantized if s.tail < types.tail]:
        messages.append(f"{texts['tail']}: no more than the window in {_layers(shorter)}")
    if types.center and (plain := [s for s in quantized if not s.center]):
        messages.append(f"{texts['center']} has no effect in {_layers(plain)}: K is not quantized")
    if n_ctx is not None and all(s.rows_at(n_ctx) == 0 for s in quantized):
        messages.append(
            f"the types of K and V have no effect: with {asked}, all {n_ctx} tokens of the context stay "
            f"{EXACT_TYPE} and nothing is ever packed"
        )
    return messages


def _layers(specs: Sequence[KVSpec]) -> str:
    numbers = ", ".join(str(spec.facts.layer) for spec in specs)
    return f"layer {numbers}" if len(specs) == 1 else f"layers {numbers}"


def with_types(types: KVTypes, k: str, v: str) -> KVTypes:
    """Replace the types of K and V; a format made for rotated rows rotates its side."""
    rotate_k, rotate_v = types.rotate_k or get_format(k).rotated, types.rotate_v or get_format(v).rotated
    return replace(types, type_k=k, type_v=v, rotate_k=rotate_k, rotate_v=rotate_v)


def _override(types: list[str], first: TypeOverride | None, last: TypeOverride | None, side: str) -> list[str]:
    """Replace the first and last entries of `types`."""
    for override, place in ((first, "first"), (last, "last")):
        if override is None or not types:
            continue
        if override.n_layers > len(types):
            raise UsageError(
                f"{override.type_name} for the {place} {override.n_layers} {side} layers; "
                f"this model has {len(types)} KV layers",
                hint="layers are counted among the layers that have a KV cache",
            )
        span = slice(0, override.n_layers) if place == "first" else slice(len(types) - override.n_layers, None)
        types[span] = [override.type_name] * override.n_layers
    return types
