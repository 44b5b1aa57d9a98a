"""How things are printed: sizes, tables, notices. Tables and notices go to stderr; stdout is for answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec, LayerKernels

_MIN_WIDTH = 140  # what a pipe or a log gets: wide enough that no cell of ours is cut


def stderr_console() -> Console:
    """A console on stderr, at least as wide as our tables when it is not a terminal."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _MIN_WIDTH)


def stdout_console() -> Console:
    """A console on stdout, likewise."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _MIN_WIDTH)


def notice(text: str) -> None:
    """One calm line on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warning(text: str) -> None:
    """One line on stderr that the user should read."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def size(n_bytes: int) -> str:
    """Bytes in the binary unit that reads best, three significant digits or more."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def simple_table(*columns: str, left: Sequence[str] = ()) -> Table:
    """A borderless table; columns are right-aligned unless named in `left`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def layer_table(layers: Sequence[tuple[KVSpec, LayerKernels]]) -> Table:
    """One line per KV layer: what it is stored as and what runs it."""
    table = simple_table("layer", "K", "V", "rotation", "kernel", "bytes/token", left=("K", "V", "rotation", "kernel"))
    for spec, kernels in layers:
        types = spec.types
        rotated = " ".join(side for side, on in (("K", types.rotate_k), ("V", types.rotate_v)) if on)
        table.add_row(
            str(spec.facts.layer),
            types.type_k,
            types.type_v,
            rotated or "-",
            kernels.label,
            f"{spec.bytes_per_token}",
        )
    return table
