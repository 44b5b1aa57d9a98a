"""The rows of a native step: where they go, and what is to be known of a layer before one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from hybridkv.kernels import KVView, cpu
from hybridkv.kernels.cache_rows import CacheRows, Health
from hybridkv.policy import NonFiniteError
from hybridkv.runtime import ModelCache, WatchedRows
from hybridkv.runtime.attend import non_finite


def rows_of(cache: ModelCache, index: int) -> WatchedRows:
    """Return the rows of a layer that attends."""
    rows = cache.rows[index]
    assert rows is not None
    return rows


def is_direct(layer: WatchedRows) -> bool:
    """Check whether native code stores and attends one new token of this layer, with nothing to measure."""
    kernels = layer.store.kernels
    native = kernels.decode in cpu.KERNELS and kernels.write_k in cpu.ENCODERS and kernels.write_v in cpu.ENCODERS
    return native and not layer.watch.awaits_first_check


def fault_of(layer: WatchedRows, health: Health) -> NonFiniteError:
    """Return what attention that is not finite is reported as."""
    source: Literal["cache", "input"] = "cache" if health == "bad output" else "input"
    return non_finite(layer.store, layer.store.kernels.decode, source)


def n_before_check(layers: Sequence[WatchedRows], most: int) -> int:
    """Count the next tokens, at most `most`, that come one by one before the guard checks one."""
    watched = [layer for layer in layers if layer.watch.guard.measures]
    due = (n for n in range(most) if any(each.watch.should_check(each.store.n_seen + 1 + n, 1) for each in watched))
    return next(due, most)


def starts(spans: Sequence[int]) -> list[int]:
    """Return the first row of each cache."""
    return [0, *accumulate(spans)][:-1]


def new_rows(layer: WatchedRows, n_seqs: int, n_tokens: int = 1) -> CacheRows:
    """Reserve rows of new tokens, and describe where a step writes them."""
    return rows_of_view(layer, layer.store.reserve(n_seqs, n_tokens, torch.device("cpu")))


def rows_now(layer: WatchedRows) -> CacheRows:
    """Describe the newest token's rows as it attended them."""
    return rows_of_view(layer, layer.store.view())


def rows_of_view(layer: WatchedRows, view: KVView) -> CacheRows:
    """Describe rows that a step writes and attends."""
    types = layer.store.types
    newest = view.segments[-1]
    scale_k = types.scale_for(newest.format_k.name) or newest.format_k.default_scale
    scale_v = types.scale_for(newest.format_v.name) or newest.format_v.default_scale
    return CacheRows(view, refit_k=scale_k == "refit", refit_v=scale_v == "refit")


def heads_first(x: Tensor, n_seqs: int, n_tokens: int) -> Tensor:
    """View a buffer's first rows `[B * T, heads, D]` as `[B, heads, T, D]`, without a copy."""
    return x[: n_seqs * n_tokens].view(n_seqs, n_tokens, *x.shape[1:]).transpose(1, 2)


def of_cache(x: Tensor, row: int, n_seqs: int) -> Tensor:
    """View the rows from `row` on of one cache of `n_seqs` sequences, one new token: `[n_seqs, heads, 1, D]`."""
    return heads_first(x[row:], n_seqs, 1)
