"""Which types the KV layers get, and what is done when they do not hold."""

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
from hybridkv.policy.rules import Policy, TypeOverride, parse_override, parse_scale

__all__ = [
    "ERROR_LIMIT",
    "GUARD_MODES",
    "LADDER",
    "Evidence",
    "Fallback",
    "Guard",
    "GuardMode",
    "NonFiniteError",
    "Ok",
    "Policy",
    "Stop",
    "TypeOverride",
    "Verdict",
    "next_types",
    "parse_mode",
    "parse_override",
    "parse_scale",
]
