"""The memory of stored prefixes where nobody says: from the model, within a share of what is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybridkv.cli.show import notice, size

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.cli.fits import Demand
    from hybridkv.cli.model_options import Opened

CHECKPOINTS = 8
"""Places to resume from that a conversation as long as the context should have."""

SHARE = 4
"""Stored prefixes take at most one part in so many of the memory that weights and running sequences leave."""

_LEAST = 64 * 2**20
_ON_DEVICE = 2**30


def default_prefix_bytes(opened: Opened, specs: Sequence[KVSpec], rest: Demand) -> int:
    """Estimate the memory for one conversation's rows per sequence that runs at once, and its checkpoints.

    Parameters
    ----------
    rest
        What the server takes beside prefixes.
    """
    from hybridkv.cli.fits import bytes_beside
    from hybridkv.memory import Available, available_memory
    from hybridkv.planner import largest_context, plan

    states = plan((), opened.description.facts, n_ctx=0).state_bytes
    one = sum(spec.bytes_at(opened.n_ctx) for spec in specs) + CHECKPOINTS * states
    wanted = max(_LEAST, rest.n_seqs * one)
    if opened.device_type != "cpu":
        return min(wanted, _ON_DEVICE)
    limit = opened.memory_limit
    available = available_memory() if limit is None else Available(limit, "")
    if available is None:
        return min(wanted, _ON_DEVICE)
    budget = min(wanted, max(0, available.n_bytes - bytes_beside(opened, rest)) // SHARE)
    if budget < one:
        most = largest_context(specs, max(0, budget - CHECKPOINTS * states)) or 0
        notice(
            f"stored prefixes get {size(budget)} of free memory: {CHECKPOINTS} checkpoints of a conversation "
            f"of {min(most, opened.n_ctx)} tokens, where -c is {opened.n_ctx}; --prefix-memory {one // 2**20 + 1}MiB "
            "holds one whole"
        )
    return budget
