"""The question to a kernel: the static facts of an attention, the stored rows it reads, and the call's parameters.

Plain frozen records. Nothing here runs; the registry matches cases to kernels, kernels read views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hybridkv.errors import NoKernelError
from hybridkv.formats import KVFormat

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

DEVICE_ROWS_REFUSAL = "reads row counters from the host, not from the device"


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """All that a kernel may base its refusal on. Hashable, no tensors.

    Attributes
    ----------
    device
        torch's device type: `cpu`, `cuda`.
    type_k, type_v
        Names of the stored formats.
    head_dim_k, head_dim_v
        Values per stored row of K and of V.
    group
        Query heads per KV head.
    phase
        `decode` is one new token per sequence, `prefill` is more.
    window, softcap, sinks
        Whether the layer attends a sliding window, caps its scores, or has sink logits.
    device_rows
        Whether row counters are read on the device, from tensors (`Segment.lengths`, `Segment.starts`).
    """

    device: str
    type_k: str
    type_v: str
    head_dim_k: int
    head_dim_v: int
    group: int
    phase: Phase
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    device_rows: bool = False

    def __str__(self) -> str:
        names = {"window": "window", "softcap": "softcap", "sinks": "sinks"}
        names["device_rows"] = "row counters on the device"
        extras = "".join(f", {text}" for name, text in names.items() if getattr(self, name))
        dims = f"{self.head_dim_k}" if self.head_dim_k == self.head_dim_v else f"{self.head_dim_k}/{self.head_dim_v}"
        return (
            f"{self.phase} on {self.device}, K {self.type_k}, V {self.type_v}, head dim {dims}, "
            f"{self.group} query heads per KV head{extras}"
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive stored rows of one format. Holds the cache's own memory, not a copy.

    `start` and `length` are the host's. A captured graph replays with those of its capture, and a batch may hold
    sequences of different lengths; both read `lengths` and `starts`, which are tensors on the device. A kernel that
    does not know these refuses the case, and calls `require_host_rows`.

    Attributes
    ----------
    k, v
        One uint8 tensor `[B, Hkv, capacity, plane bytes]` per plane of the format.
    format_k, format_v
        What the planes hold.
    start, length
        Rows `[start, start + length)` are valid, at least one; everything else is stale and must not be read into a
        result.
    center
        float32 `[B, Hkv, D]` that was subtracted from K before it was stored, rotated if K is, or None. A kernel adds
        its product with the query to the scores.
    lengths
        int32 `[B]` on the device, each in `[0, length]`, or None. Sequence b then has `lengths[b]` rows, and `length`
        only bounds them.
    starts
        int32 `[B]` on the device, or None. The first row of sequence b is then `start + starts[b]`.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    format_k: KVFormat
    format_v: KVFormat
    start: int
    length: int
    center: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that hold the rows and their center."""
        return (*self.k, *self.v) if self.center is None else (*self.k, *self.v, self.center)


@dataclass(frozen=True, slots=True)
class KVView:
    """The stored rows that one attention reads: S of them, segment after segment, in the order of their tokens.

    Attributes
    ----------
    segments
        At least one; the last holds the newest rows.
    head_dim_k, head_dim_v
        Values per row.
    rotate_k, rotate_v
        Whether the rows are stored rotated.
    window
        Tokens that a query sees, itself included, or None for all.
    """

    segments: tuple[Segment, ...]
    head_dim_k: int
    head_dim_v: int
    rotate_k: bool = False
    rotate_v: bool = False
    window: int | None = None

    @property
    def length(self) -> int:
        """S, rows of all segments; a bound where row counters are on the device. A mask has that many columns, and
        column c of a segment stands for its row c, valid or not.
        """
        return sum(segment.length for segment in self.segments)

    @property
    def device_rows(self) -> bool:
        """True if a row counter is on the device."""
        return any(s.lengths is not None or s.starts is not None for s in self.segments)


def require_host_rows(segments: Sequence[Segment], reader: str) -> None:
    """Refuse segments whose row counters are on the device, for a kernel that does not read them.

    Raises
    ------
    NoKernelError
        If a segment has one of them.
    """
    for name in ("lengths", "starts"):
        if any(getattr(segment, name) is not None for segment in segments):
            raise NoKernelError(
                f"{reader} was given stored rows with `{name}` on the device, which it does not read",
                hint="choose the kernel by a case that says so: AttentionCase(device_rows=True)",
            )


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """The parameters of one call.

    Attributes
    ----------
    scale
        Factor on the scores, usually head_dim ** -0.5.
    softcap
        `s -> softcap * tanh(s / softcap)` after the scale, or None.
    sinks
        float32 `[Hq]`: one logit per head that joins the softmax and carries no value, or None.
    mask
        bool `[B or 1, Hq or 1, T, S]`, True where a query attends; it then is the whole truth. None: causal,
        the T queries being the last T of the S rows, with the view's window.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
