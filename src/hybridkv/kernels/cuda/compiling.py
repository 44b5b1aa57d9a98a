"""Compilation by Triton, and how long it takes: at the first call of a case, and then kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hybridkv.kernels import cuda


@dataclass(slots=True)
class Compiled:
    """Kernels that were compiled, and seconds; those that were found on disk do not count."""

    n_kernels: int = 0
    seconds: float = 0.0


@contextmanager
def watch_compilation(device: str) -> Iterator[Compiled]:
    """Count kernels that this process compiles inside the block: none on devices that Triton is not used on."""
    if cuda.available(device) is not None:
        yield Compiled()
        return
    from triton import knobs

    found, before = Compiled(), knobs.compilation.listener

    def listen(*, times: Any, cache_hit: bool, **case: Any) -> None:
        if not cache_hit:
            found.n_kernels += 1
            found.seconds += times.total / 1e6  # microseconds
        if before is not None:
            before(times=times, cache_hit=cache_hit, **case)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before
