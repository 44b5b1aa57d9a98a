"""`hybridkv convert`: a Hugging Face directory as one GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridkv.cli.show import model_path, notice, size

NAME = "convert"
HELP = "write a Hugging Face model directory as a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv convert`."""
    parser.add_argument("directory", metavar="DIR", help="model directory: config.json, safetensors, tokenizer")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.gguf", help="file to write")
    parser.add_argument(
        "--type",
        default="f16",
        choices=("f32", "f16", "q8_0"),
        help="type of matrices; vectors, norms, convolutions and routers stay float32 (default f16)",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE.gguf if it exists")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")


def main(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    from hybridkv.engine.convert import convert

    a = arguments
    done = convert(
        model_path(a.directory),
        Path(a.output).expanduser(),
        weights=a.type,
        tokenizer="omitted" if a.no_tokenizer else "written",
        existing="replaced" if a.force else "kept",
    )
    for text in done.notices:
        notice(text)
    print(f"{done.path}: {done.architecture}, {size(done.path.stat().st_size)}")
    return 0
