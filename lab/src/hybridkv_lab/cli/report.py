"""`hybridkv report`: an evaluation's Markdown and HTML, built again from its JSONL."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridkv.errors import UsageError

NAME = "report"
HELP = "write the results of `hybridkv eval` as Markdown and as one HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv report`."""
    parser.add_argument("run", metavar="RUN.jsonl", help="output of `hybridkv eval`")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="directory for RUN.md and RUN.html (default: beside RUN.jsonl)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Write both, and say where."""
    from hybridkv_lab.report import write_report
    from hybridkv_lab.results import read_jsonl

    run = Path(arguments.run).expanduser()
    conditions, results = read_jsonl(run)
    if run.suffix in (".md", ".html"):
        raise UsageError(f"{run} could be overwritten by its own report", hint="rename it to end in .jsonl")
    directory = run.parent if arguments.output is None else Path(arguments.output).expanduser()
    for path in write_report(conditions, results, directory, run.stem):
        print(path)
    return 0
