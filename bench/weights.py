"""What holding the weights costs on the CPU: bytes, tokens/s, and the divergence from weights as they are in the file.

    python bench/weights.py --speed random-0.8b-q8_0.gguf                     # of bench/random_model.py
    python bench/weights.py -m FILE.gguf --kinds auto,f32 --cache f32 --rounds 0    # a file's own types, no timing
    python bench/weights.py -m FILE.gguf --kinds auto,auto/int8    # 8-bit activations beside 15-bit ones

Divergence: the model's own next-token distributions on held-out text, prefill in chunks of 512, against `plain`, which
is Transformers' layers with torch's float32 products of the decoded weights. Speed: rounds over all kinds, one token
per step after a prompt of 4, median over the rounds, with the CPU time of a token beside it, which other programs on
the machine disturb less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from hybridkv.cache import KVTypes
from hybridkv.cli.show import simple_table
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.engine.steps import parse_activations
from hybridkv.held import WeightKind, parse_weights
from hybridkv.kernels import cpu_native
from hybridkv.kernels.weights import Activations
from hybridkv.model import kv_facts
from hybridkv.native import NativeStep, bytes_by_type
from hybridkv.policy import Guard, Policy
from perplexity import CHUNK, TEXT, Score, commit, cpu_name, log_probs, parse

KINDS = ("f32", "bf16", "int8", "int4")
N_TOKENS = 32


def model_of(path: Path, kind: WeightKind) -> Loaded:
    return load(describe(path), dtype=torch.float32, device="cpu", weights=kind)


def held_bytes(loaded: Loaded) -> int:
    """Of all weights."""
    return sum(bytes_by_type(loaded.model.source).values())


def parse_kind(label: str) -> tuple[WeightKind, Activations]:
    """Read weights, and activations where they are not int16, of `auto` or `auto/int8`."""
    kind, _, activations = label.partition("/")
    return parse_weights(kind), parse_activations(activations or "int16")


def scores(path: Path, kinds: Sequence[str], n_ctx: int, n_windows: int, *, cache: str, chunk: int) -> dict[str, Score]:
    """Every kind and `plain` itself on the same windows, chunk by chunk."""
    plain = model_of(path, "plain")
    assert plain.tokenizer is not None
    ids = torch.tensor([plain.tokenizer.encode(TEXT.read_text()[: 8 * n_ctx * n_windows])])
    assert ids.shape[1] > n_ctx * n_windows, ids.shape
    done = {kind: Score() for kind in ("plain", *kinds)}
    asked = {kind: parse_kind(kind) for kind in done}
    models = {kind: plain if kind == "plain" else model_of(path, own[0]) for kind, own in asked.items()}
    for window in range(n_windows):
        part = ids[:, window * n_ctx : (window + 1) * n_ctx]
        targets = ids[0, window * n_ctx + 1 : (window + 1) * n_ctx + 1]
        outputs = (log_probs(models[kind], parse(cache), part, n_ctx, chunk, asked[kind][1]) for kind in done)
        for index, (reference, *others) in enumerate(zip(*outputs, strict=True)):
            for score, output in zip(done.values(), (reference, *others), strict=True):
                score.add(output, reference, targets[index * chunk :][: len(output)])
    return done


def speeds(path: Path, kinds: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, tokens/s, and milliseconds of CPU time a token."""
    models = {kind: model_of(path, parse_kind(kind)[0]) for kind in kinds}
    specs = Policy(KVTypes("f16", "f16")).resolve(kv_facts(describe(path).facts))
    steps = {kind: NativeStep(loaded.model, parse_kind(kind)[1]) for kind, loaded in models.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    cpu_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, loaded in models.items():
            engine = Engine(loaded.model, specs, n_ctx=256, guard=Guard(), notify=print, step=steps[kind])
            tokens = engine.generate([1, 2, 3, 4], SamplingParams(temp=0), n_predict=N_TOKENS + 1)
            next(tokens)  # the prompt's
            start = time.process_time()
            for _ in tokens:
                pass
            cpu_ms[kind].append((time.process_time() - start) / N_TOKENS * 1e3)
            rates[kind].append(engine.timings.generation_tok_s)
    return {
        kind: {
            "bytes": held_bytes(models[kind]),
            "tok_s": statistics.median(rates[kind]),
            "cpu_ms": statistics.median(cpu_ms[kind]),
        }
        for kind in kinds
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("--speed", type=Path, help="another model to time (default: the same)")
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="of held-out text; 0: speed alone (default 4)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--cache", default="f16", help="types of K and V (default f16)")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens that are processed at once (default {CHUNK})")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0: none (default 3)")
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measured = commit()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    kinds = arguments.kinds.split(",")
    for kind in kinds:
        parse_kind(kind)
    speed = speeds(arguments.speed or arguments.model, kinds, arguments.rounds) if arguments.rounds else {}
    with torch.inference_mode():
        how = {"cache": arguments.cache, "chunk": arguments.chunk}
        score = scores(arguments.model, kinds, arguments.context, arguments.windows, **how) if arguments.windows else {}
    names = ("weights", "bytes", "tokens/s", "CPU ms/token", "perplexity", "change", "mean KLD", "same top")
    table, rows = simple_table(*names, left=("weights",)), []
    base = math.exp(score["plain"].nll / score["plain"].n) if score else math.nan
    for kind in score or speed:
        row: dict[str, Any] = {"weights": kind, **speed.get(kind, {})}
        if score:
            s = score[kind]
            row |= {"perplexity": math.exp(s.nll / s.n), "mean_kld": s.kld / s.n, "same_top": s.same_top / s.n}
            row["change"] = row["perplexity"] / base - 1
        rows.append(row)
        forms = {"bytes": "d", "tok_s": ".1f", "cpu_ms": ".1f"}
        forms |= {"perplexity": ".4f", "change": "+.3%", "mean_kld": ".2e", "same_top": ".2%"}
        table.add_row(kind, *(format(row[name], form) if name in row else "-" for name, form in forms.items()))
    Console(width=120).print(table)
    conditions = {
        "model": arguments.model.name,
        "timed": (arguments.speed or arguments.model).name,
        "tokens": arguments.context * arguments.windows,
        "context": arguments.context,
        "cache": arguments.cache,
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
