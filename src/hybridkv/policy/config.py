"""A file with types for each KV layer of one model: what `hybridkv tune` writes and `--kv-config` reads.

TOML, so that a person can read and change it. It carries the facts of the model that it was made for, and `resolve`
refuses any other: a type chosen for one layer says nothing of another model's. Beside `Policy`, which says one thing of
all layers, this is the other way to get from facts to specs.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.errors import UsageError
from hybridkv.formats import get_format
from hybridkv.options import COMMON, KVOption
from hybridkv.policy.rules import Policy, check_exact, exact_notices, parse_scale, with_types

T = TypeVar("T")

FORMAT = "hybridkv-kv-config"
VERSION = 1

AUTO_SCALE = "auto"
"""In the file: each type's own scale rule."""

PER_LAYER = "per layer"
"""What `KVConfig.types` says of a side whose type differs between layers."""

_MAX_BYTES = 1 << 20
_MAX_NUMBER = 1 << 20
_HINT = "`hybridkv tune -o kv.toml` writes such a file, and docs/tuning.md describes it"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One KV layer: the facts by which it is known again, and its types.

    Attributes
    ----------
    layer
        Index among the model's layers.
    n_kv_heads, head_dim_k, head_dim_v
        Of the layer.
    type_k, type_v, rotate_k, rotate_v
        As in `KVTypes`.
    """

    layer: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    type_k: str
    type_v: str
    rotate_k: bool
    rotate_v: bool


@dataclass(frozen=True, slots=True)
class KVConfig:
    """Types for each KV layer of one model.

    Attributes
    ----------
    name
        Of the file, for messages.
    model
        Name of the model that it was made for; another name is no error, other layers are.
    layers
        In order.
    common
        What holds for all layers: scale rule, tail, sink, center. Its types are not read.
    """

    name: str
    model: str
    layers: tuple[LayerConfig, ...]
    common: KVTypes = field(default_factory=KVTypes)

    @property
    def types(self) -> KVTypes:
        """Types that all layers share, to be shown: `PER_LAYER` where they differ."""
        names = ({layer.type_k for layer in self.layers}, {layer.type_v for layer in self.layers})
        k, v = (name.pop() if len(name) == 1 else PER_LAYER for name in names)
        rotate_k, rotate_v = all(layer.rotate_k for layer in self.layers), all(layer.rotate_v for layer in self.layers)
        return replace(self.common, type_k=k, type_v=v, rotate_k=rotate_k, rotate_v=rotate_v)

    def resolve(self, facts: Sequence[AttentionFacts]) -> tuple[KVSpec, ...]:
        """Resolve the spec of every KV layer, in order.

        Raises
        ------
        UsageError
            If these are not the layers that the file was made for, or a type or count in it is none.
        """
        check_exact(self.common)
        self._check(facts)
        return tuple(KVSpec(f, self._types(layer)) for f, layer in zip(facts, self.layers, strict=True))

    def notices(self, specs: Sequence[KVSpec], n_ctx: int | None = None) -> list[str]:
        """List entries that change nothing, or less than asked, for these layers."""
        return exact_notices(self.common, specs, n_ctx)

    def _types(self, layer: LayerConfig) -> KVTypes:
        asked = replace(self.common, rotate_k=layer.rotate_k, rotate_v=layer.rotate_v)
        return with_types(asked, layer.type_k, layer.type_v)

    def _check(self, facts: Sequence[AttentionFacts]) -> None:
        """Refuse a model with other layers."""
        hint = "tune this model, or take the model that the file was made for"
        if len(facts) != len(self.layers):
            raise UsageError(
                f"{self.name} has types for {len(self.layers)} KV layers (it was made for {self.model}); "
                f"this model has {len(facts)}",
                hint=hint,
            )
        for f, layer in zip(facts, self.layers, strict=True):
            there = (f.layer, f.n_kv_heads, f.head_dim_k, f.head_dim_v)
            asked = (layer.layer, layer.n_kv_heads, layer.head_dim_k, layer.head_dim_v)
            if there != asked:
                raise UsageError(
                    f"{self.name} was made for {self.model}: {_layer(*asked)}; this model has {_layer(*there)}",
                    hint=hint,
                )


AnyPolicy = Policy | KVConfig
"""Either way from facts to specs."""


def config_of(name: str, model: str, specs: Sequence[KVSpec]) -> KVConfig:
    """Build the config that resolves to `specs`, whose layers share scale rule, tail, sink and center."""
    common = {replace(s.types, type_k="f16", type_v="f16", rotate_k=False, rotate_v=False) for s in specs}
    assert len(common) == 1
    entries = []
    for spec in specs:
        f, t = spec.facts, spec.types
        sizes = (f.layer, f.n_kv_heads, f.head_dim_k, f.head_dim_v)
        entries.append(LayerConfig(*sizes, t.type_k, t.type_v, t.rotate_k, t.rotate_v))
    return KVConfig(name, model, tuple(entries), common.pop())


def format_config(config: KVConfig, comment: Sequence[str] = ()) -> str:
    """Format the config as a file's text, with lines of comment above.

    `read_config` reads it back. Names are written as JSON strings, which TOML's basic strings take.
    """
    c = config.common
    head = [f"# {line}".rstrip() for line in comment]
    entries: list[tuple[str, Any]] = [
        ("format", FORMAT),
        ("version", VERSION),
        ("model", config.model),
        *((o.name, AUTO_SCALE if (value := getattr(c, o.name)) is None else value) for o in COMMON),
    ]
    lines = [*head, *[""] * bool(head), *(f"{key} = {json.dumps(value)}" for key, value in entries), "layers = ["]
    names = LayerConfig.__dataclass_fields__
    cells = [[f"{name} = {json.dumps(getattr(layer, name))}" for name in names] for layer in config.layers]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    for line in cells:
        padded = "".join(f"{cell},".ljust(width) for cell, width in zip(line[:-1], widths, strict=False))
        lines.append(f"  {{ {padded}{line[-1]} }},")
    return "\n".join([*lines, "]", ""])


def read_config(path: Path) -> KVConfig:
    """Read the config in a file.

    Raises
    ------
    UsageError
        If it cannot be read, is not TOML, or has a missing, unknown or wrong entry.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--kv-config {path}: {error.strerror}", hint=_HINT) from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"--kv-config {path} has more than {_MAX_BYTES} bytes", hint=_HINT)
    try:
        found = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"--kv-config {path} is not TOML: {' '.join(str(error).split())[:200]}", hint=_HINT) from error
    return _Reader(path).config(found)


class _Reader:
    """Checks a file's entries; every complaint names the file and the entry."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self, found: dict[str, Any]) -> KVConfig:
        self._keys(found, ("format", "version", "model", *(option.name for option in COMMON), "layers"), "")
        for key, value in (("format", FORMAT), ("version", VERSION)):
            if found[key] != value or type(found[key]) is not type(value):
                raise self._wrong(key, found[key], json.dumps(value))
        common = KVTypes(**{option.name: self._common(found, option) for option in COMMON})
        entries = self._value(found, "layers", list, "")
        if not entries:
            raise self._error("layers is empty")
        layers = tuple(self._layer(layer, f"layers[{i}].") for i, layer in enumerate(entries))
        self._asked("tail, sink and center", lambda: check_exact(common))
        model = "".join(c if c.isprintable() else "?" for c in self._value(found, "model", str, "")[:100])
        return KVConfig(self._path.name, model, layers, common)

    def _common(self, found: dict[str, Any], option: KVOption) -> Any:
        """Read an option that holds for all layers."""
        if option.kind == "count":
            return self._count(found, option.name, "")
        if option.kind == "switch":
            return self._value(found, option.name, bool, "")
        name = self._value(found, option.name, str, "")
        return None if name == AUTO_SCALE else self._asked(option.name, lambda: parse_scale(name))

    def _layer(self, layer: Any, where: str) -> LayerConfig:
        if not isinstance(layer, dict):
            raise self._error(f"{where.rstrip('.')} is no table")
        self._keys(layer, tuple(LayerConfig.__dataclass_fields__), where)
        return LayerConfig(
            layer=self._count(layer, "layer", where),
            n_kv_heads=self._count(layer, "n_kv_heads", where),
            head_dim_k=self._count(layer, "head_dim_k", where),
            head_dim_v=self._count(layer, "head_dim_v", where),
            type_k=self._type(layer, "type_k", where),
            type_v=self._type(layer, "type_v", where),
            rotate_k=self._value(layer, "rotate_k", bool, where),
            rotate_v=self._value(layer, "rotate_v", bool, where),
        )

    def _type(self, layer: dict[str, Any], key: str, where: str) -> str:
        name: str = self._value(layer, key, str, where)
        return self._asked(where + key, lambda: get_format(name).name)

    def _keys(self, found: dict[str, Any], expected: Sequence[str], where: str) -> None:
        if missing := [where + key for key in expected if key not in found]:
            raise self._error(f"{', '.join(missing[:5])} missing")
        if unknown := [where + key for key in found if key not in expected]:
            raise self._error(f"unknown entry {unknown[0][:80]!r}; allowed: {', '.join(expected)}")

    def _value(self, found: dict[str, Any], key: str, kind: type, where: str) -> Any:
        if type(found[key]) is not kind:
            allowed = {str: "a string", bool: "true or false", list: "a list of layers", int: "a whole number"}[kind]
            raise self._wrong(where + key, found[key], allowed)
        return found[key]

    def _count(self, found: dict[str, Any], key: str, where: str) -> int:
        number: int = self._value(found, key, int, where)
        if not 0 <= number <= _MAX_NUMBER:
            raise self._wrong(where + key, number, f"0 to {_MAX_NUMBER}")
        return number

    def _asked(self, entry: str, make: Callable[[], T]) -> T:
        """Call `make`, and tell its complaint as this file's."""
        try:
            return make()
        except UsageError as error:
            raise UsageError(f"--kv-config {self._path}: {entry}: {error.message}", hint=error.hint or _HINT) from error

    def _wrong(self, entry: str, value: Any, allowed: str) -> UsageError:
        return self._error(f"{entry} is {str(value)[:60]!r}; allowed: {allowed}")

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"--kv-config {self._path}: {problem}", hint=_HINT)


def _layer(layer: int, n_kv_heads: int, head_dim_k: int, head_dim_v: int) -> str:
    return f"layer {layer} with {n_kv_heads} KV heads of {head_dim_k}/{head_dim_v} values"
