"""Dense files beside ik_llama.cpp: a prompt of 512 tokens and generation, file by file, as a table of the docs.

    python bench/dense_files.py FILE.gguf ...                                      # yours
    python bench/dense_files.py --mixes q4_k_m,q6_k,q8_0,iq4_xs --directory DIR    # random ones of a 4B geometry

Every file is timed by `hybridkv bench decode` in a process of its own. Random files are written to `--directory` where
they are not there yet, and removed after their turn unless `--keep` is given. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perplexity import commit

HERE = Path(__file__).resolve().parent
GEOMETRY = {"hidden": 2560, "dense": 9216, "heads": 16, "kv-heads": 4, "value-heads": 32}
"""Of a Qwen3.5 of 4 billion parameters, with `--layers 32`."""


def files(args: argparse.Namespace) -> Iterator[Path]:
    """Every file to time, in turn; those that were written for it are removed when the next is asked for."""
    yield from args.files
    for mix in filter(None, args.mixes.split(",")):
        path = args.directory / f"random-4b-{args.layers}-{mix}.gguf"
        if not path.exists():
            options = [f"--{name}={value}" for name, value in GEOMETRY.items()]
            write = [sys.executable, HERE / "random_model.py", path, "--mix", mix, f"--layers={args.layers}", *options]
            subprocess.run(write, check=True, stdout=sys.stderr)
        yield path
        if not args.keep:
            path.unlink()


def measured(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `hybridkv bench decode` finds; its own tables go to stderr."""
    command = [
        *shlex.split(args.prefix), sys.executable, "-m", "hybridkv.cli", "bench", "decode", "-m", str(path),
        "--types", args.type, "--depths", "0", f"--prompt={args.prompt}", f"--steps={args.steps}", "--against", "ik",
        f"-t={args.threads}", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{path}: exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    gate = found["gates"][0] if found["gates"] else None
    if gate is None or not gate["passed"]:
        yield f"| {name} | not timed: {'no ik_llama.cpp' if gate is None else gate['difference']} | | | | |"
    for what, speeds in (("prompt of {n_tokens}", found["prompt"]), ("generation", found["steps"])):
        for speed in speeds:
            ours, theirs = speed["tok_s"]["hybridkv"], speed["tok_s"]["ik"]
            yield (
                f"| {name} | {what.format(**speed)} | {ours:.1f} | {theirs:.1f} | **{speed['ratio']['ik']:.2f}x** | "
                f"{gate['difference']:.1e} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--mixes", default="", help="random files of a 4B geometry in these mixes of types")
    parser.add_argument("--layers", type=int, default=32, help="of random files (default 32)")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="of random files")
    parser.add_argument("--keep", action="store_true", help="do not remove random files")
    parser.add_argument("--type", default="f16", help="of K and V (default f16)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--prefix", default="", help="run every measurement under this command")
    args = parser.parse_args()
    results = {"commit": commit(), "files": {}}
    lines = ["| file | | hybridkv | ik_llama.cpp | ratio | logits within |", "|---|---|---|---|---|---|"]
    for path in files(args):
        found = results["files"][path.stem] = measured(path, args)
        lines += rows(path.stem, found)
    print("\n".join(lines))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
