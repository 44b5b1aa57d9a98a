"""`hybridkv models`: the models that lie on this machine, and by which name `-m` takes each."""

from __future__ import annotations

import argparse
import json

from hybridkv.cli.show import simple_table, size, stdout_console

NAME = "models"
HELP = "list the models on this machine: huggingface's, ollama's, LM Studio's and llama.cpp's folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv models`."""
    parser.add_argument("--json", action="store_true", help="print one JSON array with paths")


def main(arguments: argparse.Namespace) -> int:
    """Look and print."""
    from hybridkv.engine.describe import bundled_model
    from hybridkv.engine.local_models import LocalModel, local_models

    own = bundled_model()
    found = [LocalModel("", own, own.stat().st_size, "hybridkv"), *local_models()]
    if arguments.json:
        listed = [{"name": m.name, "path": str(m.path), "bytes": m.n_bytes, "owner": m.owner} for m in found]
        print(json.dumps(listed))
        return 0
    table = simple_table("folder", "size", "-m", left=("folder", "-m"))
    for model in found:
        table.add_row(model.owner, size(model.n_bytes), model.name or "(left out: the bundled model)")
    stdout_console().print(table)
    return 0
