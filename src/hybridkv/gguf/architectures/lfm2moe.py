"""`lfm2moe`: LFM2 with experts behind the first, dense layers; everything else as in `lfm2`.

A token's experts are chosen by sigmoid scores plus a bias per expert, and weighed by the scores alone, which are made
to sum to one.
"""

from __future__ import annotations

from types import MappingProxyType

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures import experts, lfm2
from hybridkv.gguf.architectures.layers import n_blocks
from hybridkv.gguf.architectures.llama import SIZES
from hybridkv.gguf.architectures.record import Architecture, Config, Fields, Keys, TensorRule
from hybridkv.gguf.metadata import Metadata

_DENSE = "leading_dense_block_count"


def _fields(meta: Metadata) -> Fields:
    experts.check_routing(meta, ExpertGatingFuncType.SIGMOID)
    n_dense = meta.integer(_DENSE, low=0, high=n_blocks(meta)[0]) if meta.has(_DENSE) else 0
    return {**lfm2.layer_fields(meta), "num_dense_layers": n_dense, "norm_topk_prob": True, "use_expert_bias": True}


def _keys(config: Config) -> Keys:
    return {
        **lfm2.keys(config),
        _DENSE: config.num_dense_layers,
        "expert_gating_func": int(ExpertGatingFuncType.SIGMOID),
    }


def _problem(config: Config) -> str | None:
    if not (config.norm_topk_prob and config.use_expert_bias) or config.routed_scaling_factor != 1:
        return "its experts' weights do not sum to one, or their choice has no bias"
    return lfm2.problem(config)


def _layers(config: Config) -> list[tuple[str, ...]]:
    return [
        ("norms", kind, "feed_forward" if layer < config.num_dense_layers else "experts")
        for layer, kind in enumerate(config.layer_types)
    ]


_EXPERTS = (*experts.experts("feed_forward"), TensorRule("exp_probs_b.bias", "feed_forward.expert_bias"))

ARCHITECTURE = Architecture(
    name="lfm2moe",
    config_class="Lfm2MoeConfig",
    model_class="Lfm2MoeForCausalLM",
    model_type="lfm2_moe",
    sizes={**SIZES, **lfm2.CONV_SIZES, **experts.SIZES},
    reals=lfm2.REALS,
    fields=_fields,
    keys=_keys,
    layers=_layers,
    tensors=MappingProxyType({**lfm2.TENSORS, "experts": _EXPERTS}),
    suits=_problem,
    derived=lambda _: {"routed_scaling_factor": 1.0},
    source="gguf-py constants.py; llama.cpp conversion/lfm2.py",
)
