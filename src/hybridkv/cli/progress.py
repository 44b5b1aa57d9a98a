"""Signs of life for what takes long, on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from hybridkv.kernels.cuda.ahead import Ahead

_DELAY = 1.0
"""Seconds after which it is worth saying."""


class _Words:
    """What is shown while a model loads, asked again each time."""

    def __init__(self, name: str, compilers: Sequence[Ahead | None]) -> None:
        self._name, self._compilers = name, compilers

    def __rich__(self) -> str:
        words = f"loading {self._name}"
        for compiler in filter(None, self._compilers):
            done, n = compiler.progress
            words += f", {done} of {n} kernels compiled" if n else ", listing its kernels"
        return words


@contextmanager
def loading(name: str, compilers: Sequence[Ahead | None] = ()) -> Iterator[None]:
    """Show that a model is being loaded, and how far kernels are compiled meanwhile."""
    if not sys.stderr.isatty():
        yield
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with console.status(_Words(name, compilers)):
        yield


@contextmanager
def reading(n_tokens: int, done: Callable[[], float]) -> Iterator[Callable[[], None]]:
    """Show how far a prompt is, if it takes long; the function that is given ends that.

    Parameters
    ----------
    done
        The share that is done, from 0 to 1; asked from another thread.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    over = threading.Event()
    thread = threading.Thread(target=_show, args=(n_tokens, done, over), daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    try:
        yield end
    finally:
        end()


def _show(n_tokens: int, done: Callable[[], float], over: threading.Event) -> None:
    if over.wait(_DELAY):
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"prompt of {n_tokens} tokens", total=1.0)
        while not over.wait(0.1):
            progress.update(task, completed=done())
