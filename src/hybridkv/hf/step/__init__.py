"""Ways in which Transformers' own models run over new tokens: their forward pass, Triton kernels, recorded graphs."""

from hybridkv.hf.step.eager import EagerStep
from hybridkv.hf.step.fused import FusedStep
from hybridkv.hf.step.graph import GraphStep
from hybridkv.hf.step.record import Step
from hybridkv.hf.step.weights import (
    Holder,
    pack_model,
    packing_rejects,
    parse_weights,
    save_unpacked,
    vocabulary_rows,
)

__all__ = [
    "EagerStep",
    "FusedStep",
    "GraphStep",
    "Holder",
    "Step",
    "pack_model",
    "packing_rejects",
    "parse_weights",
    "save_unpacked",
    "vocabulary_rows",
]
