"""The fused step: a model's layers as torch's matrix products and Triton kernels, for prompts and for single tokens.

Transformers' own code takes some thirty launches for an attention layer and sixty for a gated delta net, and for a
prompt six more for every 64 tokens of it. A family's file writes the same down in ten. A model's class stays the
source of what is computed: the file reads its modules, and tests compare each result with theirs.
"""

from __future__ import annotations

from typing import Any

from hybridkv.hf.step.fused_layers import FusedFamily, LayersStep
from hybridkv.kernels.cuda import available as kernels_available
from hybridkv.model.protocols import Config


def families() -> dict[str, FusedFamily]:
    """Map model types to families; imports their kernels."""
    from hybridkv.hf.step import fused_qwen3_5

    return {family.model_type: family for family in fused_qwen3_5.FAMILIES}


FAMILY_NAMES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""What `families` gives, known without triton."""


def rejects_device(device: str) -> str | None:
    """Explain why the fused step runs no model on this type of device; None if it runs some."""
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    return kernels_available(device)


def rejects(config: Config, device: str) -> str | None:
    """Explain why the fused step cannot run a model of this config on this type of device; None if it can."""
    if (missing := rejects_device(device)) is not None:
        return missing
    text = config.get_text_config(decoder=True)
    if text.model_type not in FAMILY_NAMES:
        return f"knows no {text.model_type} layers on cuda; it knows {', '.join(FAMILY_NAMES)}"
    return families()[text.model_type].rejects(text)


class FusedStep(LayersStep):
    """Runs a model's layers as fused kernels; `rejects` must have said None.

    Parameters
    ----------
    model
        A Transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        embedding = model.get_input_embeddings()
        layers, head = families()[model.config.get_text_config(decoder=True).model_type].build(model)
        super().__init__(embedding, layers, head, embedding.weight.device, "native-triton")
