"""`qwen35moe`: Qwen3.5 with experts in every layer; everything else as in `qwen35`."""

from __future__ import annotations

from types import MappingProxyType

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures import experts, qwen35
from hybridkv.gguf.architectures.record import Architecture, Fields
from hybridkv.gguf.metadata import Metadata


def _fields(meta: Metadata) -> Fields:
    experts.check_routing(meta, ExpertGatingFuncType.SOFTMAX)
    return qwen35.fields(meta)


ARCHITECTURE = Architecture(
    name="qwen35moe",
    config_class="Qwen3_5MoeTextConfig",
    model_class="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    sizes={**qwen35.SIZES, **experts.SHARED_SIZES},
    reals=qwen35.REALS,
    fields=_fields,
    keys=qwen35.keys,
    layers=qwen35.layers,
    tensors=MappingProxyType(
        {
            "model": qwen35.MODEL,
            "linear_attention": qwen35.NORMS + qwen35.LINEAR_ATTENTION,
            "full_attention": qwen35.NORMS + qwen35.FULL_ATTENTION,
            "feed_forward": experts.experts("mlp") + experts.SHARED_EXPERT,
        }
    ),
    suits=qwen35.problem,
    prediction=qwen35.PREDICTION,
    derived=qwen35.derived,
    source="gguf-py constants.py; llama.cpp conversion/qwen.py",
)
