"""Rotary angles from a Transformers config: the tables of cosines and sines that its classes compute step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_angles(config: Any, n_positions: int, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions 0 to `n_positions - 1`, float32 `[n_positions, n_rotated / 2]` each.

    For kinds of RoPE whose frequencies do not depend on the length of the sequence. A scaling's magnitude is in both.

    Parameters
    ----------
    kind
        Of the layers, where kinds of layers have a RoPE of their own.
    """
    text = config.get_text_config(decoder=True)
    rope = text.rope_parameters if kind is None else text.rope_parameters[kind]
    if rope["rope_type"] == "default":
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        n_rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        inverse = 1.0 / (rope["rope_theta"] ** (torch.arange(0, n_rotated, 2, dtype=torch.float) / n_rotated))
        magnitude = 1.0
    else:
        named = {} if kind is None else {"layer_type": kind}
        inverse, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](text, torch.device("cpu"), **named)
    angles = torch.arange(n_positions, dtype=torch.float).unsqueeze(1) * inverse.float()
    return (angles.cos() * magnitude).contiguous(), (angles.sin() * magnitude).contiguous()
