"""What the guard's three numbers are on sound runs and with faults put in: evidence for its limits.

    python bench/guard_faults.py -o docs/measurements/guard-faults.json

Every fault of tests/hf/faults.py on every family of tests/families.py and on the real models that are installed, by
cache type. Numbers are recorded without acting on them; a run counts as caught if the guard, as it is, would have
objected to one of them, and a sound run as a false alarm. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.families import FAMILIES, build
from tests.hf.faults import FAULTS, Fault
from tests.models import gemma3, smollm2

from hybridkv.cache import KVSpec
from hybridkv.cli.show import simple_table
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.hf import ModelCache, cache_argument
from hybridkv.kernels import ENCODERS, KERNELS
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import ERROR_LIMIT, KERNEL_LIMIT, STORE_LIMIT, Evidence, Guard, NonFiniteError, Ok, Policy, Verdict
from perplexity import TEXT, commit, cpu_name, parse

TYPES = "q8_0,q6_0,q4_0+kv,iq4_nl,q8_0/q4_0+v,hq3_nl"
N_DECODE = 4


@dataclass(frozen=True)
class Recorder(Guard):
    """A guard that agrees with everything and remembers it."""

    seen: list[Evidence] = field(default_factory=list)

    def judge(self, evidence: Evidence) -> Verdict:
        """Always in favour."""
        self.seen.append(evidence)
        return Ok()


@dataclass(frozen=True)
class Subject:
    """A model, and the tokens that it sees: a prompt and `N_DECODE` single ones, past a block's edge."""

    name: str
    model: Any
    ids: Tensor
    n_pad: int = 0


def random_models(names: list[str]) -> Iterator[Subject]:
    """Two sequences of 30 tokens, the first of them padded on the left by 3."""
    for name in names:
        ids = torch.randint(3, 97, (2, 30 + N_DECODE), generator=torch.Generator().manual_seed(4))
        yield Subject(name, build(name, attention="hybridkv"), ids, n_pad=3)


def real_models() -> Iterator[Subject]:
    """Held-out text; more of it where a window of 512 tokens is to be passed."""
    lengths: tuple[tuple[Callable[[], Path], int], ...] = ((bundled_model, 286), (smollm2, 94), (gemma3, 542))
    for find, n_prompt in lengths:
        try:
            path = find()
        except pytest.skip.Exception:
            continue
        loaded = load(describe(path), dtype=torch.float32, device="cpu")
        assert loaded.tokenizer is not None
        ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[:20000])[: n_prompt + N_DECODE]])
        yield Subject(loaded.description.name, loaded.model, ids)


@torch.inference_mode()
def evidence(subject: Subject, specs: Sequence[KVSpec], fault: Fault) -> list[Evidence]:
    """What a run measures, call after call; ends with an infinite error where numbers stopped being finite."""
    guard = Recorder()
    model, ids = subject.model, subject.ids
    mask = torch.ones_like(ids)
    mask[0, : subject.n_pad] = 0
    n_prompt = ids.shape[1] - N_DECODE
    with fault.rotation():
        cache = ModelCache(
            model.config, specs, guard=guard, kernels=fault.kernels(KERNELS), encoders=fault.encoders(ENCODERS)
        )
        first = 0
        try:
            for size in (n_prompt, *[1] * N_DECODE):
                last = first + size
                positions = torch.arange(first, last).expand(len(ids), size)
                options = {cache_argument(model): cache, "attention_mask": mask[:, :last], "position_ids": positions}
                model(ids[:, first:last], **options, logits_to_keep=1)
                first = last
        except NonFiniteError as error:
            guard.seen.append(Evidence(error.layer or 0, specs[0].types, math.inf))
    return guard.seen


def objects(seen: list[Evidence]) -> bool:
    return any(not isinstance(Guard().judge(e), Ok) for e in seen)


def record(subject: Subject, label: str, fault: Fault | None) -> dict[str, Any] | None:
    """The largest of each number in a run, and whether the guard objects; None if the fault is not at work."""
    specs = Policy(parse(label)).resolve(kv_facts(layer_facts(subject.model.config)))
    if fault is not None and not fault.at_work(specs, padded=subject.n_pad > 0):
        return None
    seen = evidence(subject, specs, fault or Fault("none", "none"))
    return {
        "model": subject.name,
        "types": label,
        "kind": fault.kind if fault else None,
        "fault": fault.name if fault else None,
        "error": max(e.error for e in seen),
        "store_error": max(e.store_error for e in seen),
        "kernel_error": max(e.kernel_error for e in seen),
        "caught": objects(seen),
    }


NUMBERS = ("error", "store_error", "kernel_error")


def summary(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the documentation's tables are made of: each fault over all models, and each model over all faults."""
    by_fault: dict[tuple[str | None, str | None], list[dict[str, Any]]] = defaultdict(list)
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_fault[row["kind"], row["fault"]].append(row)
        by_model[row["model"]].append(row)
    return {
        "faults": [_of_fault(kind, fault, group) for (kind, fault), group in by_fault.items()],
        "models": [_of_model(model, group) for model, group in by_model.items()],
    }


def _of_fault(kind: str | None, fault: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    spans = {key: [_short(pick(row[key] for row in rows)) for pick in (min, max)] for key in NUMBERS}
    above = sum(row["error"] > ERROR_LIMIT for row in rows)
    caught = sum(row["caught"] for row in rows)
    return {"kind": kind, "fault": fault, "runs": len(rows), "caught": caught, "error_above_limit": above, **spans}


def _of_model(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    sound = [row for row in rows if row["fault"] is None]
    faulty = [row for row in rows if row["fault"] is not None]
    return {
        "model": model,
        "sound": len(sound),
        "alarms": sum(row["store_error"] > STORE_LIMIT or row["kernel_error"] > KERNEL_LIMIT for row in sound),
        "largest": {key: _short(max(row[key] for row in sound)) for key in NUMBERS},
        "faulty": len(faulty),
        "missed": [f"{row['fault']} ({row['types']})" for row in faulty if not row["caught"]],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def as_json(about: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> str:
    """One row to a line."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    parts += [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in tables.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def show(rows: list[dict[str, Any]]) -> None:
    """One line per fault: how many runs, how many the guard objects to, and the three numbers' smallest and largest."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["fault"] or "none: sound runs"].append(row)
    table = simple_table("fault", "runs", "objected", "error", "store error", "kernel error")
    for name, group in groups.items():
        spans = []
        for key in NUMBERS:
            values = [row[key] for row in group]
            spans.append(f"{min(values):.2g} .. {max(values):.2g}")
        table.add_row(name, str(len(group)), str(sum(row["caught"] for row in group)), *spans)
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--models", choices=("all", "random", "real"), default="all")
    parser.add_argument(
        "--faults",
        choices=("all", "half", "none"),
        default="all",
        help="half: on every second type, by turns from model to model; none: sound runs alone",
    )
    parser.add_argument("-o", "--output", type=Path, help="the summary that the documentation is generated from")
    parser.add_argument("--rows", type=Path, help="every run, a line each; with -o")
    a = parser.parse_args()
    measured = commit()
    transformers.utils.logging.set_verbosity_error()
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    subjects = chain(
        random_models(a.families.split(",")) if a.models != "real" else (),
        real_models() if a.models != "random" else (),
    )
    for index, subject in enumerate(subjects):
        for turn, label in enumerate(a.types.split(",")):
            faulty_too = a.faults == "all" or (a.faults == "half" and (index + turn) % 2 == 0)
            for fault in (None, *(FAULTS if faulty_too else ())):
                row = record(subject, label, fault)
                rows += [] if row is None else [row]
        print(f"{subject.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if a.output:  # after each model: a long run that is ended early keeps what it has
            about = {"commit": measured, "cpu": cpu_name(), "torch": torch.__version__}
            about |= {"transformers": transformers.__version__, "kernels": [k.name for k in KERNELS]}
            a.output.write_text(as_json(about, summary(rows)))
            if a.rows:
                a.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show(rows)
    sound = [row for row in rows if row["fault"] is None]
    faulty = [row for row in rows if row["fault"] is not None]
    false_alarms = sum(row["caught"] for row in sound)
    missed = sum(not row["caught"] for row in faulty)
    print(json.dumps({"sound": len(sound), "false_alarms": false_alarms, "faulty": len(faulty), "missed": missed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
