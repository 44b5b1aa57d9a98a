"""Options that replace what a model says of itself: RoPE for long contexts, and metadata of GGUF files."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.model.changes import ModelChanges, Scaling

_SCALINGS: tuple[Scaling, ...] = ("none", "linear", "yarn")
_TYPES = ("int", "float", "bool", "str")


def add_rope_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them in llama.cpp's spellings."""
    group = parser.add_argument_group("long contexts: override what the model says")
    group.add_argument("--rope-scaling", metavar="KIND", help="RoPE scaling: none, linear or yarn")
    for option, kind, metavar, text in (
        ("--rope-scale", float, "N", "divide positions by N; the context grows N times"),
        ("--rope-freq-scale", float, "X", "the same, given as 1/N"),
        ("--rope-freq-base", float, "N", "RoPE base frequency (theta)"),
        ("--yarn-orig-ctx", int, "N", "YaRN: context size before scaling (default: the trained length)"),
        ("--yarn-ext-factor", float, "X", "YaRN: extrapolation mix; only 1 and -1 (full) are available"),
        ("--yarn-attn-factor", float, "X", "YaRN: scale of rotated queries and keys"),
        ("--yarn-beta-slow", float, "X", "YaRN: dimensions with fewer turns than X are interpolated"),
        ("--yarn-beta-fast", float, "X", "YaRN: dimensions with more turns than X stay as they are"),
    ):
        group.add_argument(option, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "-okv",
        "--override-kv",
        action="append",
        default=[],
        metavar="KEY=TYPE:VALUE",
        help="replace metadata of a GGUF file; TYPE: int, float, bool or str; repeatable, or separated by commas",
    )


def changes_of(a: argparse.Namespace) -> ModelChanges:
    """Read the options.

    Raises
    ------
    UsageError
        For values that mean nothing.
    """
    from hybridkv.model.changes import ModelChanges, RopeChanges

    if not hasattr(a, "rope_scaling"):
        return ModelChanges()
    scaling = next((kind for kind in _SCALINGS if kind == a.rope_scaling), None)
    if a.rope_scaling is not None and scaling is None:
        raise UsageError(f"--rope-scaling {a.rope_scaling!r}; allowed: {', '.join(_SCALINGS)}")
    positive = ("rope_scale", "rope_freq_scale", "rope_freq_base", "yarn_orig_ctx", "yarn_attn_factor")
    # Both backends mean "as the model says" by these.
    unset = {"rope_freq_base": 0, "rope_freq_scale": 0, "yarn_orig_ctx": 0}
    unset |= dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_slow", "yarn_beta_fast"), -1)
    names = ("rope_scale", *unset)
    given = {name: getattr(a, name) for name in names if getattr(a, name) not in (None, unset.get(name))}
    for name, value in given.items():
        if not math.isfinite(value) or (name in positive and value <= 0):
            raise UsageError(f"--{name.replace('_', '-')} {value:g}; allowed: more than 0")
    if "rope_scale" in given and "rope_freq_scale" in given:
        raise UsageError("--rope-scale and --rope-freq-scale were given together", hint="one is 1 over the other")
    factor = given.get("rope_scale")
    if "rope_freq_scale" in given:
        factor = 1 / given["rope_freq_scale"]
    rope = RopeChanges(
        scaling=scaling,
        factor=factor,
        freq_base=given.get("rope_freq_base"),
        orig_ctx=given.get("yarn_orig_ctx"),
        ext_factor=given.get("yarn_ext_factor"),
        attn_factor=given.get("yarn_attn_factor"),
        beta_fast=given.get("yarn_beta_fast"),
        beta_slow=given.get("yarn_beta_slow"),
    )
    return ModelChanges(rope, _keys(a.override_kv))


def say_idle_keys(changes: ModelChanges, architecture: str) -> None:
    """Name the keys of --override-kv that are another architecture's."""
    own = (f"{architecture}.", "general.", "tokenizer.")
    idle = [key for key in changes.keys if not key.startswith(own)]
    if idle:
        notice(f"--override-kv {', '.join(idle)}: no effect, for this file's architecture is {architecture}")


def _keys(texts: list[str]) -> dict[str, int | float | bool | str]:
    """Parse `KEY=TYPE:VALUE,...` as metadata."""
    keys: dict[str, int | float | bool | str] = {}
    for text in (part for one in texts for part in one.split(",") if part):
        key, equals, typed = text.partition("=")
        kind, colon, value = typed.partition(":")
        if not (key and equals and colon and kind in _TYPES):
            raise UsageError(
                f"--override-kv {text!r}; allowed: KEY=TYPE:VALUE with TYPE one of {', '.join(_TYPES)}",
                hint="try --override-kv tokenizer.ggml.add_bos_token=bool:false",
            )
        try:
            keys[key] = int(value) if kind == "int" else float(value) if kind == "float" else value
        except ValueError as error:
            raise UsageError(f"--override-kv {text!r}: {value!r} is not of type {kind}") from error
        if kind == "bool":
            if value not in ("true", "false"):
                raise UsageError(f"--override-kv {text!r}; allowed: true, false")
            keys[key] = value == "true"
    return keys
