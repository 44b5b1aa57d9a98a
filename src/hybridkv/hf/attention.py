"""The attention function and the mask function that Transformers calls under `attn_implementation="hybridkv"`.

Owns the way from a model's call to a kernel, and the guard's two measurements on it: the first output over packed rows
(the first prompt's, or a later one's where a tail keeps the prompt exact) against float attention, and every output's
finiteness. Stored rows are never expanded to tensors here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hybridkv.cache import KVLayer, KVTypes
from hybridkv.errors import ContextError, GuardError, ModelError
from hybridkv.hf.evidence import float_view, is_finite, measure, verify
from hybridkv.hf.layers import QuantizedLayer
from hybridkv.hf.probes import Probe
from hybridkv.hf.view import LayerView
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView, Phase, attend, select
from hybridkv.kernels.reference import attend as reference_attend
from hybridkv.policy import Fallback, MismatchError, NonFiniteError, Ok, Stop

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
    """None for plain causal attention without padding, else bool `[B, 1, T, S]`, True where attended.

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
    """The error of a prompt that is shorter than what its cache holds: `generate` takes all tokens up to now."""
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
    """Attention of `query` `[B, Hq, T, D]` over packed rows, or over plain tensors where no cache is used.

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
            f"{type(module).__name__} is being trained; this attention has no gradient",
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
        if attention_mask is None and position_ids is not None and key.fixed is None:
            _check_positions(key.layer.n_seen - query.shape[2], position_ids)
        out = _attend_stored(query, key, params)
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


def attend_new(layer: QuantizedLayer, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Store the new tokens k and v `[B, Hkv, T, D]` and attend q `[B, Hq, T, D]`: `[B, Hq, T, Dv]`, see `attend`.

    Raises
    ------
    NonFiniteError
        If the guard watches and the output is not finite.
    """
    return _attend_stored(q, layer.store_new(k, v), params)


def _boolean(mask: Tensor, module: Any) -> Tensor:
    """A model's own mask as bool: an additive one says 0 for attended and its dtype's minimum for not."""
    if mask.dtype == torch.bool:
        return mask
    attended = mask == 0
    if not (attended | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ModelError(
            f"{type(module).__name__} adds a bias to the scores through its mask",
            hint="use attn_implementation='eager'; the same cache then gives dequantized tensors",
        )
    return attended


def _attend_stored(query: Tensor, packed: LayerView, params: AttentionParams) -> Tensor:
    watch = packed.watch
    kernel = _kernel(query, packed, params)
    out = attend(kernel, query, packed.view, params)
    if packed.fixed is not None:
        if params.mask is not None:
            raise ModelError("a recorded step was given a mask", hint="use --graph off")
        _record_health(out, query, packed, packed.fixed.health)
        return out
    n_new = query.shape[2]
    if watch.pending:
        watch.pending = watch.guard.measures and not packed.layer.shows_packed(packed.view)
        if watch.guard.measures and not watch.pending and packed.fresh_k.shape[2] >= packed.view.length:
            out = _checked(query, packed, params, out)
            watch.schedule = watch.schedule.checked(packed.layer.n_seen, n_new)
    elif watch.takes(packed.layer.n_seen, n_new) and is_finite(out):
        verify_call(query, packed, params, out)
    if watch.guard.watches and not is_finite(out):
        raise non_finite(packed.layer, kernel, "cache" if _inputs_finite(query, packed) else "input")
    return out


def non_finite(layer: KVLayer, kernel: Kernel, source: Literal["cache", "input"]) -> NonFiniteError:
    """What to raise for a layer whose attention output is not finite."""
    return NonFiniteError(
        layer=layer.spec.facts.layer,
        label=layer.types.label,
        kernel=kernel.name,
        n_tokens=layer.n_seen,
        source=source,
    )


def _kernel(query: Tensor, packed: LayerView, params: AttentionParams) -> Kernel:
    """The layer's resolved kernel; chosen anew if the call differs from what the config said."""
    phase: Phase = "decode" if query.shape[2] == 1 else "prefill"
    facts = packed.layer.spec.facts
    kernel = packed.layer.kernels.attend_for(phase)
    if facts.softcap == (params.softcap is not None) and facts.sinks == (params.sinks is not None):
        return kernel
    case = replace(packed.layer.spec.case(query.device.type, phase), device_rows=packed.fixed is not None)
    return select(replace(case, softcap=params.softcap is not None, sinks=params.sinks is not None), KERNELS)


def _record_health(out: Tensor, query: Tensor, packed: LayerView, health: Tensor) -> None:
    """Leave word on the device of numbers that are not finite; see `Fixed`."""
    if out.is_cuda:
        from hybridkv.kernels.cuda.layers import watch_finite  # needs triton, which only a CUDA device's step does

        watch_finite(out, query, packed.fresh_k, packed.fresh_v, health)
        return
    inputs = torch.stack([torch.isfinite(x).all() for x in (query, packed.fresh_k, packed.fresh_v)]).all()
    health.copy_(torch.stack([torch.isfinite(out).all(), inputs]).logical_not())


def _checked(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> Tensor:
    """Measure the layer's first output; store its rows at the next types of the ladder until it holds."""
    layer, watch = packed.layer, packed.watch
    while True:
        evidence = measure(query, packed, params, out, _again(packed))
        if evidence is None:
            return out  # not the cache's doing; the finiteness watch reports it
        watch.error = evidence.error
        verdict = watch.guard.judge(evidence)
        if isinstance(verdict, Stop):
            raise GuardError(
                f"the guard stopped at {verdict.reason}",
                hint="use a larger type, rotation (-khad), or --kv-guard check",
            )
        if not isinstance(verdict, Fallback):
            return out
        before = layer.nbytes
        watch.leads = True  # no other layer need have these types
        packed = replace(packed, view=_stored_again(packed, verdict.types, query.shape[2]))
        watch.notify(
            f"{verdict.reason}: stored as {verdict.types.label} instead, {(layer.nbytes - before) / 2**10:+.0f} KiB"
        )
        out = attend(_kernel(query, packed, params), query, packed.view, params)
        if not layer.shows_packed(packed.view):
            watch.error, watch.pending = None, True  # the new types have not been seen at work yet
            return out


def _again(packed: LayerView) -> Callable[[Probe], Tensor]:
    """The call's kernel and rows, for other queries."""

    def attend_probe(probe: Probe) -> Tensor:
        return attend(_kernel(probe.query, packed, probe.params), probe.query, packed.view, probe.params)

    return attend_probe


def verify_call(query: Tensor, packed: LayerView, params: AttentionParams, out: Tensor) -> None:
    """Check a call after the first prompt.

    Parameters
    ----------
    query, out
        The call's queries `[B, Hq, T, D]` and its attention output `[B, Hq, T, Dv]`.

    Raises
    ------
    MismatchError
        If its rows or its attention are not what the layer's types mean.
    """
    watch, n_new = packed.watch, query.shape[2]
    watch.schedule = watch.schedule.checked(packed.layer.n_seen, n_new)
    verdict = watch.guard.judge(verify(query, packed, params, out, _again(packed)))
    if not isinstance(verdict, Ok):
        raise MismatchError(verdict.reason)


def _stored_again(packed: LayerView, types: KVTypes, n_new: int) -> KVView:
    """The call's rows at other types, in the same two steps: those before it, then the new ones."""
    layer, n_seen = packed.layer, packed.layer.n_seen
    layer.retype(replace(layer.spec, types=types))
    n_old = packed.fresh_k.shape[2] - n_new
    if n_old:
        layer.append(packed.fresh_k[:, :, :n_old], packed.fresh_v[:, :, :n_old])
    view = layer.append(packed.fresh_k[:, :, n_old:], packed.fresh_v[:, :, n_old:])
    layer.n_seen = n_seen  # a window had let the others go
    return view


def _inputs_finite(query: Tensor, packed: LayerView) -> bool:
    return all(is_finite(x) for x in (query, packed.fresh_k, packed.fresh_v))
