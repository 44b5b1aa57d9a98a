"""Launches written down instead of done, and their kernels compiled by processes into Triton's directory on disk.

For a process that has no device: what is launched on the CPU while a card is assumed (`card.py`) is what a launch on
that card would ask for. Triton compiles for a target by its name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from dataclasses import dataclass
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hybridkv.kernels.cuda.card import CardFacts, assumed

Name = tuple[str, str, str]
"""Of a variant of a kernel: its module, its name, and Triton's key of the launch."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The facts that Triton needs to compile a kernel for a launch."""

    name: Name
    compile: Callable[[], Any]


class _Driver:
    """The part of a driver that Triton asks for when it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return one that nobody uses."""
        return device


@contextmanager
def recording(card: CardFacts) -> Iterator[list[Variant]]:
    """List what is launched meanwhile, in order, each variant once; nothing runs, and nothing is compiled."""
    major, minor = card.capability
    driver.set_active(_Driver(GPUTarget("cuda", 10 * major + minor, 32)))
    found: list[Variant] = []
    run, compile_ = JITFunction.run, JITFunction._do_compile

    def record(self: Any, key: str, signature: Any, device: int, *rest: Any) -> object:
        def build() -> Any:
            return compile_(self, key, signature, device, *rest)

        found.append(Variant((self.module, self.fn.__name__, key), build))
        self.device_caches[device][0][key] = marker = SimpleNamespace()
        return marker

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> object:
        del warmup
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run, JITFunction._do_compile = launch, record
    try:
        with assumed(card):
            yield found
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_


def compile_variants(variants: Sequence[Variant], n_workers: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Compile them in the order that they have, by forked processes that take the next one each.

    Parameters
    ----------
    say
        Called in those processes: `begun` with a variant's number, then `done` with its seconds and an error or None.
    """
    context = get_context("fork")
    following = context.Value(c_int64, 0)

    def work() -> None:
        while True:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= len(variants):
                return
            say({"begun": number})
            start = time.perf_counter()
            error = _compile(variants[number])
            say({"done": number, "s": round(time.perf_counter() - start, 2), "error": error})

    workers = [context.Process(target=work, daemon=True) for _ in range(min(n_workers, len(variants)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compile(variant: Variant) -> str | None:
    """Compile a kernel, and the C code that launches it where this version of Triton makes some for each signature.

    Returns what went wrong: whoever launches it compiles it again then, and shows its own error.
    """
    from triton.backends.nvidia import driver as nvidia

    try:
        kernel = variant.compile()
        if hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def n_workers() -> int:
    """Choose how many processes compile: one a core, and one core is left for the process that waits."""
    return max(1, len(os.sched_getaffinity(0)) - 1)
