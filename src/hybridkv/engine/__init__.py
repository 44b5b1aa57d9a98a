"""Token ids in, token ids out."""

from hybridkv.engine.engine import Engine, Timings
from hybridkv.engine.requests import Event, Request, SchedulerStats, Ticket, Usage
from hybridkv.engine.sampling import Sampler, SamplingParams
from hybridkv.engine.scheduler import Scheduler

__all__ = [
    "Engine",
    "Event",
    "Request",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerStats",
    "Ticket",
    "Timings",
    "Usage",
]
