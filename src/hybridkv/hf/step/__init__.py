"""Ways in which Transformers' own models run over new tokens: their forward pass, Triton kernels, recorded graphs."""

from hybridkv.hf.step.eager import EagerStep
from hybridkv.hf.step.fused import FusedStep
from hybridkv.hf.step.graph import GraphStep
from hybridkv.hf.step.record import Step
from hybridkv.hf.step.weights import (
    WeightKind,
    holder,
    pack_model,
    packed_parameter,
    packing_rejects,
    parse_weights,
    vocabulary_rows,
)

__all__ = [
    "EagerStep",
    "FusedStep",
    "GraphStep",
    "Step",
    "WeightKind",
    "holder",
    "pack_model",
    "packed_parameter",
    "packing_rejects",
    "parse_weights",
    "vocabulary_rows",
]
