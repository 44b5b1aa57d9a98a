"""What holding the weights costs on the CPU: bytes, tokens/s, and the divergence from weights as they are in the file.

    python bench/weights.py --speed random-0.8b-q8_0.gguf    # of bench/random_model.py

Divergence: the model's own next-token distributions on held-out text, an f16 cache, prefill in chunks of 512, against
`plain`. Speed: rounds over all kinds, one token per step after a prompt of 4, median over the rounds. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from rich.console import Console

from hybridkv.cache import KVTypes
from hybridkv.cli.show import simple_table
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.hf import NativeStep, WeightKind, kv_facts, packed_bytes
from hybridkv.kernels import cpu_native
from hybridkv.kernels.linear import WeightType
from hybridkv.policy import Guard, Policy
from perplexity import CHUNK, TEXT, Score, commit, cpu_name, log_probs, parse

KINDS: tuple[WeightKind, ...] = ("f32", "bf16", "int8", "int4")
N_TOKENS = 32


def model_of(path: Path, kind: WeightKind) -> Loaded:
    return load(describe(path), dtype=torch.float32, device="cpu", weights=kind)


def held_bytes(loaded: Loaded) -> int:
    """Of packed matrices."""
    types: tuple[WeightType, ...] = get_args(WeightType)
    return sum(packed_bytes(loaded.model, kind) for kind in types)


def scores(path: Path, n_ctx: int, n_windows: int) -> dict[WeightKind, Score]:
    """Every kind and `plain` itself on the same windows."""
    plain = model_of(path, "plain")
    assert plain.tokenizer is not None
    ids = torch.tensor([plain.tokenizer.encode(TEXT.read_text()[: 8 * n_ctx * n_windows])])
    assert ids.shape[1] > n_ctx * n_windows, ids.shape
    done: dict[WeightKind, Score] = {kind: Score() for kind in ("plain", *KINDS)}
    models = {kind: plain if kind == "plain" else model_of(path, kind) for kind in done}
    for window in range(n_windows):
        part = ids[:, window * n_ctx : (window + 1) * n_ctx]
        targets = ids[0, window * n_ctx + 1 : (window + 1) * n_ctx + 1]
        reference = list(log_probs(plain, parse("f16"), part, n_ctx))
        for kind, score in done.items():
            outputs = reference if kind == "plain" else log_probs(models[kind], parse("f16"), part, n_ctx)
            for index, output in enumerate(outputs):
                score.add(output, reference[index], targets[index * CHUNK :][: len(output)])
    return done


def speeds(path: Path, rounds: int) -> dict[WeightKind, dict[str, float]]:
    """Tokens/s of each round and bytes."""
    models = {kind: model_of(path, kind) for kind in KINDS}
    specs = Policy(KVTypes("f16", "f16")).resolve(kv_facts(models["f32"].description.facts))
    steps = {kind: NativeStep(loaded.model) for kind, loaded in models.items()}
    seen: dict[WeightKind, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, loaded in models.items():
            engine = Engine(loaded.model, specs, n_ctx=256, guard=Guard(), notify=print, step=steps[kind])
            for _ in engine.generate([1, 2, 3, 4], SamplingParams(temp=0), n_predict=N_TOKENS):
                pass
            seen[kind].append(engine.timings.generation_tok_s)
    return {
        kind: {"bytes": held_bytes(models[kind]), "tok_s": statistics.median(rates), "best_tok_s": max(rates)}
        for kind, rates in seen.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("--speed", type=Path, help="another model to time (default: the same)")
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measured = commit()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    speed = speeds(arguments.speed or arguments.model, arguments.rounds)
    with torch.inference_mode():
        score = scores(arguments.model, arguments.context, arguments.windows)
    table = simple_table(
        "weights", "bytes", "tokens/s", "perplexity", "change", "mean KLD", "same top", left=("weights",)
    )
    base = math.exp(score["plain"].nll / score["plain"].n)
    rows: list[dict[str, Any]] = []
    for kind, s in score.items():
        ppl, kld, same = math.exp(s.nll / s.n), s.kld / s.n, s.same_top / s.n
        timed = speed.get(kind, {})
        rows.append({"weights": kind, "perplexity": ppl, "mean_kld": kld, "same_top": same, **timed})
        tok_s, n_bytes = (f"{timed[k]:.{n}f}" if timed else "-" for k, n in (("tok_s", 1), ("bytes", 0)))
        change = f"{100 * (ppl / base - 1):+.3f} %"
        table.add_row(kind, n_bytes, tok_s, f"{ppl:.4f}", change, f"{kld:.2e}", f"{100 * same:.2f} %")
    Console(width=120).print(table)
    conditions = {
        "model": arguments.model.name,
        "timed": (arguments.speed or arguments.model).name,
        "tokens": score["plain"].n,
        "context": arguments.context,
        "isa": cpu_native.isa(),
        "threads": arguments.threads,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "commit": measured,
    }
    print(json.dumps({"conditions": conditions, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
