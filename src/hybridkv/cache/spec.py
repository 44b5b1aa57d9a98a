"""A model's memory as frozen facts without tensors: the planner counts with them, the cache is built from them.

A model is a tuple of `LayerFacts`, one per model layer. A layer may own a KV cache (`AttentionFacts`), a
recurrent state (`StateFacts`), both (Falcon-H1, Zamba2) or neither. `KVSpec` adds the chosen types to a KV
layer's facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hybridkv.formats import Scale, get_format
from hybridkv.kernels import AttentionCase, Phase

WINDOW_SLACK = 512
"""Rows that a sliding-window layer holds beyond its window, so that old rows are dropped in bulk."""

EXACT_TYPE = "f16"
"""Type of a quantized layer's sinks and tail."""

LEAVING_ROWS = 32
"""Rows leave the tail in blocks of this many: one call of the encoder for all of them."""

SLIDE_ROWS = 32
"""Rows that the tail's memory has to spare: so many tokens later it moves to the front again."""

FRESH_ROWS = 512
"""New rows of one call that wait beside the tail until the next call, in memory that is given back then; of a longer
call, older rows are packed first."""

UNBOUNDED = 2**62
"""More tokens than there will be."""


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """A model's config on one KV layer.

    Attributes
    ----------
    layer
        Index among the model's layers.
    n_heads, n_kv_heads
        Query heads and KV heads.
    head_dim_k, head_dim_v
        Values per row and head.
    window
        Tokens that a query sees, itself included; None for all.
    softcap, sinks
        Whether scores are capped, and whether sink logits join the softmax.
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window: int | None = None
    softcap: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class StateFacts:
    """Shapes of one layer's fixed-size state, per sequence.

    Attributes
    ----------
    conv
        Shapes of the convolution states, held in the model's dtype: they are copies of recent inputs.
    recurrent
        Shapes of the recurrent states, always float32: they accumulate.
    known
        False for an architecture whose shapes are not known before it runs.
    """

    conv: tuple[tuple[int, ...], ...] = ()
    recurrent: tuple[tuple[int, ...], ...] = ()
    known: bool = True

    def nbytes(self, batch: int = 1, conv_itemsize: int = 4) -> int:
        """Count the bytes for `batch` sequences."""
        conv = sum(prod(shape) for shape in self.conv) * conv_itemsize
        return batch * (conv + 4 * sum(prod(shape) for shape in self.recurrent))


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One model layer: its KV cache, its state, both, or neither."""

    attention: AttentionFacts | None = None
    state: StateFacts | None = None


@dataclass(frozen=True, slots=True)
class KVTypes:
    """The types and settings at which one KV layer is stored.

    Attributes
    ----------
    type_k, type_v
        Names of formats.
    rotate_k, rotate_v
        Whether rows are rotated before they are quantized.
    scale
        Scale rule, or None for each format's own default.
    tail, sink
        How many of the newest and of the first tokens are kept as f16 where K or V is quantized.
    center
        Whether a fixed vector per sequence and KV head is subtracted from K before it is quantized.
    """

    type_k: str = "f16"
    type_v: str = "f16"
    rotate_k: bool = False
    rotate_v: bool = False
    scale: Scale | None = None
    tail: int = 0
    sink: int = 0
    center: bool = False

    @property
    def label(self) -> str:
        """`q4_0` or `q8_0/q4_0`."""
        return self.type_k if self.type_k == self.type_v else f"{self.type_k}/{self.type_v}"

    def scale_for(self, type_name: str) -> Scale | None:
        """Return the rule to encode `type_name` with: `scale` where the format has a choice, else None."""
        return self.scale if get_format(type_name).refit else None


@dataclass(frozen=True, slots=True)
class KVSpec:
    """One KV layer: what the model says and what was chosen."""

    facts: AttentionFacts
    types: KVTypes

    @property
    def is_quantized(self) -> bool:
        """True if K or V is quantized."""
        return any(get_format(name).is_quantized for name in (self.types.type_k, self.types.type_v))

    @property
    def tail(self) -> int:
        """Newest tokens kept as f16: none beside rows that are not quantized, no more than a window sees."""
        asked = self.types.tail if self.is_quantized else 0
        return asked if self.facts.window is None else min(asked, self.facts.window)

    @property
    def sink(self) -> int:
        """First tokens kept as f16: none beside rows that are not quantized, none that a window would leave behind."""
        return self.types.sink if self.is_quantized and self.facts.window is None else 0

    @property
    def center(self) -> bool:
        """True if K is stored minus a center: K is quantized, and a tail gathers rows to take a mean of."""
        return self.types.center and self.tail > 0 and get_format(self.types.type_k).is_quantized

    @property
    def exact_label(self) -> str:
        """`tail 128, sink 4, centred`, as far as it applies to this layer; empty if nothing does."""
        counts = [f"{name} {n}" for name, n in (("tail", self.tail), ("sink", self.sink)) if n]
        return ", ".join(counts + ["centred"] * self.center)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one packed token of one sequence adds, padding of the last block included."""
        return self._token_bytes(self.types.type_k, self.types.type_v)

    @property
    def exact_bytes_per_token(self) -> int:
        """Bytes of one token of one sequence among the sinks or in the tail."""
        return self._token_bytes(EXACT_TYPE, EXACT_TYPE)

    def rows_at(self, n_ctx: int) -> int:
        """Count the packed rows allocated for a context of `n_ctx` tokens."""
        rows = max(0, n_ctx - self.sink - self.tail)
        window = self.facts.window
        return rows if window is None else min(rows, max(0, window - 1 - self.tail) + WINDOW_SLACK)

    def exact_rows_at(self, n_ctx: int) -> int:
        """Count the f16 rows allocated for `n_ctx` tokens; up to `FRESH_ROWS` more while a prompt is processed."""
        waiting = LEAVING_ROWS + SLIDE_ROWS if self.tail else 0
        return min(n_ctx, self.sink + self.tail + waiting)

    def bytes_at(self, n_ctx: int, batch: int = 1) -> int:
        """Count the bytes allocated for `batch` sequences of `n_ctx` tokens."""
        rows = self.rows_at(n_ctx)
        center = 4 * self.facts.n_kv_heads * self.facts.head_dim_k if self.center and rows else 0
        exact = self.exact_rows_at(n_ctx) * self.exact_bytes_per_token
        return batch * (rows * self.bytes_per_token + exact + center)

    def case(self, device: str, phase: Phase) -> AttentionCase:
        """Build the case that a kernel is asked to run for this layer."""
        f = self.facts
        return AttentionCase(
            device=device,
            type_k=self.types.type_k,
            type_v=self.types.type_v,
            head_dim_k=f.head_dim_k,
            head_dim_v=f.head_dim_v,
            group=f.n_heads // f.n_kv_heads,
            phase=phase,
            window=f.window is not None,
            softcap=f.softcap,
            sinks=f.sinks,
        )

    def _token_bytes(self, type_k: str, type_v: str) -> int:
        row_k = get_format(type_k).row_bytes(self.facts.head_dim_k)
        row_v = get_format(type_v).row_bytes(self.facts.head_dim_v)
        return self.facts.n_kv_heads * (row_k + row_v)
