"""Which types the KV layers get, and what is done when they do not hold."""

from hybridkv.policy.guard import (
    ERROR_LIMIT,
    GUARD_MODES,
    KERNEL_LIMIT,
    LADDER,
    STORE_LIMIT,
    Evidence,
    Fallback,
    Guard,
    GuardMode,
    MismatchError,
    NonFiniteError,
    Ok,
    Stop,
    Verdict,
    next_types,
    parse_mode,
    promised_error,
)
from hybridkv.policy.rules import Policy, TypeOverride, parse_override, parse_scale
from hybridkv.policy.schedule import Schedule

__all__ = [
    "ERROR_LIMIT",
    "GUARD_MODES",
    "KERNEL_LIMIT",
    "LADDER",
    "STORE_LIMIT",
    "Evidence",
    "Fallback",
    "Guard",
    "GuardMode",
    "MismatchError",
    "NonFiniteError",
    "Ok",
    "Policy",
    "Schedule",
    "Stop",
    "TypeOverride",
    "Verdict",
    "next_types",
    "parse_mode",
    "parse_override",
    "parse_scale",
    "promised_error",
]
