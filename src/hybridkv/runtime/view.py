"""The view of a cache layer for the attention function: the rows, the guard's part, and a recorded step's counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybridkv.cache import KVLayer
from hybridkv.kernels import KVView
from hybridkv.policy import Guard, Schedule
from hybridkv.runtime.fallbacks import Fallbacks

Notify = Callable[[str], None]


@dataclass(slots=True)
class LayerWatch:
    """The guard's part of one KV layer.

    Attributes
    ----------
    guard
        Mode and limit.
    notify
        Where a fallback is reported.
    awaits_first_check
        True until the first call over packed rows has been measured.
    error
        The last measured relative RMSE, or None.
    schedule
        Which calls are checked after that one.
    is_representative
        Whether it is the first layer of its kind. Its rows and its attention stand for the others', but for the first
        single token, which is checked in all.
    fallbacks
        Those of the cache that wait to be reported.
    """

    guard: Guard
    notify: Notify
    awaits_first_check: bool = field(default=True)
    error: float | None = None
    schedule: Schedule = field(default=Schedule())
    is_representative: bool = field(default=True)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)

    def should_check(self, n_seen: int, n_new: int) -> bool:
        """Decide whether to check this call: of `n_new` tokens, after which the cache has seen `n_seen`."""
        if not self.guard.measures or self.awaits_first_check:
            return False
        return (self.is_representative or (n_new == 1 and not self.schedule.decoded)) and self.schedule.due(
            n_seen, n_new
        )


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A decode step whose row counters only the device knows, so that it can be recorded once and run again and again.

    Attributes
    ----------
    row_counters
        int32 `[N_COUNTERS, B]`: where this layer's rows are, this step's included; see `hybridkv.cache.device_rows`.
    health
        int32 `[2]`, for this layer: not 0 where the attention output (first) or what went into it (second) was not
        finite.
    """

    row_counters: Tensor
    health: Tensor


@dataclass(frozen=True, slots=True)
class LayerView:
    """The view that `update` hands to the attention function in place of tensors.

    Attributes
    ----------
    layer
        The packed rows' owner.
    view
        The rows that this call attends.
    watch
        The guard's part.
    fresh_k, fresh_v
        The new tokens before they were encoded, for this call only. In the call that the guard measures, the earlier
        tokens before them, as they were before they were packed.
    device_step
        In a step that is recorded: where this layer's health goes.
    """

    layer: KVLayer
    view: KVView
    watch: LayerWatch
    fresh_k: Tensor
    fresh_v: Tensor
    device_step: DeviceStep | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"packed K/V rows have no attribute {name!r}: this model handles K and V as tensors before attention. "
            "hint: load it with attn_implementation='sdpa'; the same cache then gives dequantized tensors"
        )
