"""Attention over the packed cache on the CPU: `hybridkv bench attention` as a script, with the same options.

python bench/attention.py --quick
"""

from __future__ import annotations

import sys

from hybridkv.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "attention", *sys.argv[1:]]))
