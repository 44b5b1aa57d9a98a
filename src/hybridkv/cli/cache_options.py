"""The options that say how the KV cache is stored, in llama-cli's own spellings, and what they mean here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.policy import AnyPolicy

DEFAULT_TYPE = "f16"
TYPES = "f32 f16 bf16 q8_0 q8_1 q8_KV q6_0 q5_0 q5_1 q4_0 q4_1 iq4_nl hq4_nl hq3_nl hq2_nl"
"""The names in `hybridkv.formats.FORMATS`, which help must not wait for; a test holds them together."""


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-ctk`, `-ctv`, rotation, first/last layers, scale rule, exact rows, guard, and a file instead of these."""
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-config",
        metavar="FILE",
        help="per-layer types from a `hybridkv tune` file; replaces all KV-cache options except --kv-guard",
    )
    for side, name in (("k", "K"), ("v", "V")):
        group.add_argument(
            f"-ct{side}",
            f"--cache-type-{side}",
            metavar="TYPE",
            help=f"type of {name}: {TYPES} (default {DEFAULT_TYPE})",
        )
        group.add_argument(
            f"-{side}had",
            f"--{side}-cache-hadamard",
            action="store_true",
            help=f"rotate {name} with a Hadamard transform before quantizing; hq types always rotate",
        )
        for place in ("first", "last"):
            group.add_argument(
                f"-ct{side}-{place}",
                f"--cache-type-{side}-{place}",
                metavar="TYPE,N",
                help=f"type of {name} in the {place} N layers; only layers with a KV cache count",
            )
    group.add_argument(
        "--kv-scale",
        metavar="RULE",
        help="scale rule: absmax (ggml's) or refit (least squares) (default: the better one for each type)",
    )
    add_exact_arguments(group)
    group.add_argument(
        "--kv-guard",
        default="check",
        metavar="MODE",
        help="check: measure the first prompt and store layers that fail in more bits; upgrade: types under 8 bits "
        "become q8_0; warn: only warn; strict: end with an error; off (default check)",
    )


def add_exact_arguments(group: argparse._ActionsContainer) -> None:
    """Add `--kv-tail`, `--kv-sink` and `--kv-center`."""
    for name, which in (("tail", "newest"), ("sink", "first")):
        group.add_argument(
            f"--kv-{name}",
            type=int,
            metavar="N",
            help=f"keep the {which} N tokens as f16 in layers with a quantized K or V (default 0)",
        )
    group.add_argument(
        "--kv-center",
        action="store_true",
        help="subtract the mean of early tokens from K before quantizing; needs --kv-tail 32 or more",
    )


_EXCLUDED = {
    "cache_type_k": "-ctk",
    "cache_type_v": "-ctv",
    "k_cache_hadamard": "-khad",
    "v_cache_hadamard": "-vhad",
    "cache_type_k_first": "-ctk-first",
    "cache_type_k_last": "-ctk-last",
    "cache_type_v_first": "-ctv-first",
    "cache_type_v_last": "-ctv-last",
    "kv_scale": "--kv-scale",
    "kv_tail": "--kv-tail",
    "kv_sink": "--kv-sink",
    "kv_center": "--kv-center",
}
"""What `--kv-config` says itself. Not given, they are None or False."""


def given_types(arguments: argparse.Namespace) -> bool:
    """Check whether any option sets the types of K and V."""
    names = [f"cache_type_{side}{place}" for side in "kv" for place in ("", "_first", "_last")]
    return any(getattr(arguments, name) is not None for name in names)


def policy_from(arguments: argparse.Namespace) -> AnyPolicy:
    """Build the policy that the options ask for.

    Raises
    ------
    UsageError
        For an unknown type, rule or count, or for a file together with what it says itself.
    """
    from hybridkv.cache import KVTypes
    from hybridkv.formats import get_format
    from hybridkv.policy import Policy, parse_override, parse_scale, read_config

    a = arguments
    if a.kv_config is not None:
        values = {option: getattr(a, name) for name, option in _EXCLUDED.items()}
        given = [option for option, value in values.items() if value is not None and value is not False]
        if given:
            raise UsageError(
                f"--kv-config was given together with {', '.join(given)}, which the file already sets",
                hint=f"leave {', '.join(given)} out, or change the file",
            )
        return read_config(Path(a.kv_config))
    overrides = {
        f"{side}_{place}": parse_override(text, f"-ct{side}-{place}")
        for side in "kv"
        for place in ("first", "last")
        if (text := getattr(a, f"cache_type_{side}_{place}")) is not None
    }
    types = KVTypes(
        type_k=get_format(DEFAULT_TYPE if a.cache_type_k is None else a.cache_type_k).name,
        type_v=get_format(DEFAULT_TYPE if a.cache_type_v is None else a.cache_type_v).name,
        rotate_k=a.k_cache_hadamard,
        rotate_v=a.v_cache_hadamard,
        scale=None if a.kv_scale is None else parse_scale(a.kv_scale),
        tail=a.kv_tail or 0,
        sink=a.kv_sink or 0,
        center=a.kv_center,
    )
    return Policy(types=types, **overrides)
