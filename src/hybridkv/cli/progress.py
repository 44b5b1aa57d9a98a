"""Signs of life for what takes long, on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from hybridkv.kernels.cuda.ahead import Ahead

_DELAY = 1.0
"""Seconds after which it is worth saying."""


class Loading:
    """The words beside the spinner: the model's name, and how far its weights and its kernels are, once known."""

    def __init__(self, name: str, compilers: Sequence[Ahead | None] = ()) -> None:
        self._name, self._compilers = name, compilers
        self._share: Callable[[], float] | None = None

    def count(self, model: Any, n_bytes: int) -> None:
        """Show from here on the share of weights that a model holds already, if they are taken one by one.

        Parameters
        ----------
        n_bytes
            Of all of them.
        """
        from hybridkv.native import NativeModel

        if isinstance(model, NativeModel):
            source = model.source
            self._share = lambda: sum(weight.nbytes for weight in list(source.matrices())) / max(1, n_bytes)

    def __rich__(self) -> Text:
        """Draw; on the thread that draws."""
        words = f"loading {self._name}"
        if self._share is not None:
            words += f": {min(1.0, self._share()):.0%}"
        for compiler in filter(None, self._compilers):
            done, n = compiler.progress
            words += f", {done} of {n} kernels compiled" if n else ", listing its kernels"
        return Text(words)


@contextmanager
def loading(name: str, compilers: Sequence[Ahead | None] = ()) -> Iterator[Loading]:
    """Show that a model is being loaded, and how far kernels are compiled meanwhile."""
    shown = Loading(name, compilers)
    if not sys.stderr.isatty():
        yield shown
        return
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with console.status(shown):
        yield shown


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
