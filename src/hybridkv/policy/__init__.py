"""Which types the KV layers get, and what is done when they do not hold."""

from hybridkv.policy.config import AnyPolicy, KVConfig, LayerConfig, config_of, format_config, read_config
from hybridkv.policy.guard import (
    ERROR_LIMIT,
    GUARD_MODES,
    LADDER,
    Evidence,
    Fallback,
    Guard,
    GuardMode,
    NonFiniteError,
    Ok,
    Stop,
    Verdict,
    next_types,
    parse_mode,
)
from hybridkv.policy.rules import Policy, TypeOverride, check_exact, parse_override, parse_scale, with_types

__all__ = [
    "ERROR_LIMIT",
    "GUARD_MODES",
    "LADDER",
    "AnyPolicy",
    "Evidence",
    "Fallback",
    "Guard",
    "GuardMode",
    "KVConfig",
    "LayerConfig",
    "NonFiniteError",
    "Ok",
    "Policy",
    "Stop",
    "TypeOverride",
    "Verdict",
    "check_exact",
    "config_of",
    "format_config",
    "next_types",
    "parse_mode",
    "parse_override",
    "parse_scale",
    "read_config",
    "with_types",
]
