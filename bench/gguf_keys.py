"""What is made of every GGUF metadata key, in every architecture, beside llama.cpp: the numbers of docs/gguf-keys.md.

python bench/gguf_keys.py -o docs/measurements/gguf-keys.json

Small random float32 models of `tests/families.py`, one change at a time (`tests/gguf/key_cases.py`). The last line is
JSON: per key and architecture the verdicts, and the largest difference between logits here and in llama.cpp over the
standard deviation of the logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.gguf.key_cases import DEVIATIONS, IDS, Outcome, as_close, measured
from tests.oracles.llama_cpp_many import server

from hybridkv.gguf.architectures import ARCHITECTURES
from perplexity import commit, cpu_name


def cell(outcomes: list[Outcome], plain: Outcome) -> list[object]:
    """Verdicts of a key in an architecture, and the largest difference of what was compared."""
    apart = [o.apart / o.spread for o in outcomes if o.apart is not None and as_close(o, plain)]
    verdicts = sorted({outcome.verdict for outcome in outcomes})
    return [" ".join(verdicts), float(f"{max(apart):.1e}") if apart else None]


def main() -> None:
    """Measure all architectures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="where the JSON goes, besides standard output")
    output: Path | None = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keys: dict[str, dict[str, list[object]]] = defaultdict(dict)
    plain_apart, n_files = {}, 0
    with server(IDS) as running, tempfile.TemporaryDirectory() as name:
        for architecture in ARCHITECTURES:
            plain, *outcomes = measured(architecture, running, Path(name))
            assert plain.apart is not None
            plain_apart[architecture] = float(f"{plain.apart / plain.spread:.1e}")
            n_files += len(outcomes) + 1
            by_key: dict[str, list[Outcome]] = defaultdict(list)
            for outcome in outcomes:
                by_key[outcome.key].append(outcome)
                if not as_close(outcome, plain) and (architecture, outcome.key) not in DEVIATIONS:
                    print(f"{architecture}: {outcome}")
            for key, its in by_key.items():
                keys[key][architecture] = cell(its, plain)
            print(f"{architecture}: {len(outcomes)} files, unchanged {plain_apart[architecture]:.0e} apart", flush=True)
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for (architecture, key), reason in DEVIATIONS.items():
        reasons[key][reason].append(architecture)
    result = {
        "commit": commit(),
        "machine": cpu_name(),
        "llama_cpp": version("llama-cpp-python"),
        "transformers": version("transformers"),
        "gguf": version("gguf"),
        "tokens": len(IDS),
        "files": n_files,
        "plain": plain_apart,
        "deviations": reasons,
        "keys": keys,
    }
    text = json.dumps(result)
    if output is not None:
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(cells)}" for key, cells in keys.items())
        head = json.dumps({name: value for name, value in result.items() if name != "keys"}, indent=1)
        output.write_text(f'{head[:-2]},\n "keys": {{\n{rows}\n}}}}\n', encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
