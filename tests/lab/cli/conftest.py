"""The fixtures of the command line's tests."""

from __future__ import annotations

import pytest

from tests.cli.conftest import _nothing_is_piped_in, _threads, cli, gguf, hybrid, models

__all__ = ["_nothing_is_piped_in", "_threads", "cli", "gguf", "hybrid", "models"]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's page without its pictures, which take longer than the small evaluations of these tests."""
    monkeypatch.setattr("hybridkv_lab.report._figures", lambda results: [])
