"""The choice of the kernel that runs a case, and why the others do not.

One meaning of "supported": a kernel resolves here. The command line, the planner, `hybridkv doctor` and the
cache all ask this file, before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from hybridkv.errors import NoKernelError
from hybridkv.formats import FORMATS, KVFormat, Scale
from hybridkv.kernels.case import AttentionCase, AttentionParams, KVView

Attend = Callable[[Tensor, KVView, AttentionParams], Tensor]
Write = Callable[[Tensor, KVFormat, Scale | None, Sequence[Tensor], int], None]


class Store(Protocol):
    """Rotation, center, encoding and storing in one; the arguments are those of `hybridkv.kernels.store`."""

    def __call__(
        self,
        x: Tensor,
        fmt: KVFormat,
        scale: Scale | None,
        planes: Sequence[Tensor],
        row: int | Tensor,
        *,
        rotated: bool,
        center: Tensor | None,
    ) -> None:
        """Store x."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to attend over stored rows.

    Attributes
    ----------
    name
        Printed wherever the choice is shown.
    rank
        Among kernels that accept a case, the highest rank runs.
    tolerance
        Relative RMSE against float64 attention over the decoded rows that it keeps, tested.
    rejects
        The reason why it cannot run a case, or None.
    attend
        `(q, view, params) -> out`: q any float dtype `[B, Hq, T, D]`, already rotated if the view is; out
        `[B, Hq, T, Dv]`, still rotated if the view is, float32, or float16 from a kernel that computes in it.
    """

    name: str
    rank: int
    tolerance: float
    rejects: Callable[[AttentionCase], str | None]
    attend: Attend


@dataclass(frozen=True, slots=True)
class Encoder:
    """One way to store rows; all encoders write the same bytes.

    Attributes
    ----------
    rejects
        `(device type, format, head_dim) -> reason or None`.
    write
        `(x, format, scale rule, planes, row)`: encode x `[B, Hkv, T, D]`, any float dtype, into rows
        `[row, row + T)` of the planes.
    store
        Does all that `hybridkv.kernels.store` asks by itself, row counters on the device included; None
        if `write` is all there is.
    """

    name: str
    rank: int
    rejects: Callable[[str, KVFormat, int], str | None]
    write: Write
    store: Store | None = None


C = TypeVar("C", Kernel, Encoder)


def select(case: AttentionCase, kernels: Sequence[Kernel]) -> Kernel:
    """Select the highest-ranked kernel that accepts `case`.

    Raises
    ------
    NoKernelError
        With the reason of every candidate.
    """
    return _highest(
        kernels,
        lambda kernel: kernel.rejects(case),
        f"no kernel for {case}",
        f"quantized types work with head dims 16, 32, 48, 64 and every other multiple of 16; {_any_head_dim()} with "
        "any (-ctk f16 -ctv f16); `hybridkv doctor` prints what runs here",
    )


def _any_head_dim() -> str:
    *names, last = [name for name, fmt in FORMATS.items() if fmt.rejects(1) is None]
    return f"{', '.join(names)} and {last}"


def select_encoder(device: str, fmt: KVFormat, head_dim: int, encoders: Sequence[Encoder]) -> Encoder:
    """Select the highest-ranked encoder for a format, a head dim and a device.

    Raises
    ------
    NoKernelError
        With the reason of every candidate.
    """
    return _highest(
        encoders,
        lambda encoder: encoder.rejects(device, fmt, head_dim),
        f"no encoder for {fmt.name} rows of {head_dim} values on {device}",
        None,
    )


def explain(case: AttentionCase, kernels: Sequence[Kernel]) -> list[tuple[str, str | None]]:
    """List every kernel's answer to `case`, best rank first: its name and its reason to refuse, or None."""
    return [(k.name, k.rejects(case)) for k in sorted(kernels, key=lambda k: -k.rank)]


def _highest(candidates: Sequence[C], reason: Callable[[C], str | None], refusal: str, hint: str | None) -> C:
    """Find the highest-ranked candidate without a reason to refuse."""
    reasons: list[tuple[str, str]] = []
    for candidate in sorted(candidates, key=lambda c: -c.rank):
        why = reason(candidate)
        if why is None:
            return candidate
        reasons.append((candidate.name, why))
    raise NoKernelError(refusal, reasons=tuple(reasons), hint=hint)
