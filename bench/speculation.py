"""What guessing tokens ahead does to the speed of `hybridkv run`: on texts that repeat, and on texts that do not.

HYBRIDKV_ISA=avx2 python bench/speculation.py [-m FILE.gguf] [-t 1] [-ctk q8_0 -ctv q8_0] [-n 256] [-r 3]
    [--tasks code] [--spec auto]

Each task is generated without guesses and with them in turn, which must give the same tokens; the figure is the ratio
of the best speeds of both, for other programs only make a run slower. Tasks: `code`, a file that is written again with
a name changed; `quotes`, a page and sentences of it again; `held`: held-out pages, by which a model's own head is
judged; all greedy. `sampled`: a page that goes on with the default sampling. `random`: tokens drawn from all the
vocabulary, after tokens drawn likewise: nothing repeats, and no guess can hold. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridkv.cache import KVTypes
from hybridkv.cli.spec_options import head_guesser
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.engine.speculation import Speculation
from hybridkv.engine.steps import resolve_step
from hybridkv.kernels import cpu_native
from hybridkv.model import kv_facts, vocab_size_of
from hybridkv.policy import Guard, Policy
from hybridkv_lab.machine import machine

HERE = Path(__file__).parent
GREEDY = SamplingParams(temp=0)
N_CTX = 4096


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and how it is gone on from."""

    name: str
    prompt: list[int]
    params: SamplingParams


def tasks_of(loaded: Loaded, n_seeds: int = 2) -> Iterator[Task]:
    """All tasks, of one name side by side."""

    def ids(text: str) -> list[int]:
        assert loaded.tokenizer is not None
        return list(loaded.tokenizer(text).input_ids)

    page = (HERE.parent / "tests/data/heldout_excerpt.txt").read_text()
    for name, old, new in (("redirects", "redirects", "moved"), ("centrality", "scores", "ranks")):
        code = (HERE / f"texts/{name}.txt").read_text()
        begin = code[: code.index("\n") + 1].replace(old, new)
        yield Task("code", ids(f"{code}\n# The same file, with {old} renamed to {new}:\n\n{begin}"), GREEDY)
    for start in (1200, 9000):
        text = page[start : start + 1600]
        first = text[: text.index(".", 200) + 1]
        yield Task("quotes", ids(f"{text}\n\nSummary of the page, with quotes:\n\n{first[-160:]}"), GREEDY)
    for start in range(0, 6 * 3000, 3000):
        yield Task("held", ids(page[start : start + 1200]), GREEDY)
    for seed in range(n_seeds):
        yield Task("sampled", ids(page[4000 : 5600 + seed]), SamplingParams(seed=seed))
        draw = torch.Generator().manual_seed(seed)
        n_vocab = vocab_size_of(loaded.model.config)
        noise = torch.randint(3, n_vocab, (300,), generator=draw).tolist()
        flat = SamplingParams(temp=1000, top_k=0, top_p=1, min_p=0, seed=seed)
        yield Task("random", noise, flat)


def measure(task: Task, run: Callable[[Task, bool], tuple[list[int], Engine]], repeats: int) -> dict[str, Any]:
    """Both ways in turn; the same tokens, or an error."""
    speeds, with_guesses = [], []
    for _ in range(repeats):
        plain, off = run(task, False)
        guessed, on = run(task, True)
        if plain != guessed:
            sys.exit(f"{task.name}: the text with guesses is another one")
        assert on.cache is not None  # takes the last run's guesses into the counts
        speeds.append(off.timings.generation_tok_s)
        with_guesses.append(on.timings.generation_tok_s)
    t = on.timings
    return {
        "task": task.name,
        "prompt_tokens": len(task.prompt),
        "off_tok_s": max(speeds),
        "on_tok_s": max(with_guesses),
        "ratio": max(with_guesses) / max(speeds),
        "median_ratio": statistics.median(with_guesses) / statistics.median(speeds),
        "guessed": t.n_guessed,
        "right": t.n_right,
        "tokens_per_run": t.n_generated / max(1, t.n_runs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-ctk", default="q8_0")
    parser.add_argument("-ctv", default="q8_0")
    parser.add_argument("-n", type=int, default=256)
    parser.add_argument("-r", "--repeats", type=int, default=3)
    parser.add_argument("--tasks", default="code,quotes,held,sampled,random")
    parser.add_argument("--spec", choices=("auto", "ngram", "mtp"), default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--draft-max", type=int, default=7)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    description = describe(a.model or bundled_model())
    loaded = load(description, dtype=torch.float32, device="cpu", weights=a.weights)
    step = resolve_step(description.config, "cpu")(loaded.model)
    specs = Policy(KVTypes(a.ctk, a.ctv)).resolve(kv_facts(description.facts))

    def run(task: Task, guesses: bool) -> tuple[list[int], Engine]:
        speculation = Speculation(n_max=a.draft_max) if guesses else None
        if speculation is not None and a.spec != "ngram":
            speculation.make_guesser = head_guesser(step, a.spec) or speculation.make_guesser
        engine = Engine(
            loaded.model, specs, n_ctx=N_CTX, guard=Guard(), notify=print, step=step, speculation=speculation
        )
        return [token for (token,) in engine.generate(task.prompt, task.params, n_predict=a.n)], engine

    wanted = a.tasks.split(",")
    rows = []
    print(f"{step.name}, {cpu_native.isa()}, --spec {a.spec}, -t {a.threads}, {a.ctk}/{a.ctv}, {a.n} tokens, ", end="")
    print(f"best of {a.repeats}")
    print("task      prompt   off tok/s   on tok/s   ratio   right   tokens a run")
    for task in sorted(tasks_of(loaded), key=lambda task: wanted.index(task.name) if task.name in wanted else -1):
        if task.name not in wanted:
            continue
        run(task, True)  # warm-up
        row = measure(task, run, a.repeats)
        rows.append(row)
        share = f"{100 * row['right'] / row['guessed']:.0f} %" if row["guessed"] else "-"
        print(
            f"{row['task']:9s} {row['prompt_tokens']:6d} {row['off_tok_s']:11.0f} {row['on_tok_s']:10.0f} "
            f"{row['ratio']:7.2f} {share:>7s} {row['tokens_per_run']:9.2f}"
        )
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row["ratio"] for row in rows if row["task"] == name]
        print(f"{name}: {statistics.geometric_mean(own):.2f} of {len(own)}, least {min(own):.2f}")
    conditions = {"machine": machine(a.threads), "threads": a.threads, "isa": cpu_native.isa(), "spec": a.spec}
    print(json.dumps({**conditions, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
