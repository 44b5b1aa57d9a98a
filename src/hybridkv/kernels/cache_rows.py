"""The input of a native step's attention, the cache's rows, and its answer for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hybridkv.kernels import cpu_native
from hybridkv.kernels.case import KVView
from hybridkv.rotation import rotation_block

Health = Literal["finite", "bad output", "bad input"]
"""Verdict on an attention: its output was finite, and if not, its inputs were."""

HEALTH: tuple[Health, ...] = get_args(Health)
"""In the order of the native code's answers."""


@dataclass(frozen=True, slots=True)
class CacheRows:
    """The place of one layer's new token and the rows that it attends: the cache's memory, for one call.

    Attributes
    ----------
    view
        The rows attended; the last row of the last segment is the new token's, and takes its formats and center.
    refit_k, refit_v
        Whether scales are refitted when it is stored.
    """

    view: KVView
    refit_k: bool
    refit_v: bool

    def native(self, n_seqs: int, n_kv_heads: int, head_dim_k: int, head_dim_v: int) -> tuple[object, ...]:
        """Convert for the native code, checked against the shapes that its operation was written for."""
        view = self.view
        assert (view.head_dim_k, view.head_dim_v) == (head_dim_k, head_dim_v), view
        rows = cpu_native.native_rows(view.segments, n_seqs, n_kv_heads, head_dim_k, head_dim_v)
        k = (head_dim_k, self.refit_k, rotation_block(head_dim_k) if view.rotate_k else 0)
        v = (head_dim_v, self.refit_v, rotation_block(head_dim_v) if view.rotate_v else 0)
        return rows, k, v, view.window or 0
