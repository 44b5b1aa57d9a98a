"""Printing: sizes, tables, notices. Tables and notices go to stderr; stdout is for answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec, LayerKernels
    from hybridkv.engine.load import Description
    from hybridkv.held import Expanded

MAX_CONTEXT = 2**40
"""Tokens; more are a slip of the finger."""

_WIDTH = 1000  # wider than any table of ours: a narrow terminal wraps a line, but no number is ever cut


def stderr_console() -> Console:
    """Open a console on stderr. Model names are data: no markup, no emoji codes."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, width=_WIDTH)


def stdout_console() -> Console:
    """Open a console on stdout."""
    return Console(highlight=False, markup=False, emoji=False, width=_WIDTH)


def model_path(text: str) -> Path:
    """Parse the path after `-m`, `~` included.

    Raises
    ------
    UsageError
        If it is empty, as an unset shell variable leaves it.
    """
    if not text:
        raise UsageError(
            "-m is empty; allowed: a .gguf file or a model directory", hint="leave -m out for the bundled model"
        )
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def notice(text: str) -> None:
    """Print one calm line on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warning(text: str) -> None:
    """Print one line on stderr that the user should read."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def size(n_bytes: int) -> str:
    """Format bytes in the binary unit that reads best, with three significant digits or more."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB" if value < 2**14 else f"{value / 1024:.1f} TiB"


def weights_words(parts: Mapping[str, int]) -> str:
    """Format bytes of weights by how they are held: `1.88 GiB f32 (experts) + 7.3 MiB q8_0`."""
    return " + ".join(f"{size(n_bytes)} {name}" for name, n_bytes in parts.items()) or size(0)


def expanded_words(expanded: Expanded, plain: str) -> str:
    """Say which tensors become plain values on a card, what that costs, and why."""
    counts = ", ".join(f"{name} {n}" for name, n in expanded.counts.items())
    n = sum(expanded.counts.values())
    return (
        f"on cuda {n} quantized tensors ({counts}) are expanded to {plain}: {size(expanded.held_bytes)} instead of "
        f"{size(expanded.file_bytes)} in the file; reason: {expanded.reason}"
    )


def summary(description: Description) -> str:
    """Describe a model in a sentence: its layers, and what they remember."""
    facts = description.facts
    n_kv, n_states = sum(f.attention is not None for f in facts), sum(f.state is not None for f in facts)
    return f"{description.name}: {len(facts)} layers, {n_kv} with a KV cache, {n_states} with a recurrent state"


def simple_table(*columns: str, left: Sequence[str] = ()) -> Table:
    """Build a borderless table; columns are right-aligned unless named in `left`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


_MOST_LINES = 12
"""KV layers that have a line each; of more, neighbours that are stored alike share one."""


def layer_table(layers: Sequence[tuple[KVSpec, LayerKernels]]) -> Table:
    """Build a table of the KV layers: what each is stored as and what runs it."""
    columns = ["layer", "K", "V", "rotation", "kernel", "bytes/token"]
    exact = any(spec.exact_label for spec, _ in layers)
    if exact:
        columns.insert(4, "kept exact")
    table = simple_table(*columns, left=("K", "V", "rotation", "kept exact", "kernel"))
    lines = [(spec.facts.layer, _cells(spec, kernels, exact), spec.bytes_per_token) for spec, kernels in layers]
    alike = (line[1:] if len(lines) > _MOST_LINES else line[0] for line in lines)
    for _, group in groupby(zip(alike, lines, strict=True), key=itemgetter(0)):
        shared = [line for _, line in group]
        _, cells, n_bytes = shared[0]
        many = f"{len(shared)} x " if len(shared) > 1 else ""
        table.add_row(layers_words([number for number, *_ in shared]), *cells, f"{many}{n_bytes}")
    return table


def _cells(spec: KVSpec, kernels: LayerKernels, exact: bool) -> tuple[str, ...]:
    types = spec.types
    rotated = " ".join(side for side, on in (("K", types.rotate_k), ("V", types.rotate_v)) if on)
    return (types.type_k, types.type_v, rotated or "-", *[spec.exact_label or "-"] * exact, kernels.label)


def layers_words(numbers: Sequence[int]) -> str:
    """Name layers shortly: `0-29`, `3, 7, ... 39`, `3, 5, 11`."""
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) < 4 or len(steps) > 1:
        return ", ".join(map(str, numbers))
    if steps == {1}:
        return f"{numbers[0]}-{numbers[-1]}"
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
