"""Write the generated parts of the documentation: formats, command line, the README's tables.

python docs/generate.py           # write
python docs/generate.py --check   # exit 1 if a file would change
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 110


def formats_page() -> str:
    """docs/formats.md: the table of formats."""
    from hybridkv.formats import FORMATS

    lines = [
        "# KV cache formats",
        "",
        "Written by `docs/generate.py` from `hybridkv.formats.FORMATS`. Bytes are those of a row (one token, one head).",
        "",
        "| type | ggml id | bits per value (D=128) | bytes at D=64 / 80 / 128 / 256 | values per scale | planes | scale rules |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in FORMATS.values():
        sizes = " / ".join(str(f.row_bytes(d)) for d in (64, 80, 128, 256))
        per_scale = {None: "a row", 1: "-"}.get(f.block, str(f.block))
        planes = ", ".join(p.role for p in f.planes)
        rules = " ".join(f"**{s}**" if s == f.default_scale and f.symmetric else s for s in f.scales) or "-"
        lines.append(
            f"| {f.name} | {f.ggml_type} | {f.bits_per_value(128):g} | {sizes} | {per_scale} | {planes} | {rules} |"
        )
    lines += [
        "",
        "The default scale rule is in bold. The rule with which the bytes equal the C reference, and that reference:",
        "",
    ]
    lines += [f"- `{f.name}`: {f.reference_scale}. Source: {f.source}" for f in FORMATS.values() if f.is_quantized]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """docs/cli.md: the help pages."""
    from hybridkv.cli.main import build_parser

    os.environ["COLUMNS"] = str(WIDTH)
    _, commands = build_parser()
    parts = ["# The command line", "", "Written by `docs/generate.py` from the parsers."]
    for name, command in commands.items():
        parts += ["", f"## hybridkv {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def perplexity_table(data: dict[str, Any]) -> str:
    """The README's table by cache type, from the bench's JSON."""
    rows = [row for row in data["rows"] if "@" not in row["type"]]  # scale rules: docs/decisions/scale-refit.md
    base = rows[0]["perplexity"]
    lines = [
        "| K/V type | bytes per token | perplexity | change | mean KLD from f16 | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["type"].replace("+kv", " -khad -vhad").replace("+k", " -khad")
        cells = [name, row["bytes_per_token"], f"{row['perplexity']:.4f}"]
        if row is rows[0]:
            cells += ["", "", ""]
        else:
            change = f"{100 * (row['perplexity'] / base - 1):+.3f} %"
            cells += [change, f"{row['mean_kld']:.1e}", f"{100 * row['same_top']:.2f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    c = data["conditions"]
    lines += [
        "",
        f"`python bench/perplexity.py`: {c['model']}, weights as float32, {c['text']}, context {c['context']}, "
        f"{c['tokens']} tokens, prefill in chunks of 512, hybridkv {c['hybridkv']}, torch {c['torch']}, "
        f"Transformers {c['transformers']}, kernel {c['kernel']}, {c['cpu']}, commit {c['commit']}.",
    ]
    return "\n".join(lines)


def plan_block() -> str:
    """The README's example of `hybridkv plan`, run."""
    from hybridkv.cli.main import main as command

    options = ["-c", "131072", "--types", "f16,q8_0,q6_0,q4_0", "--dtype", "bf16", "--memory", "80GiB"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command(["plan", "-m", str(ROOT / "tests/data/qwen3.5-35b-a3b/config.json"), *options])
    assert code == 0
    lines = [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]
    return "\n".join(["```text", f"$ hybridkv plan -m qwen3.5-35b-a3b/config.json {' '.join(options)}", *lines, "```"])


def readme() -> str:
    """README.md with its generated parts renewed."""
    text = (ROOT / "README.md").read_text()
    data = json.loads((ROOT / "docs/measurements/perplexity.json").read_text())
    parts = {"perplexity": perplexity_table(data), "plan": plan_block()}
    for name, body in parts.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert marked.search(text), name
        text = marked.sub(lambda m, body=body: m[1] + body + "\n" + m[2], text)
    return text


def main() -> int:
    """Write or check every generated file."""
    stale = 0
    for path, content in (("docs/formats.md", formats_page()), ("docs/cli.md", cli_page()), ("README.md", readme())):
        target = ROOT / path
        if target.is_file() and target.read_text() == content:
            continue
        stale += 1
        if "--check" not in sys.argv:
            target.write_text(content)
        print(f"{'stale' if '--check' in sys.argv else 'wrote'} {path}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
