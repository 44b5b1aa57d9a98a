"""docs/gguf-keys.md: what is made of every GGUF metadata key. Called by `generate.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MEASUREMENT = Path(__file__).parent / "measurements/gguf-keys.json"


def keys_measured() -> dict[str, Any]:
    """Of every key, by architecture: verdicts, and the difference of logits."""
    keys: dict[str, Any] = json.loads(_MEASUREMENT.read_text())["keys"]
    return keys


def keys_page() -> str:
    """The page, of the committed measurement and the tables in `hybridkv.gguf.keys`."""
    from hybridkv.gguf.keys import HARMLESS, NEUTRAL

    data: dict[str, Any] = json.loads(_MEASUREMENT.read_text())
    everywhere = tuple(data["plain"])
    lines = [
        "# GGUF metadata keys",
        "",
        "Written by `docs/generate.py` from `docs/measurements/gguf-keys.json` and the tables of `hybridkv.gguf.keys`.",
        "",
        "No key of a file's own architecture is passed over in silence. A key is *read*: it changes the model as it does in",
        "llama.cpp. Or it is *harmless*: the model is the same with and without it, here and in llama.cpp. Or the file is",
        "*refused* by the key's name, since another model would be computed than the file describes. A key that is in none of",
        "these tables gives a notice when the model is loaded. Where a key stands in two columns, it depends on its value.",
        "Sizes, for which no reason is given, are refused because other ones, or none, do not fit the tensors.",
        "",
        f"`python bench/gguf_keys.py`: {data['files']} files, each a small random float32 model with one thing added, changed",
        f"or removed; logits of {data['tokens']} tokens in Transformers' classes beside llama.cpp's (llama-cpp-python",
        f"{data['llama_cpp']}, float32 cache). Differences are the largest of any logit, over the logits' standard deviation.",
        f"Keys are those of gguf-py {data['gguf']} and a few more. transformers {data['transformers']}, {data['machine']},",
        f"commit {data['commit']}.",
        "",
        "| architecture | difference of the unchanged file | keys read | harmless | refused |",
        "|---|---|---|---|---|",
    ]
    for architecture in everywhere:
        verdicts = [cells[architecture][0].split() for cells in data["keys"].values() if architecture in cells]
        counts = " | ".join(str(sum(word in each for each in verdicts)) for word in ("read", "harmless", "refused"))
        lines.append(f"| {architecture} | {data['plain'][architecture]:.0e} | {counts} |")
    lines += [
        "",
        "## Keys",
        "",
        "| key | read | harmless | refused | largest difference | expected, or why |",
        "|---|---|---|---|---|---|",
    ]
    for key, cells in data["keys"].items():
        where = {
            word: [name for name, (verdicts, _) in cells.items() if word in verdicts.split()]
            for word in ("read", "harmless", "refused")
        }
        apart = [difference for _, difference in cells.values() if difference is not None]
        why = HARMLESS.get(key) or (NEUTRAL[key].expected if key in NEUTRAL else "")
        lines.append(
            f"| `{key}` | " + " | ".join(_named(names, everywhere) for names in where.values()) + f" | "
            f"{f'{max(apart):.0e}' if apart else ''} | {why} |"
        )
    lines += ["", "## Differences on purpose", ""]
    lines += [
        f"- `{key}` ({_named(names, everywhere)}): {reason}."
        for key, reasons in data["deviations"].items()
        for reason, names in reasons.items()
    ]
    return "\n".join(lines) + "\n"


def _named(names: list[str], everywhere: tuple[str, ...]) -> str:
    missing = [name for name in everywhere if name not in names]
    if not missing:
        return "all"
    return f"all but {', '.join(missing)}" if names and len(missing) <= 4 else ", ".join(names)
