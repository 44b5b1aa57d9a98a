"""The memory planner: bytes of KV, states and weights, counted the way the cache allocates them.

Arithmetic over specs and facts; reads no files. `hybridkv plan` prints it, tests hold it against the bytes of a
real cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hybridkv.cache import KVSpec, LayerFacts
from hybridkv.errors import UsageError

CHUNK_ROWS = 512
"""Tokens of a prompt that a model processes at once."""

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_LEAST_PLAIN = 2**20
"""Bytes from which a number without a unit is taken for bytes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The bytes that a run will hold.

    Attributes
    ----------
    n_ctx, n_seqs
        Tokens per sequence, and sequences.
    kv_bytes
        Codes and scales of all KV layers.
    state_bytes
        Recurrent and convolution states.
    weight_bytes
        The loaded weights; 0 if not asked for.
    """

    n_ctx: int
    n_seqs: int
    kv_bytes: int
    state_bytes: int
    weight_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All three."""
        return self.kv_bytes + self.state_bytes + self.weight_bytes


def plan(
    specs: Sequence[KVSpec],
    facts: Sequence[LayerFacts],
    *,
    n_ctx: int,
    n_seqs: int = 1,
    conv_itemsize: int = 4,
    weight_bytes: int = 0,
) -> Plan:
    """Count the bytes of `n_seqs` sequences of `n_ctx` tokens.

    `conv_itemsize` is that of the convolution states: the model's dtype, float32 in the native step.
    """
    return Plan(
        n_ctx=n_ctx,
        n_seqs=n_seqs,
        kv_bytes=sum(spec.bytes_at(n_ctx, n_seqs) for spec in specs),
        state_bytes=sum(f.state.nbytes(n_seqs, conv_itemsize) for f in facts if f.state is not None),
        weight_bytes=weight_bytes,
    )


def unknown_states(facts: Sequence[LayerFacts]) -> bool:
    """Check whether a layer has a state of unknown shape, so that `Plan.state_bytes` is too small."""
    return any(f.state is not None and not f.state.known for f in facts)


def largest_context(specs: Sequence[KVSpec], free_bytes: int, *, n_seqs: int = 1) -> int | None:
    """Find the most tokens per sequence whose KV rows fit `free_bytes`; None if 2**40 do: nothing grows, or too slowly.

    0 means that not a single token fits.
    """

    def fits(n_ctx: int) -> bool:
        return sum(s.bytes_at(n_ctx, n_seqs) for s in specs) <= free_bytes

    low, high = 0, 2**40
    if fits(high):
        return None
    while low < high:  # windows make the sum bend, but it never falls
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Parse a size: `24GiB`, `512MiB`, `8GB`, or plain bytes from 1 MiB on.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if match is None or match[2].upper() not in _UNITS or not Decimal(match[1]):
        raise UsageError(
            f"{option} {text!r}; allowed: a positive number and one of KB MB GB KiB MiB GiB TiB",
            hint=f"for example {option} 24GiB",
        )
    n_bytes = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if not match[2] and n_bytes < _LEAST_PLAIN:
        raise UsageError(
            f"{option} {text}: that is bytes; allowed: a number and one of KB MB GB KiB MiB GiB TiB, or bytes from "
            f"{_LEAST_PLAIN} on",
            hint=f"did you mean {option} {match[1]}GiB?",
        )
    return n_bytes


def work_bytes(config: Any, n_rows: int = CHUNK_ROWS) -> int:
    """Estimate what a forward pass of `n_rows` tokens takes beside weights and cache: one layer's buffers, and logits.

    An estimate, and a generous one: buffers are reused from layer to layer, and how many live at once is the engine's
    business. Float32.
    """
    c = config.get_text_config(decoder=True)

    def of(*names: str) -> int:
        found = (getattr(c, name, None) for name in names)
        return next((value for value in found if isinstance(value, int)), 0)

    experts = of("num_experts_per_tok") * of("moe_intermediate_size")
    feed_forward = max(of("intermediate_size"), experts + of("shared_expert_intermediate_size"))
    heads = of("num_attention_heads") * (of("head_dim") or of("hidden_size") // max(1, of("num_attention_heads")))
    return 4 * (n_rows * (8 * of("hidden_size") + 3 * feed_forward + 4 * heads) + 2 * of("vocab_size"))


def guard_bytes(specs: Sequence[KVSpec], n_rows: int = CHUNK_ROWS) -> int:
    """Count what the guard holds while it measures a layer: rows as they came, stored and rotated, float32."""
    rows = (4 * s.facts.n_kv_heads * (s.facts.head_dim_k + s.facts.head_dim_v) for s in specs)
    return 3 * n_rows * max(rows, default=0)
