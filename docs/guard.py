"""The generated tables of docs/decisions/guard-limit.md: the guard's numbers with faults put in, and what it costs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hybridkv.policy.guard import ERROR_LIMIT, KERNEL_LIMIT, STORE_LIMIT

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"
NUMBERS = ("error", "store_error", "kernel_error")


def _load(name: str) -> Any:
    return json.loads((MEASUREMENTS / f"{name}.json").read_text())


def faults_table() -> str:
    """Of random models of all families: each fault, how often it was caught, and the three numbers."""
    data = _load("guard-faults")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in data["rows"]:
        groups["none: sound" if row["fault"] is None else f"{row['kind']}: {row['fault']}"].append(row)
    lines = ["| fault | runs | caught | error | store error | kernel error |", "|---|---|---|---|---|---|"]
    for name in sorted(groups, key=lambda name: (name != "none: sound", name.split(":")[0])):
        rows = groups[name]
        spans = [f"{min(r[n] for r in rows):.2g} .. {max(r[n] for r in rows):.2g}" for n in NUMBERS]
        lines.append("| " + " | ".join([name, str(len(rows)), str(sum(r["caught"] for r in rows)), *spans]) + " |")
    return "\n".join([*lines, "", _summary(data)])


def real_faults_table() -> str:
    """Of real models: sound runs, and faults caught and missed."""
    data = _load("guard-faults-real")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in data["rows"]:
        groups[row["model"]].append(row)
    lines = [
        "| model | sound runs | false alarms of store or kernel | largest store error | largest kernel error | faults | missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, rows in groups.items():
        sound = [r for r in rows if r["fault"] is None]
        faulty = [r for r in rows if r["fault"] is not None]
        alarms = sum(r["store_error"] > STORE_LIMIT or r["kernel_error"] > KERNEL_LIMIT for r in sound)
        largest = [f"{max(r[n] for r in sound):.1e}" for n in NUMBERS[1:]]
        missed = [f"{r['fault']} ({r['types']})" for r in faulty if not r["caught"]]
        cells = [model, str(len(sound)), str(alarms), *largest, str(len(faulty)), ", ".join(missed) or "0"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _conditions(data, "python bench/guard_faults.py --models real")])


def _summary(data: dict[str, Any]) -> str:
    sound = [r for r in data["rows"] if r["fault"] is None]
    faulty = [r for r in data["rows"] if r["fault"] is not None]
    alone = sum(r["error"] <= ERROR_LIMIT for r in faulty)
    return (
        f"**False alarms {sum(r['caught'] for r in sound)} of {len(sound)}, missed "
        f"{sum(not r['caught'] for r in faulty)} of {len(faulty)}.** The error alone, against {ERROR_LIMIT}, would have missed "
        f"{alone}, and objected to {sum(r['error'] > ERROR_LIMIT for r in sound)} sound runs.\n"
        + _conditions(data, "python bench/guard_faults.py --models random --faults half")
    )


def _conditions(data: dict[str, Any], command: str) -> str:
    return (
        f"`{command}`: {data['cpu']}, {', '.join(data['kernels'])}, torch {data['torch']}, Transformers "
        f"{data['transformers']}, commit {data['commit']}."
    )


def cost_table() -> str:
    """What `check` adds to prompts and answers."""
    runs = _load("guard-cost")
    lines = [
        "| model | threads | what | off, ms | check adds, ms | ratio, median | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for row in run["rows"]:
            what = (
                f"{row['decode']} tokens after {row['prompt']}"
                if row["decode"]
                else f"prompt of {row['prompt']} tokens"
            )
            low, high = row["ratio_quartiles"]
            cells = [run["model"], str(run["threads"]), what, f"{row['off_ms']:.1f}", f"{row['added_ms']:.1f}"]
            cells += [f"**{row['ratio_median']:.3f}**", f"{low:.3f} .. {high:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    engines = ", ".join(dict.fromkeys(f"{run['model']}: {run['engine']}" for run in runs))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    r = runs[0]
    return "\n".join(
        [
            *lines,
            "",
            f"`python bench/guard_cost.py`, q4_0, `check` and `off` in turns: {r['cpu']}, torch {r['torch']}, Transformers "
            f"{r['transformers']}, commits {commits}; {engines}.",
        ]
    )
