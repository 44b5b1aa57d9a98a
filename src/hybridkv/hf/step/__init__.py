"""Ways in which Transformers' own models run over new tokens: their forward pass, Triton kernels, recorded graphs."""

from hybridkv.hf.step.eager import EagerStep
from hybridkv.hf.step.fused import FusedStep
from hybridkv.hf.step.graph import GraphStep
from hybridkv.hf.step.weights import Holder, pack_model, packing_rejects, save_unpacked

__all__ = ["EagerStep", "FusedStep", "GraphStep", "Holder", "pack_model", "packing_rejects", "save_unpacked"]
