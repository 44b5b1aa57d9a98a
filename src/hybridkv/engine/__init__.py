"""Token ids in, token ids out.

Names are imported when they are asked for: `hybridkv plan` describes a model without what runs one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridkv.engine.engine import Engine, Timings
    from hybridkv.engine.requests import Event, Request, RequestHandle, SchedulerStats, Usage
    from hybridkv.engine.sampling import Sampler, SamplingParams
    from hybridkv.engine.scheduler import Scheduler

__all__ = [
    "Engine",
    "Event",
    "Request",
    "RequestHandle",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerStats",
    "Timings",
    "Usage",
]

_MODULES = {
    "engine": ("Engine", "Timings"),
    "requests": ("Event", "Request", "SchedulerStats", "RequestHandle", "Usage"),
    "sampling": ("Sampler", "SamplingParams"),
    "scheduler": ("Scheduler",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
