"""The generated tables of docs/performance.md on CUDA, from committed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"
BITS = {"q8_0": 8.5, "q6_0": 6.5, "q4_0": 4.5, "hq4_nl": 4.5, "hq3_nl": 3.5, "f16": 16.0}


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MEASUREMENTS / f"{name}.jsonl").read_text().splitlines()]


def attention_cuda_table() -> str:
    """Attention beside the best of torch's bfloat16 backends, case by case."""
    head, *records = _lines("attention-cuda-h100")
    shapes: dict[str, dict[str, Any]] = {}
    for record in records:
        case = shapes.setdefault(json.dumps(record["shape"]), {})
        if "torch" in record:
            case["torch"] = min(graph for graph, _ in record["torch"].values())
        else:
            case[record["type"]] = record
    cases = [(json.loads(text), case) for text, case in shapes.items()]
    errors = [r["ours"][0]["error"] for r in records if "ours" in r]
    conditions = (
        f"`python bench/attention.py --device cuda`: {head['device']}, torch {head['torch']}, Triton 3.6, copy "
        f"{head['copy_gb_s'] / 1000:.2f} TB/s; medians of graph replays, the error of every case at most {max(errors):.1e} (gate 2e-3)."
    )
    return "\n".join([*_one_token_table(cases), "", *_prompt_table(cases), "", conditions])


def _one_token_table(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    lines = [
        "| one token | torch bf16, best, us | "
        + " | ".join(f"{kv_type}: us, times torch, of ideal" for kv_type in BITS)
        + " | store of K and V, q8_0, us |",
        "|---|---|" + "---|" * (len(BITS) + 1),
    ]
    for s, case in cases:
        if s["t"] > 1:
            continue
        cells = [f"D={s['d']} {s['hq']}/{s['hkv']}, batch {s['b']}, S={s['s']}", f"{case['torch']:.0f}"]
        for kv_type, bits in BITS.items():
            ours = case[kv_type]["ours"][0]["graph_us"]
            ratio = case["torch"] / ours
            cells.append(f"{ours:.0f}, {ratio:.2f}, {ratio * bits / 16:.2f}")
        lines.append("| " + " | ".join([*cells, f"{case['q8_0']['store_us']:.1f}"]) + " |")
    return lines


def _prompt_table(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    lines = [
        "| 2048 tokens | queries | torch bf16, best, us | "
        + " | ".join(f"{kv_type}: us, times torch" for kv_type in BITS)
        + " |",
        "|---|---|---|" + "---|" * len(BITS),
    ]
    for s, case in cases:
        if s["t"] == 1:
            continue
        for dtype, key in (("float16", "float16_us"), ("bfloat16", "graph_us")):
            cells = [f"D={s['d']} {s['hq']}/{s['hkv']}, over {s['s'] - s['t']}", dtype, f"{case['torch']:.0f}"]
            times = [case[kv_type]["ours"][0][key] for kv_type in BITS]
            cells += [f"{ours:.0f}, {case['torch'] / ours:.2f}" for ours in times]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _peers_table() -> list[str]:
    """Transformers in its other forms, decode."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name in ("step-cuda-h100", "step-cuda-h100-fla", "step-cuda-h100-compiled"):
        for r in _lines(name):
            if r["part"] in ("baseline decode", "compiled decode"):
                found.setdefault((r["n_seqs"], r["depth"]), {})[name] = r["ms"]
    lines = [
        "| batch | depth | Transformers eager, ms | with flash-linear-attention 0.6.0 | compiled, static cache |",
        "|---|---|---|---|---|",
    ]
    for (n_seqs, depth), ms in found.items():
        cells = [f"{ms[name]:.1f}" if name in ms else "not run" for name in (*list(ms)[:2], "step-cuda-h100-compiled")]
        lines.append("| " + " | ".join([str(n_seqs), str(depth), *cells]) + " |")
    return lines


def _step_cells(r: dict[str, Any], stored: str) -> tuple[str, ...]:
    """A decode step's case, how its rows are stored, its times and its floor."""
    times = (f"{r[name]:.2f}" for name in ("ms", "p90_ms", "floor_ms", "times_floor"))
    return str(r["n_seqs"]), str(r["depth"]), stored, *times


def _decode_table(records: list[dict[str, Any]]) -> list[str]:
    baseline = {(r["n_seqs"], r["depth"]): r["ms"] for r in records if r["part"] == "baseline decode"}
    lines = [
        "| batch | depth | type | ms a step | 90th percentile | floor, ms | times floor | tokens/s | Transformers, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if r["part"] == "decode":
            more = f"{r['tok_s']:.0f}", f"{baseline[r['n_seqs'], r['depth']]:.1f}"
            lines.append("| " + " | ".join((*_step_cells(r, r["type"]), *more)) + " |")
    return lines


def _exact_rows_table() -> list[str]:
    lines = [
        "| batch | depth | type, with its exact rows | ms a step | 90th percentile | floor, ms | times floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in _lines("step-cuda-h100-tail"):
        if r["part"] == "decode":
            stored = f"{r['type']}, tail {r['tail']}, sinks {r['sink']}"
            lines.append("| " + " | ".join(_step_cells(r, stored)) + " |")
    return lines


def _memory_table(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| context | type | planned, GiB | peak, GiB | over the plan |", "|---|---|---|---|---|"]
    for r in records:
        if r["part"] == "memory":
            cells = (
                *(str(r["n_ctx"]), r["type"], f"{r['planned_gib']:.2f}", f"{r['peak_gib']:.2f}"),
                f"{100 * r['over']:.1f} %",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _prompts(records: list[dict[str, Any]]) -> str:
    ours = ", ".join(f"{r['type']} {r['tok_s']:.0f}" for r in records if r["part"] == "prefill")
    theirs = next(r["tok_s"] for r in records if r["part"] == "baseline prefill")
    return f"Prompt of 4096 tokens, tokens/s: {ours}; Transformers {theirs:.0f}"


def _conditions(records: list[dict[str, Any]], options: str, geometry: str) -> str:
    c = records[0]
    return (
        f"`python bench/step_cuda.py {options}`, memory in a run of its own: {c['card']}, torch {c['torch']}, "
        f"Transformers {c['transformers']} (eager, DynamicCache, its torch code for the recurrent layers), "
        f"{c['parameters_b']:.2f} B random bfloat16 weights at a {geometry}, copy {c['copy_tb_s']:.2f} TB/s, "
        f"{c['date']}. The floor is weights, packed rows and states, read once at that speed."
    )


def step_cuda_table() -> str:
    """Whole decode steps, prefill and memory."""
    records = _lines("step-cuda-h100")
    with_fla = next(r["tok_s"] for r in _lines("step-cuda-h100-fla") if r["part"] == "baseline prefill")
    lines = [
        *_decode_table(records),
        "",
        f"{_prompts(records)}, with flash-linear-attention {with_fla:.0f}.",
        "",
        *_exact_rows_table(),
        "",
        *_peers_table(),
        "",
        *_memory_table(records),
        "",
        _conditions(records, "--parts check,decode,prefill,memory,baseline", "Qwen3.5-4B-like geometry"),
    ]
    return "\n".join(lines)


def step_cuda_35b_table() -> str:
    """The same of a model with experts."""
    records = _lines("step-cuda-h100-35b")
    geometry = "Qwen3.5-35B-A3B-like geometry with 20 of its 40 layers"
    lines = [
        *_decode_table(records),
        "",
        f"{_prompts(records)}.",
        "",
        *_memory_table(records),
        "",
        _conditions(records, "--geometry 35b --depths 4096,32768", geometry)
        + " Of experts the floor counts those that a step chooses.",
    ]
    return "\n".join(lines)
