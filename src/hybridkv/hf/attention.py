"""The attention function and the mask function that Transformers calls under `attn_implementation="hybridkv"`.

Owns the way from a model's call to `hybridkv.runtime.attend`, or to attention over plain tensors without a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hybridkv.errors import ContextError, ModelError
from hybridkv.kernels import AttentionParams
from hybridkv.kernels.reference import attend as reference_attend
from hybridkv.runtime import LayerView
from hybridkv.runtime.attend import attend_stored
from hybridkv.runtime.evidence import float_view

IMPLEMENTATION = "hybridkv"


def register() -> None:
    """Make `attn_implementation="hybridkv"` known to Transformers, through its own registries."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Build the mask: None for plain causal attention without padding, else bool `[B, 1, T, S]`, True where attended.

    Only causal masks may be left out: None means causal to the kernels, never "everything".

    Raises
    ------
    ContextError
        If the padding mask covers fewer tokens than the cache holds and the new ones together.
    """
    del allow_is_bidirectional_skip
    if attention_mask is not None and attention_mask.shape[-1] < q_offset + q_length:
        raise filled_cache(q_offset, attention_mask.shape[-1])
    causal = allow_is_causal_skip and local_size is None and q_offset + q_length == kv_offset + kv_length
    if causal and (attention_mask is None or bool(attention_mask[:, kv_offset:].all())):
        return None
    mask: Tensor = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return mask


def filled_cache(n_held: int, n_prompt: int | None = None) -> ContextError:
    """Describe a prompt shorter than what its cache holds: `generate` takes all tokens up to now."""
    this = "" if n_prompt is None else f"; this one has {n_prompt}"
    return ContextError(
        f"the cache holds {n_held} tokens of another prompt{this}",
        hint="reset() the cache before another prompt, or give each its own",
    )


def attention_forward(
    module: Any,
    query: Tensor,
    key: LayerView | Tensor,
    value: LayerView | Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend `query` `[B, Hq, T, D]` over packed rows, or over plain tensors where no cache is used.

    Returns
    -------
    tuple
        `[B, T, Hq, Dv]` in the query's dtype, and None (weights are not kept).

    Raises
    ------
    ModelError
        For what is not implemented: training, dropout, a position bias, a mask that weighs instead of hiding.
    NonFiniteError
        If the guard watches and the output is not finite.
    ContextError
        If the new tokens stand at positions that the cache has filled.
    """
    del kwargs
    if dropout or position_bias is not None:
        asked = "dropout" if dropout else "a position bias"
        raise ModelError(f"{type(module).__name__} asks for {asked}", hint="use attn_implementation='eager'")
    if getattr(module, "training", False) and torch.is_grad_enabled() and query.requires_grad:
        raise ModelError(
            f"{type(module).__name__} is being trained; this attention has no backward pass",
            hint="call model.eval(), or train with attn_implementation='sdpa' and without a quantized cache",
        )
    n_rows = key.view.length if isinstance(key, LayerView) else key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and not causal:  # encoders and vision towers: None means everything
        attention_mask = torch.ones(1, 1, query.shape[2], n_rows, dtype=torch.bool, device=query.device)
    params = AttentionParams(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        mask=None if attention_mask is None else _boolean(attention_mask, module),
    )
    if isinstance(key, LayerView):
        if attention_mask is None and position_ids is not None and key.device_step is None:
            _check_positions(key.layer.n_seen - query.shape[2], position_ids)
        out = attend_stored(query, key, params)
    else:
        assert isinstance(value, Tensor)
        out = reference_attend(query, float_view(key, value), params)
    # One pass: the format that `to` is given decides what it copies into, where it copies at all.
    return out.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format).contiguous(), None


def _check_positions(n_held: int, position_ids: Tensor) -> None:
    """Refuse unpadded tokens `[B, T]` that all stand where the cache holds others, as those of a shorter prompt do.

    The cache has taken some of them by now and is of no use until it is reset.

    A single token on an accelerator is not looked at: decoding does not wait for the device. Nor is one whose step is
    being recorded, which has no number.
    """
    looked_at = position_ids.device.type == "cpu" or position_ids.shape[-1] > 1
    if n_held and position_ids.dim() == 2 and looked_at and int(position_ids.max()) < n_held:
        raise filled_cache(n_held)


def _boolean(mask: Tensor, module: Any) -> Tensor:
    """Convert a model's own mask to bool: an additive one says 0 for attended and its dtype's minimum for not."""
    if mask.dtype == torch.bool:
        return mask
    attended = mask == 0
    if not (attended | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ModelError(
            f"{type(module).__name__} adds a bias to the scores through its mask",
            hint="use attn_implementation='eager'; the same cache then gives dequantized tensors",
        )
    return attended
