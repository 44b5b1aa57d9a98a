"""The generated tables of docs/decisions/guard-limit.md: the guard's numbers with faults put in, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridkv.policy.guard import ERROR_LIMIT

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"
NUMBERS = ("error", "store_error", "kernel_error")


def _load(name: str) -> Any:
    return json.loads((MEASUREMENTS / f"{name}.json").read_text())


def faults_table() -> str:
    """Of random models of all families: each fault, how often it was caught, and the three numbers."""
    data = _load("guard-faults")
    lines = ["| fault | runs | caught | error | store error | kernel error |", "|---|---|---|---|---|---|"]
    for row in sorted(data["faults"], key=lambda row: (row["fault"] is not None, row["kind"] or "")):
        name = "none: sound" if row["fault"] is None else f"{row['kind']}: {row['fault']}"
        spans = [f"{row[n][0]:.2g} .. {row[n][1]:.2g}" for n in NUMBERS]
        lines.append("| " + " | ".join([name, str(row["runs"]), str(row["caught"]), *spans]) + " |")
    return "\n".join([*lines, "", _summary(data)])


def real_faults_table() -> str:
    """Of real models: sound runs, and faults caught and missed."""
    data = _load("guard-faults-real")
    lines = [
        "| model | sound runs | false alarms of store or kernel | largest store error | largest kernel error | faults | missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["models"]:
        largest = [f"{row['largest'][n]:.1e}" for n in NUMBERS[1:]]
        cells = [row["model"], str(row["sound"]), str(row["alarms"]), *largest, str(row["faulty"])]
        lines.append("| " + " | ".join([*cells, ", ".join(row["missed"]) or "0"]) + " |")
    return "\n".join([*lines, "", _conditions(data, "python bench/guard_faults.py --models real")])


def _summary(data: dict[str, Any]) -> str:
    sound = [r for r in data["faults"] if r["fault"] is None]
    faulty = [r for r in data["faults"] if r["fault"] is not None]
    n_sound, n_faulty = (sum(r["runs"] for r in rows) for rows in (sound, faulty))
    alone = n_faulty - sum(r["error_above_limit"] for r in faulty)
    return (
        f"**False alarms {sum(r['caught'] for r in sound)} of {n_sound}, missed "
        f"{n_faulty - sum(r['caught'] for r in faulty)} of {n_faulty}.** The error alone, against {ERROR_LIMIT}, would have missed "
        f"{alone}, and objected to {sum(r['error_above_limit'] for r in sound)} sound runs.\n"
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
    backends = ", ".join(dict.fromkeys(f"{run['model']}: {run['backend']}" for run in runs))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    r = runs[0]
    return "\n".join(
        [
            *lines,
            "",
            f"`python bench/guard_cost.py`, q4_0, `check` and `off` in turns: {r['cpu']}, torch {r['torch']}, Transformers "
            f"{r['transformers']}, commits {commits}; {backends}.",
        ]
    )
