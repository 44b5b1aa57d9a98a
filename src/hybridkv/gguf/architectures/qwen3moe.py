"""`qwen3moe`: Qwen3 models with experts in every layer. The weights of a token's experts always sum to one."""

from __future__ import annotations

from types import MappingProxyType

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures import experts, qwen3
from hybridkv.gguf.architectures.llama import DENSE, REALS, SIZES
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, embeddings
from hybridkv.gguf.architectures.rope import SETTINGS
from hybridkv.gguf.metadata import Metadata


def _fields(meta: Metadata) -> Fields:
    experts.check_routing(meta, ExpertGatingFuncType.SOFTMAX)
    return {**qwen3.fields(meta), "norm_topk_prob": True}


def _problem(config: Config) -> str | None:
    return experts.sparse_everywhere(config) or qwen3.problem(config)


ARCHITECTURE = Architecture(
    name="qwen3moe",
    config_class="Qwen3MoeConfig",
    model_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    sizes={**SIZES, **experts.SIZES},
    reals=REALS,
    fields=_fields,
    keys=qwen3.keys,
    tensors=MappingProxyType({"model": embeddings(), "layer": DENSE + experts.experts("mlp")}),
    suits=_problem,
    settings=SETTINGS,
    source="gguf-py constants.py; llama.cpp conversion/qwen.py",
)
