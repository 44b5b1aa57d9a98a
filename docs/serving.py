"""The generated tables of docs/serve.md: several sequences at once, conversations, and a server under load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"
ENGINES = ("serve-engine-1", "serve-engine-2", "serve-engine-0.8b")


def _load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((MEASUREMENTS / f"{name}.json").read_text())
    return data


def engine_table() -> str:
    """Tokens per second of one and of several sequences."""
    lines = ["| model | threads | 1 sequence, tokens/s | 2 | 4 | 8 | 8 over 1 |", "|---|---|---|---|---|---|---|"]
    runs = [_load(name) for name in ENGINES]
    for run in runs:
        by_n = {row["n_seqs"]: row for row in run["throughput"]}
        speeds = [f"{by_n[n]['tok_s']:.0f}" for n in (1, 2, 4, 8)]
        lines.append(
            "| " + " | ".join([run["model"], str(run["threads"]), *speeds, f"**{by_n[8]['times_one']:.2f}x**"]) + " |"
        )
    r = runs[0]
    return "\n".join(
        [
            *lines,
            "",
            f"`python bench/serve_engine.py`, {r['types']}, {r['depth']} prompt tokens and 64 generated ones each, medians of "
            f"rounds in turns, every reply compared with that of the sequence alone: {r['cpu']}, {r['step']}, torch "
            f"{r['torch']}, commit {r['commit']}.",
        ]
    )


def conversations_table() -> str:
    """Prompt tokens of conversations of ten turns."""
    lines = [
        "| ten turns | prompt tokens processed | starting over | share | equal replies |",
        "|---|---|---|---|---|",
    ]
    for row in _load("serve-engine-1")["conversations"]:
        what = f"from {row['begin']} to {row['end']} tokens" if row["begin"] else f"from nothing to {row['end']} tokens"
        lines.append(
            f"| {what} | {row['processed']} | {row['starting_over']} | **{100 * row['share']:.1f} %** | "
            f"{row['same_replies']} of 10 |"
        )
    return "\n".join(lines)


def load_table() -> str:
    """Many clients for minutes."""
    r = _load("serve-load")
    mib = {name: value / 2**20 for name, value in r["rss_bytes"].items()}
    first, following = r["first_token"], r["next_token"]
    lines = [
        "| | |",
        "|---|---|",
        f"| clients, streaming, one request after another | {r['clients']}, for {r['seconds']:.0f} s |",
        f"| sequences at once (`-np`) | {r['parallel']} |",
        f"| replies as single-stream greedy gives them, in the same chunks | {r['right']}, of {r['cases']} prompts |",
        f"| wrong or mixed | **{r['wrong']}** |",
        f"| left in the middle, on purpose | {r['left_early']} |",
        f"| failed, told to retry, still running at the end | {r['failed']:.0f}, {r['told_to_retry']}, {r['still_running']:.0f} |",
        f"| first token after, waiting included | p50 {first['p50_ms'] / 1e3:.1f} s, p99 {first['p99_ms'] / 1e3:.1f} s |",
        f"| between tokens | p50 {following['p50_ms']:.0f} ms, p99 {following['p99_ms']:.0f} ms |",
        f"| tokens/s, all clients | {r['client_tokens_s']:.0f} |",
        f"| server's memory after a third, at the end, at most | {mib['after_a_third']:.0f}, {mib['end']:.0f}, "
        f"{mib['largest']:.0f} MiB |",
        f"| median of its last third less that before | {mib['median_second_half_less_first']:+.1f} MiB |",
        f"| exit code after SIGTERM | {r['server_exit_code']} |",
        "",
        f"`hybridkv run`, which takes prompts in larger chunks, gives {r['cases_as_run']} of the {r['cases']} replies: at a near-tie "
        "the order of summation decides.",
        "",
        f"`{r['command']}`: {r['cpu']}, {r['cores']} cores that clients and server share, {r['threads']} threads, {r['model']}, "
        f"{r['types']}, torch {r['versions']['torch']}, commit {r['commit']}.",
    ]
    return "\n".join(lines)
