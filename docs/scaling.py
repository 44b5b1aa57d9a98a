"""The sizing tables of docs/scaling.md, counted by `hybridkv plan`."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
CARD = 80 * GIB
N_CTX = 131072
TYPES = ("f16", "q8_0", "q4_0")

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
"""The sizes that Llama 3.1 70B's config.json gives; no weights are needed to count."""


def _plans(model: Path, ranks: int, *options: str) -> dict[str, dict[str, Any]]:
    """`hybridkv plan --json` by type of K and V."""
    from hybridkv.cli.main import main as command

    output = io.StringIO()
    words = ["-m", str(model), "-c", str(N_CTX), "--types", ",".join(TYPES), "--device", "cuda", "--memory", "80GiB"]
    with contextlib.redirect_stdout(output):
        assert command(["plan", "--json", "--tp", str(ranks), *words, *options]) == 0
    return {row["type_k"]: row for row in json.loads(output.getvalue())["plans"]}


def _models(directory: str) -> dict[str, tuple[Path, tuple[int, ...]]]:
    dense = Path(directory) / "llama-70b"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps(LLAMA_70B))
    return {
        "Qwen3.5-35B-A3B (10 KV layers of 2 heads)": (ROOT / "tests/data/qwen3.5-35b-a3b/config.json", (1, 2)),
        "Llama 3.1 70B (80 KV layers of 8 heads)": (dense, (1, 2, 4, 8)),
    }


def replicas_speed_table() -> str:
    """Replicas beside one process, as measured."""
    data = json.loads((ROOT / "docs/measurements/serve-replicas.json").read_text())
    lines = ["| | clients | tokens/s, all together | first token after |", "|---|---|---|---|"]
    lines += [f"| {r['variant']} | {r['clients']} | {r['tok_s']:.0f} | {r['first_ms']:.0f} ms |" for r in data["rows"]]
    conditions = (
        f"`python bench/serve_replicas.py`: {data['cpu']}, {data['cores']} cores, shared; the bundled model, q8_0; each "
        f"client {data['turns']} turns of {data['tokens']} tokens; median of {data['rounds']} rounds; hybridkv "
        f"{data['hybridkv']}, commit {data['commit']}, Ray {data['ray']}."
    )
    return "\n".join([*lines, "", conditions])


def ranks_table() -> str:
    """What one of several ranks holds."""
    lines = [
        "| model | ranks | K and V | KV | states | weights bf16 | one rank in all | largest context in 80 GiB a rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as directory:
        for name, (path, counts) in _models(directory).items():
            for ranks in counts:
                for kind, row in _plans(path, ranks).items():
                    sizes = [f"{row[key] / GIB:.2f} GiB" for key in ("kv_bytes", "state_bytes", "weight_bytes")]
                    most = row["largest_n_ctx"] or "does not fit"
                    total = f"{row['total_bytes'] / GIB:.2f} GiB"
                    lines.append(f"| {name} | {ranks} | {kind} | " + " | ".join([*sizes, total, str(most)]) + " |")
    return "\n".join(
        [*lines, "", f"`hybridkv plan -m MODEL -c {N_CTX} --device cuda --memory 80GiB --tp RANKS`, one sequence."]
    )


def replicas_table() -> str:
    """How many sequences replicas hold at once."""
    lines = [
        "| K and V | one sequence: KV and states | at once on one 80 GiB card | on two replicas | on two ranks |",
        "|---|---|---|---|---|",
    ]
    path = ROOT / "tests/data/qwen3.5-35b-a3b/config.json"
    whole, cut = _plans(path, 1), _plans(path, 2)
    for kind in TYPES:
        one = whole[kind]["kv_bytes"] + whole[kind]["state_bytes"]
        most = (CARD - whole[kind]["weight_bytes"]) // one
        of_rank = (CARD - cut[kind]["weight_bytes"]) // (cut[kind]["kv_bytes"] + cut[kind]["state_bytes"])
        lines.append(f"| {kind} | {one / GIB:.2f} GiB | {most} | {2 * most} | {of_rank} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Qwen3.5-35B-A3B, bf16 weights, {N_CTX} tokens a sequence, nothing left for activations and prefixes.",
        ]
    )
