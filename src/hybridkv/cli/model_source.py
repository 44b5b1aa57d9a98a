"""The model that is meant: a path, a name that `hybridkv models` lists, or a hub's repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridkv.cli.show import model_path, notice
from hybridkv.errors import UsageError


def add_source_arguments(group: argparse._ActionsContainer) -> None:
    """Add `-m`, `-hf`, `-hff`, `-hft` and `--offline`, in llama.cpp's spellings."""
    group.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        help="GGUF file, model directory, or a name that `hybridkv models` lists (default: the bundled model)",
    )
    group.add_argument(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="OWNER/NAME[:QUANT]",
        help="model on Hugging Face's hub, or in its cache (QUANT: default Q4_K_M, or the first file)",
    )
    group.add_argument("-hff", "--hf-file", metavar="FILE", help="file in the -hf repository, instead of QUANT")
    group.add_argument("-hft", "--hf-token", metavar="TOKEN", help="access token of the hub (default: HF_TOKEN)")
    group.add_argument("--offline", action="store_true", help="use only the hub's cache, no network")


def model_of(a: argparse.Namespace) -> Path:
    """Find the model that the options name, and download it if need be.

    Raises
    ------
    UsageError
        For options that do not go together, and for what is not there.
    ModelFileError
        If the hub cannot be reached.
    """
    from hybridkv.engine.describe import bundled_model

    repository = getattr(a, "hf_repo", None)
    if repository is not None:
        from hybridkv.engine.hub import DEFAULT_QUANT, fetch_model, is_default, parse_model

        if a.model is not None:
            raise UsageError("-m and -hf were given together", hint="one of them will do")
        asked = parse_model(repository, file=a.hf_file, token=a.hf_token, network=not a.offline)
        path = fetch_model(asked)
        if path.suffix == ".gguf" and asked.quant is None and asked.file is None and not is_default(path.name):
            notice(f"-hf {asked.repository} has no {DEFAULT_QUANT}: {path.name} was taken; :QUANT names another")
        return path
    for option in ("hf_file", "hf_token"):
        if getattr(a, option, None) is not None:
            notice(f"--{option.replace('_', '-')} has no effect without -hf")
    if a.model is None:
        return bundled_model()
    path = model_path(a.model)
    if not path.exists():
        from hybridkv.engine.hub import is_repository
        from hybridkv.engine.local_models import model_named

        found = model_named(a.model)
        if found is None and is_repository(a.model) and not path.parent.is_dir():
            raise UsageError(
                f"no model at {path}",
                hint=f"-hf {a.model} takes it from Hugging Face's hub; `hybridkv models` lists names",
            )
        path = found or path
    return path
