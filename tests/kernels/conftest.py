"""What several tests of kernels share."""

from __future__ import annotations

import pytest

from hybridkv.kernels import cpu_native


def _isas() -> tuple[str, ...]:
    return tuple(cpu_native._native().isas()) if cpu_native.available() is None else ()


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor runs, asked for by `HYBRIDKV_ISA`."""
    monkeypatch.setenv("HYBRIDKV_ISA", request.param)
    return str(request.param)
