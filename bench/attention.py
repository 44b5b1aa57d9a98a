"""Attention over the packed cache: `hybridkv bench attention` as a script, with the same options.

python bench/attention.py --quick
python bench/attention.py --device cuda --quick

With `--device cuda`, the rest of the options are those of bench/attention_cuda.py.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from hybridkv.cli.main import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:2] == ["--device", "cuda"]:
        sys.argv[1:] = words[2:]
        runpy.run_path(str(Path(__file__).with_name("attention_cuda.py")), run_name="__main__")
    raise SystemExit(main(["bench", "attention", *words]))
