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

from architecture import architecture_page
from cuda import attention_cuda_table, step_cuda_35b_table, step_cuda_table
from features import features_page
from guard import cost_table, faults_table, real_faults_table
from scaling import ranks_table, replicas_speed_table, replicas_table
from serving import conversations_table, engine_table, load_table
from tuned import tuning_table

from families import families_page, speed_table
from gguf_keys import keys_page
from quality import pictures, quality_table, recommended_table, targets_table

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
        rules = " ".join(f"**{s}**" if s == f.default_scale and f.refit else s for s in f.scales) or "-"
        lines.append(
            f"| {f.name} | {f.ggml_type} | {f.bits_per_value(128):g} | {sizes} | {per_scale} | {planes} | {rules} |"
        )
    lines += [
        "",
        "The default scale rule is in bold. The rule with which the bytes equal the C reference, and that reference:",
        "",
    ]
    lines += [
        f"- `{f.name}`: {f.reference_scale}. Source: {f.source}"
        for f in FORMATS.values()
        if f.is_quantized and not f.rotated
    ]
    lines += [
        "",
        "Types with ids from 1000 on are [ours](decisions/own-formats.md), for rotated rows; ggml does not read them.",
    ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """docs/cli.md: the help pages."""
    from hybridkv.cli.main import build_parser

    os.environ["COLUMNS"] = str(WIDTH)
    _, commands = build_parser()
    parts = ["# The command line", "", "Written by `docs/generate.py` from the parsers."]
    parts += [
        "",
        "Options that llama-cli, llama-server and ik_llama.cpp have too are spelled as they spell them; the others of theirs are",
        "accepted or refused by name: [from-llama-cpp.md](from-llama-cpp.md). `plan` accepts `run`'s, and says which change",
        "nothing.",
    ]
    for name, command in commands.items():
        parts += ["", f"## hybridkv {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(parts) + "\n"


def llama_cpp_page() -> str:
    """docs/from-llama-cpp.md: every option of llama.cpp and ik_llama.cpp, and what it is here."""
    from hybridkv.cli.llama_cpp import LLAMA_OPTIONS, accepted_names
    from hybridkv.cli.main import build_parser

    _, commands = build_parser()
    own = {c: commands[c]._option_string_actions.keys() - accepted_names(commands[c]) for c in ("run", "serve")}
    lines = [
        "# From llama.cpp: every option, and what it is here",
        "",
        "Written by `docs/generate.py` from `hybridkv.cli.llama_cpp`. `hybridkv run` stands for llama-cli, `hybridkv serve` for",
        "llama-server; the lists are those of llama.cpp and ik_llama.cpp (`tests/data/options`). `plan` takes `run`'s line.",
        "",
        "- **same**: honoured under the same name, by the commands that are named.",
        "- *note*: accepted; one line on stderr says what it is here. The answer does not change.",
        "- refused: an error, because the answer would be another one. Values that turn the option off are accepted.",
        "",
        "Environment variables do what their options do; an option on the command line comes first.",
        "",
        "| option | variable | here | |",
        "|---|---|---|---|",
    ]
    for option in LLAMA_OPTIONS:
        has = [command for command, names in own.items() if set(option.names) & names]
        here = f"**same** ({', '.join(has)})" if has else "*note*" if option.fate == "note" else "refused"
        options = ", ".join(f"`{name}`" for name in option.names)
        variable = f"`{option.env}`" if option.env else ""
        lines.append(f"| {options} | {variable} | {here} | {option.text} |")
    return "\n".join(lines) + "\n"


def plan_block() -> str:
    """An example of `hybridkv plan`, run."""
    from hybridkv.cli.main import main as command

    options = ["-c", "131072", "--types", "f16,q8_0,q6_0,q4_0", "--device", "cuda", "--memory", "80GiB"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = command(["plan", "-m", str(ROOT / "tests/data/qwen3.5-35b-a3b/config.json"), *options])
    assert code == 0
    lines = [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]
    return "\n".join(["```text", f"$ hybridkv plan -m qwen3.5-35b-a3b/config.json {' '.join(options)}", *lines, "```"])


def load_measured(name: str) -> dict[str, Any]:
    """A committed result of a bench."""
    data: dict[str, Any] = json.loads((ROOT / "docs/measurements" / f"{name}.json").read_text())
    return data


def conditions_line(command: str, data: dict[str, Any]) -> str:
    """What a table was measured with."""
    machine, versions = data["machine"], data["versions"]
    peers = ", ".join(peer["about"] for peer in data["peers"].values())
    return (
        f"`{command}`: {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {machine['threads']} threads; "
        f"hybridkv {versions['hybridkv']}, commit {data['commit']}, torch {versions['torch']}; peers: {peers}."
    )


def attention_table(data: dict[str, Any]) -> str:
    """Kernels beside their peers."""
    lines = [
        "| shape | type | ms (p10-p90) | GB/s | GFLOP/s | of ceiling | 2 threads over 1 | error | ik ms | over ik | torch ms | over torch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in data["cases"]:
        shape, time = case["shape"], case["time"]
        ms, peers = time["median_ms"], case["peer_ms"]
        what = (
            f"D={shape['head_dim']} {shape['n_heads']}/{shape['n_kv_heads']} T={shape['n_new']} S={shape['n_stored']}"
        )
        cells = [
            what,
            case["kv_type"],
            f"{ms:.3g} ({time['p10_ms']:.3g}-{time['p90_ms']:.3g})",
            f"{case['gb_s']:.1f}",
            f"{case['gflop_s']:.0f}",
            f"{case['of_ceiling']:.0%} ({case['bound']})",
            f"{case['scaling']:.2f}x",
            f"{case['error']:.0e}",
        ]
        for peer in ("ik", "torch"):
            cells += [f"{peers[peer]:.3g}", f"**{peers[peer] / ms:.2f}x**"]
        lines.append("| " + " | ".join(cells) + " |")
    c = data["ceilings"]
    lines += [
        "",
        conditions_line("hybridkv bench attention --against ik,torch -t 2 --json", data),
        f"Ceilings of the same run: {c['read_gb_s']:.1f} GB/s read out of memory, {c['float_gmac_s']:.0f} and "
        f"{c['integer_gmac_s']:.0f} G multiply-adds/s of bfloat16 and int8 tiles.",
    ]
    return "\n".join(lines)


def store_table(data: dict[str, Any]) -> str:
    """How fast rows are stored."""
    lines = ["| type | GB/s of float32 input, one core |", "|---|---|"]
    lines += [f"| {row['kv_type']} | {row['bulk_gb_s']:.2f} |" for row in data["store"]]
    return "\n".join(lines)


def steps_table(name: str, command: str) -> str:
    """A whole model beside ik_llama.cpp."""
    data = load_measured(name)
    lines = ["| | type | hybridkv tokens/s | ik_llama.cpp tokens/s | ratio |", "|---|---|---|---|---|"]
    rows = [("prompt of 2048", row) for row in data["prompt"]]
    rows += [(f"generation at depth {row['depth']}", row) for row in data["steps"]]
    for what, row in rows:
        speeds = row["tok_s"]
        cells = (
            what,
            row["kv_type"],
            f"{speeds['hybridkv']:.1f}",
            f"{speeds['ik']:.1f}",
            f"**{row['ratio']['ik']:.2f}x**",
        )
        lines.append("| " + " | ".join(cells) + " |")
    gates = "; ".join(
        f"{g['kv_type']}: logits within {g['difference']:.1e} of ik's, {g['agreed']} of 16 greedy tokens the same"
        for g in data["gates"]
    )
    return "\n".join([*lines, "", conditions_line(command, data), f"{gates}."])


def perplexity_ik_table() -> str:
    """Perplexity by type beside ik_llama.cpp's."""
    data = load_measured("perplexity_ik")
    lines = ["| K and V | hybridkv | ik_llama.cpp | ours over theirs |", "|---|---|---|---|"]
    for row in data["rows"]:
        name = row["type"].replace("+kv", " -khad -vhad").replace("+k", " -khad")
        change = f"{100 * (row['hybridkv'] / row['ik'] - 1):+.3f} %"
        lines.append(f"| {name} | {row['hybridkv']:.4f} | {row['ik']:.4f} | {change} |")
    c = data["conditions"]
    lines += [
        "",
        f"`python bench/perplexity_ik.py`: {c['model']}, {c['text']}, {c['tokens']} tokens in windows of {c['context']}, "
        f"{c['cpu']}, commit {c['commit']}; {c['ik']}.",
    ]
    return "\n".join(lines)


def performance() -> str:
    """docs/performance.md with its tables renewed."""
    attention = load_measured("attention")
    return with_parts(
        "docs/performance.md",
        {
            "attention": attention_table(attention),
            "store": store_table(attention),
            "perplexity-ik": perplexity_ik_table(),
            "attention-cuda": attention_cuda_table(),
            "step-cuda": step_cuda_table(),
            "step-cuda-35b": step_cuda_35b_table(),
            "families": speed_table(),
            "decode-29m-avx2": steps_table(
                "decode-29m-avx2", "HYBRIDKV_ISA=avx2 hybridkv bench decode --against ik -t 2"
            ),
            "decode-29m": steps_table("decode-29m", "hybridkv bench decode --against ik -t 2"),
            "decode-0.8b": steps_table(
                "decode-0.8b", "hybridkv bench decode -m random-0.8b-q8_0.gguf --against ik --prompt 512 -n 16 -t 2"
            ),
        },
    )


def with_parts(path: str, parts: dict[str, str]) -> str:
    """A page with its marked parts replaced."""
    text = (ROOT / path).read_text()
    for name, body in parts.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert marked.search(text), name
        text = marked.sub(lambda m, body=body: m[1] + body + "\n" + m[2], text)
    return text


def readme() -> str:
    """README.md with its generated parts renewed."""
    return with_parts("README.md", {"recommended": recommended_table(4, " [All types](docs/quality.md).")})


def weights() -> str:
    """docs/weights.md with its example renewed."""
    return with_parts("docs/weights.md", {"plan": plan_block()})


def quality() -> str:
    """docs/quality.md with its tables renewed."""
    tables = {name: quality_table(f"eval-{name}-decode") for name in ("reference", "smollm2", "gemma3")}
    return with_parts("docs/quality.md", {"recommended": recommended_table(), "targets": targets_table(), **tables})


def tuning() -> str:
    """docs/tuning.md with its table renewed."""
    return with_parts("docs/tuning.md", {"tuned": tuning_table()})


def guard() -> str:
    """docs/decisions/guard-limit.md with its tables renewed."""
    tables = {"faults": faults_table(), "real-faults": real_faults_table(), "cost": cost_table()}
    return with_parts("docs/decisions/guard-limit.md", tables)


def serving() -> str:
    """docs/serve.md with its tables renewed."""
    return with_parts(
        "docs/serve.md",
        {"engine": engine_table(), "conversations": conversations_table(), "load": load_table()},
    )


def scaling() -> str:
    """docs/scaling.md with its tables renewed."""
    parts = {"speed": replicas_speed_table(), "replicas": replicas_table(), "ranks": ranks_table()}
    return with_parts("docs/scaling.md", parts)


def main() -> int:
    """Write or check every generated file."""
    stale = 0
    pages = {
        "docs/formats.md": formats_page(),
        "docs/architecture.md": architecture_page(),
        "docs/cli.md": cli_page(),
        "docs/from-llama-cpp.md": llama_cpp_page(),
        "docs/gguf-keys.md": keys_page(),
        "docs/families.md": families_page(),
        "docs/features.md": features_page(),
        "docs/performance.md": performance(),
        "docs/quality.md": quality(),
        "docs/tuning.md": tuning(),
        "docs/decisions/guard-limit.md": guard(),
        "docs/scaling.md": scaling(),
        "docs/serve.md": serving(),
        "docs/weights.md": weights(),
        **pictures(),
        "README.md": readme(),
    }
    for path, content in pages.items():
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
