"""The fixtures of the command line's tests."""

from __future__ import annotations

from tests.cli.conftest import _nothing_is_piped_in, _threads, cli, gguf, hybrid, models

__all__ = ["_nothing_is_piped_in", "_threads", "cli", "gguf", "hybrid", "models"]
