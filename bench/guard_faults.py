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
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.families import FAMILIES, build
from tests.hf.faults import FAULTS, Fault

from hybridkv.cache import KVTypes
from hybridkv.cli.show import simple_table
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.errors import GuardError
from hybridkv.formats import get_format
from hybridkv.hf import ModelCache, cache_argument, kv_facts, layer_facts
from hybridkv.kernels import ENCODERS, KERNELS
from hybridkv.policy import Evidence, Guard, Ok, Policy, Verdict
from perplexity import TEXT, parse

TYPES = "f16,q8_0,q6_0,q5_1,q4_0,iq4_nl,q8_0+kv,q4_0+kv,q8_0/q4_0+v,hq3_nl,hq2_nl"


@dataclass(frozen=True)
class Recorder(Guard):
    """A guard that agrees with everything and remembers it."""

    seen: list[Evidence] = field(default_factory=list)

    def judge(self, evidence: Evidence) -> Verdict:
        self.seen.append(evidence)
        return Ok()


@dataclass(frozen=True)
class Subject:
    """A model to run: its name, its logits' function, and the tokens it sees."""

    name: str
    model: Any
    prompt: Tensor
    n_decode: int


def random_models(names: list[str]) -> Iterator[Subject]:
    for name in names:
        ids = torch.randint(3, 97, (2, 45 + 25), generator=torch.Generator().manual_seed(4))
        yield Subject(name, build(name, attention="hybridkv"), ids, 25)


def real_models() -> Iterator[Subject]:
    import pytest
    from tests.models import gemma3, smollm2

    paths: tuple[Callable[[], Path], ...] = (bundled_model, smollm2, gemma3)
    for find in paths:
        try:
            path = find()
        except pytest.skip.Exception:
            continue
        loaded = load(describe(path), dtype=torch.float32, device="cpu")
        ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[:20000])[:640]])
        yield Subject(loaded.description.name, loaded.model, ids, 34)


@torch.inference_mode()
def evidence(subject: Subject, types: KVTypes, fault: Fault | None) -> list[Evidence]:
    """What a run measures, call after call; ends with an infinite error where numbers stopped being finite."""
    guard = Recorder()
    model, ids = subject.model, subject.prompt
    specs = Policy(types).resolve(kv_facts(layer_facts(model.config)))
    sound = fault or Fault("", "")
    n_prompt = ids.shape[1] - subject.n_decode
    with sound.rotation():
        cache = ModelCache(
            model.config, specs, guard=guard, kernels=sound.kernels(KERNELS), encoders=sound.encoders(ENCODERS)
        )
        try:
            first = 0
            for size in (n_prompt, *[1] * subject.n_decode):
                positions = torch.arange(first, first + size).expand(len(ids), size)
                chunk = ids[:, first : first + size]
                model(chunk, position_ids=positions, logits_to_keep=1, **{cache_argument(model): cache})
                first += size
        except GuardError:
            guard.seen.append(Evidence(-1, types, math.inf))
    return guard.seen


def objects(seen: list[Evidence]) -> bool:
    return any(not isinstance(Guard().judge(e), Ok) for e in seen)


def touched(fault: Fault, types: KVTypes, specs: Any) -> bool:
    if fault.rotate is not None and not any(s.types.rotate_k or s.types.rotate_v for s in specs):
        return False
    return any(fault.touches(get_format(s.types.type_k), get_format(s.types.type_v)) for s in specs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--real", choices=("yes", "no", "only"), default="yes")
    parser.add_argument("--sound", action="store_true", help="sound runs alone")
    parser.add_argument("-o", "--output", type=Path)
    a = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []

    def subjects() -> Iterator[Subject]:
        if a.real != "only":
            yield from random_models(a.families.split(","))
        if a.real != "no":
            yield from real_models()

    for subject in subjects():
        for label in a.types.split(","):
            types = parse(label)
            specs = Policy(types).resolve(kv_facts(layer_facts(subject.model.config)))
            for fault in (None, *(() if a.sound else FAULTS)):
                if fault is not None and not touched(fault, types, specs):
                    continue
                seen = evidence(subject, types, fault)
                rows.append(
                    {
                        "model": subject.name,
                        "types": label,
                        "fault": fault.name if fault else None,
                        "error": max(e.error for e in seen),
                        "store": max(e.store_error for e in seen),
                        "kernel": max(e.kernel_error for e in seen),
                        "caught": objects(seen),
                    }
                )
        print(f"{subject.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if a.output:
        a.output.write_text("\n".join(json.dumps(r) for r in rows))
    groups = defaultdict(list)
    for r in rows:
        groups[(r["fault"] or "sound")].append(r)
    table = simple_table("fault", "runs", "objected", "error", "store", "kernel")
    for name, rs in groups.items():
        spread = [
            [min(x), statistics.median(x), max(x)] for x in ([r[k] for r in rs] for k in ("error", "store", "kernel"))
        ]
        table.add_row(
            name, str(len(rs)), str(sum(r["caught"] for r in rs)), *(" ".join(f"{y:.2g}" for y in x) for x in spread)
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
