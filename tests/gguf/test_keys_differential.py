"""Every metadata key in every architecture: what is read gives llama.cpp's logits, what is harmless changes none.

Some 2,800 files; deselected unless asked for: `pytest -m long tests/gguf/test_keys_differential.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridkv.gguf.architectures import ARCHITECTURES
from tests.gguf.key_cases import DEVIATIONS, IDS, as_close, measured
from tests.oracles.llama_cpp_many import Server, server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def llama() -> Iterator[Server]:
    with server(IDS) as running:
        yield running


@pytest.mark.filterwarnings("ignore")  # Transformers', of factors that do not fit the context
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_key_is_passed_over_in_silence(tmp_path: Path, llama: Server, architecture: str) -> None:
    plain, *outcomes = measured(architecture, llama, tmp_path)
    assert plain.apart is not None
    assert plain.apart < 2e-3 * plain.spread  # gemma3, whose llama.cpp graph rounds to float16; others 6e-5
    assert len(outcomes) > 150
    for outcome in outcomes:
        assert outcome.verdict != "noticed", outcome
        assert as_close(outcome, plain) or (architecture, outcome.key) in DEVIATIONS, outcome
        assert outcome.verdict != "refused" or outcome.error, outcome
