"""Token ids in, token ids out."""

from hybridkv.engine.engine import Engine, Timings
from hybridkv.engine.sampling import Sampler, SamplingParams

__all__ = ["Engine", "Sampler", "SamplingParams", "Timings"]
