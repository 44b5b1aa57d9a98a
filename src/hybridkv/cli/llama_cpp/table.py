"""All rows, and the row of a name."""

from __future__ import annotations

from hybridkv.cli.llama_cpp.record import Row
from hybridkv.cli.llama_cpp.rows_machine import MACHINE
from hybridkv.cli.llama_cpp.rows_model import MODEL
from hybridkv.cli.llama_cpp.rows_serving import SERVING
from hybridkv.cli.llama_cpp.rows_text import TEXT

ROWS: tuple[Row, ...] = (*MODEL, *TEXT, *SERVING, *MACHINE)

_BY_NAME = {name: row for row in ROWS for name in row.names}


def row_of(name: str) -> Row | None:
    """Return the row of an option, None if neither program has it."""
    return _BY_NAME.get(name)
