"""From queries to attention over packed rows: the layer's kernel, and the guard's two measurements on it.

The first output over packed rows (the first prompt's, or a later one's where a tail keeps the prompt exact) is compared
with float attention, and every output's finiteness is watched. Stored rows are never expanded to tensors here. Every
engine calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hybridkv.cache import KVLayer, KVTypes
from hybridkv.errors import GuardError, ModelError
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView, Phase, attend, select
from hybridkv.kernels.cuda.card import is_rehearsed
from hybridkv.policy import Fallback, MismatchError, NonFiniteError, Ok, Stop
from hybridkv.runtime.evidence import is_finite, measure, verify
from hybridkv.runtime.fallbacks import Raised
from hybridkv.runtime.probes import Probe
from hybridkv.runtime.rows import WatchedRows
from hybridkv.runtime.view import LayerView


def attend_new(layer: WatchedRows, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Store the new tokens k and v `[B, Hkv, T, D]` and attend q `[B, Hq, T, D]`: `[B, Hq, T, Dv]`, see `attend`.

    Raises
    ------
    NonFiniteError
        If the guard watches and the output is not finite.
    """
    return attend_stored(q, layer.store_new(k, v), params)


def attend_stored(query: Tensor, packed: LayerView, params: AttentionParams) -> Tensor:
    """Attend rows that are stored; see `attend_new`."""
    watch = packed.watch
    kernel = _kernel(query, packed, params)
    out = attend(kernel, query, packed.view, params)
    if packed.device_step is not None:
        if params.mask is not None:
            raise ModelError("a recorded step was given a mask", hint="use --graph off")
        _record_health(out, query, packed, packed.device_step.health)
        return out
    n_new = query.shape[2]
    if watch.awaits_first_check:
        watch.awaits_first_check = watch.guard.measures and not packed.layer.shows_packed(packed.view)
        if watch.guard.measures and not watch.awaits_first_check and packed.fresh_k.shape[2] >= packed.view.length:
            out = _checked(query, packed, params, out)
            watch.schedule = watch.schedule.checked(packed.layer.n_seen, n_new)
        if watch is watch.fallbacks.last:
            watch.fallbacks.report(watch.notify)
    elif watch.should_check(packed.layer.n_seen, n_new) and is_finite(out):
        verify_call(query, packed, params, out)
    if watch.guard.watches and not is_finite(out):
        raise non_finite(packed.layer, kernel, "cache" if _inputs_finite(query, packed) else "input")
    return out


def non_finite(layer: KVLayer, kernel: Kernel, source: Literal["cache", "input"]) -> NonFiniteError:
    """Build the error for a layer whose attention output is not finite."""
    return NonFiniteError(
        layer=layer.spec.facts.layer,
        label=layer.types.label,
        kernel=kernel.name,
        n_tokens=layer.n_seen,
        source=source,
    )


def _kernel(query: Tensor, packed: LayerView, params: AttentionParams) -> Kernel:
    """Return the layer's resolved kernel; choose anew if the call differs from what the config said."""
    phase: Phase = "decode" if query.shape[2] == 1 else "prefill"
    facts = packed.layer.spec.facts
    kernel = packed.layer.kernels.attend_for(phase)
    if facts.softcap == (params.softcap is not None) and facts.sinks == (params.sinks is not None):
        return kernel
    case = replace(packed.layer.spec.case(query.device.type, phase), device_rows=packed.device_step is not None)
    return select(replace(case, softcap=params.softcap is not None, sinks=params.sinks is not None), KERNELS)


def _record_health(out: Tensor, query: Tensor, packed: LayerView, health: Tensor) -> None:
    """Leave word on the device of non-finite values; see `DeviceStep`."""
    if out.is_cuda or is_rehearsed():
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
            watch.fallbacks.report(watch.notify)
            raise GuardError(
                f"the guard stopped at {verdict.reason}",
                hint="use a larger type, rotation (-khad), or --kv-guard check",
            )
        if not isinstance(verdict, Fallback):
            return out
        before = layer.nbytes
        watch.is_representative = True  # no other layer need have these types
        packed = replace(packed, view=_stored_again(packed, verdict.types, query.shape[2]))
        raised = Raised(layer.spec.facts.layer, verdict.reason, evidence.error, verdict.types, layer.nbytes - before)
        watch.fallbacks.add(raised, watch.notify)
        out = attend(_kernel(query, packed, params), query, packed.view, params)
        if not layer.shows_packed(packed.view):
            watch.error, watch.awaits_first_check = None, True  # the new types have not been seen at work yet
            return out


def _again(packed: LayerView) -> Callable[[Probe], Tensor]:
    """Bind the call's kernel and rows, to attend other queries."""

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
    """Store the call's rows at other types, in the same two steps: those before it, then the new ones."""
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
