"""Signs of life for what takes long, on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_DELAY = 1.0
"""Seconds after which it is worth saying."""


class Loading:
    """What stands beside the spinner: the model's name, and which share of its weights is ready, once known."""

    def __init__(self, name: str) -> None:
        self._name = name
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
        share = "" if self._share is None else f": {min(1.0, self._share()):.0%}"
        return Text(f"loading {self._name}{share}")


@contextmanager
def loading(name: str) -> Iterator[Loading]:
    """Show that a model is being loaded."""
    shown = Loading(name)
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
