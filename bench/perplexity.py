"""Perplexity and divergence by cache type on held-out text, through the real prefill kernels.

    python bench/perplexity.py                      # the README's table
    python bench/perplexity.py --types f16,q4_0 --windows 1 --context 2048

Each window of the text is processed with an f16 cache first; every other type sees the same tokens and is compared
with it: perplexity, mean Kullback-Leibler divergence of the next-token distributions, and how often the most
likely token is the same. `f32` against `f16` shows the noise floor. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

import hybridkv
from hybridkv.cache import KVTypes
from hybridkv.cli.show import simple_table
from hybridkv.engine.load import Loaded, bundled_model, bundled_text, describe, load
from hybridkv.hf import EagerStep, ModelCache
from hybridkv.kernels import KERNELS
from hybridkv.kernels.weights import Activations
from hybridkv.model import kv_facts
from hybridkv.native import NativeModel, NativeStep
from hybridkv.policy import Guard, Policy, parse_scale

TEXT = bundled_text()
TYPES = "f32,bf16,q8_0,q8_1,q8_KV,q6_0,q5_1,q5_0,q4_1,q4_0,iq4_nl,q4_0+k,q4_0+kv,iq4_nl+kv,q8_0/q4_0,q4_0/q8_0"
CHUNK = 512
ROWS = 64
"""Positions that are compared at once: a row is as wide as the vocabulary."""


@dataclass
class Score:
    """Sums over all scored positions of one configuration."""

    nll: float = 0.0
    kld: float = 0.0
    same_top: int = 0
    n: int = 0

    def add(self, log_probs: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Score positions: log probabilities and the reference's `[n, V]`, next tokens `[n]`."""
        self.nll -= log_probs.gather(1, targets.unsqueeze(1)).double().sum().item()
        for ours, theirs in zip(log_probs.split(ROWS), reference.split(ROWS), strict=True):
            self.kld += (theirs.exp() * (theirs - ours)).sum(1).double().sum().item()
        self.same_top += int((reference.argmax(1) == log_probs.argmax(1)).sum())
        self.n += len(targets)


def parse(label: str) -> KVTypes:
    """`q4_0`, `q8_0/q4_0`, `q4_0+k`, `q4_0+kv`, `q4_0@absmax`: types, rotation, scale rule."""
    label, _, rule = label.partition("@")
    types, _, rotated = label.partition("+")
    k, _, v = types.partition("/")
    scale = parse_scale(rule) if rule else None
    return KVTypes(k, v or k, rotate_k="k" in rotated, rotate_v="v" in rotated, scale=scale)


@torch.inference_mode()
def log_probs(
    loaded: Loaded, types: KVTypes, ids: Tensor, n_ctx: int, chunk: int = CHUNK, activations: Activations = "int16"
) -> Any:
    """Yield log probabilities `[chunk, V]` after each position of ids `[1, n_ctx]`, chunk by chunk."""
    specs = Policy(types).resolve(kv_facts(loaded.description.facts))
    cache = ModelCache(loaded.model.config, specs, n_ctx=n_ctx, guard=Guard(mode="off"))
    native = isinstance(loaded.model, NativeModel)
    step = NativeStep(loaded.model, activations) if native else EagerStep(loaded.model)
    for index, part in enumerate(torch.split(ids, chunk, dim=1)):
        yield torch.log_softmax(step.logits(part, cache, index * chunk)[0], -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("-f", "--file", type=Path, default=TEXT)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("-c", "--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    measured = commit()  # now: the checkout may move on while this runs
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    loaded = load(describe(arguments.model), dtype=torch.float32, device="cpu")
    assert loaded.tokenizer is not None
    n_ctx, n_windows = arguments.context, arguments.windows
    text = arguments.file.read_text()[: 8 * n_ctx * n_windows]
    ids = torch.tensor([loaded.tokenizer.encode(text)])
    if ids.shape[1] < n_ctx * n_windows + 1:
        sys.exit(f"{arguments.file} has {ids.shape[1]} tokens, {n_ctx * n_windows + 1} are needed")
    labels = ["f16", *arguments.types.split(",")]
    scores = {label: Score() for label in labels}
    for window in range(n_windows):
        part = ids[:, window * n_ctx : (window + 1) * n_ctx]
        targets = ids[0, window * n_ctx + 1 : (window + 1) * n_ctx + 1]
        reference = list(log_probs(loaded, parse("f16"), part, n_ctx))
        for label in labels:
            outputs = reference if label == "f16" else log_probs(loaded, parse(label), part, n_ctx)
            for index, output in enumerate(outputs):
                scores[label].add(output, reference[index], targets[index * CHUNK :][: len(output)])
            print(f"window {window + 1}/{n_windows} {label}", file=sys.stderr, flush=True)
    report(loaded, scores, arguments, measured)
    return 0


def cpu_name() -> str:
    """The processor as Linux names it, or its architecture, with the number of cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, `-dirty` if the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def report(loaded: Loaded, scores: dict[str, Score], arguments: argparse.Namespace, measured: str) -> None:
    """The table for reading, then one line of JSON; `measured` is the commit."""
    facts = kv_facts(loaded.description.facts)
    base = math.exp(scores["f16"].nll / scores["f16"].n)
    table = simple_table("type", "bytes/token", "perplexity", "change", "mean KLD", "same top", left=("type",))
    rows = []
    for label, score in scores.items():
        size = sum(spec.bytes_per_token for spec in Policy(parse(label)).resolve(facts))
        ppl, kld, same = math.exp(score.nll / score.n), score.kld / score.n, score.same_top / score.n
        rows.append({"type": label, "bytes_per_token": size, "perplexity": ppl, "mean_kld": kld, "same_top": same})
        change = f"{100 * (ppl / base - 1):+.3f} %"
        table.add_row(label, str(size), f"{ppl:.4f}", change, f"{kld:.2e}", f"{100 * same:.2f} %")
    Console(width=120).print(table)
    conditions = {
        "model": loaded.description.name,
        "text": arguments.file.name,
        "context": arguments.context,
        "tokens": scores["f16"].n,
        "hybridkv": hybridkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": KERNELS[0].name,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "commit": measured,
    }
    print(json.dumps({"conditions": conditions, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
