"""Tables of mixtures of experts, which several architectures share.

A file holds each projection of all experts as one stack `[experts, out, in]`; Transformers holds gate and up
projections as one stack, gate above up, as some newer files do.
"""

from __future__ import annotations

from gguf import ExpertGatingFuncType

from hybridkv.gguf.architectures.record import Config, TensorRule
from hybridkv.gguf.metadata import Metadata

SIZES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
SHARED_SIZES = {**SIZES, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"}

ROUTER = "ffn_gate_inp.weight"


def experts(module: str, router: str = "gate") -> tuple[TensorRule, ...]:
    """Return the rules of gated experts and their router, in a layer's `module`."""
    return (
        TensorRule(ROUTER, f"{module}.{router}.weight"),
        TensorRule(("ffn_gate_exps.weight", "ffn_up_exps.weight"), f"{module}.experts.gate_up_proj"),
        TensorRule("ffn_gate_up_exps.weight", f"{module}.experts.gate_up_proj"),
        TensorRule("ffn_down_exps.weight", f"{module}.experts.down_proj"),
    )


SHARED_EXPERT = (
    TensorRule("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight"),
    TensorRule("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight"),
    TensorRule("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight"),
    TensorRule("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight"),
)
"""Qwen's: one more expert, weighed by a gate of its own."""


def routed(meta: Metadata, layer: int) -> bool:
    """Check whether a layer of this file has experts."""
    return meta.has_tensor(f"blk.{layer}.{ROUTER}")


def check_routing(meta: Metadata, gating: ExpertGatingFuncType, *, normalised: bool = True) -> None:
    """Check the counts of experts, and refuse a way to choose and weigh them that the model's class does not compute.

    Parameters
    ----------
    gating
        Makes scores of the router's output.
    normalised
        Whether the weights of a token's experts are made to sum to one.
    """
    meta.integer("expert_used_count", high=meta.integer("expert_count"))
    meta.fixed("expert_gating_func", (0, int(gating)), f"{int(gating)} ({gating.name.lower()})")
    word = "true" if normalised else "false"
    for key in ("expert_weights_norm", "norm_top_k_prob"):  # the second is ollama's
        meta.fixed(key, (normalised,), f"{word}: whether the weights of a token's experts are made to sum to one")
    meta.fixed("expert_weights_scale", (0.0, 1.0), "1.0: scaled weights of experts are not supported here")
    for key in ("expert_group_count", "expert_group_used_count"):
        meta.fixed(key, (0, 1), "1: groups of experts are not supported here")


def sparse_everywhere(config: Config) -> str | None:
    """Return what of a config is not said by this format: experts in each layer, weights that sum to one."""
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        return "some of its layers have no experts"
    if not getattr(config, "norm_topk_prob", True):
        return "its experts' weights do not sum to one (norm_topk_prob)"
    return None
