"""How much error in the attention output a model bears: evidence for the guard's limit.

    python bench/guard_limit.py

White noise of a given relative size is added to every KV layer's attention output; perplexity and divergence from
the clean run are measured on held-out text. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace

import torch
import transformers
from rich.console import Console
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.cli.show import simple_table
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.hf import ModelCache, cache_argument
from hybridkv.kernels import KERNELS, AttentionParams, Kernel, KVView
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from perplexity import TEXT, Score


def noisy(kernel: Kernel, size: float, generator: torch.Generator) -> Kernel:
    """A kernel whose output has noise of `size` times its root mean square."""

    def attend(q: Tensor, view: KVView, params: AttentionParams) -> Tensor:
        out = kernel.attend(q, view, params)
        return out + size * out.square().mean().sqrt() * torch.randn(out.shape, generator=generator)

    return replace(kernel, attend=attend)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--sizes", default="0.01,0.02,0.05,0.1,0.15,0.25,0.5,1.0")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    loaded = load(describe(bundled_model()), dtype=torch.float32, device="cpu")
    n_ctx = arguments.context
    ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[: 16 * n_ctx])[: n_ctx + 1]])
    specs = Policy(KVTypes("f32", "f32")).resolve(kv_facts(loaded.description.facts))

    def log_probs(size: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        kernels = tuple(noisy(k, size, generator) for k in KERNELS)
        cache = ModelCache(loaded.model.config, specs, n_ctx=n_ctx, guard=Guard(mode="off"), kernels=kernels)
        logits = loaded.model(ids[:, :n_ctx], **{cache_argument(loaded.model): cache}).logits[0]
        return torch.log_softmax(logits.float(), -1)

    clean = log_probs(0.0)
    table = simple_table("noise", "perplexity", "change", "mean KLD", "same top")
    rows, base = [], 0.0
    for size in (0.0, *map(float, arguments.sizes.split(","))):
        score = Score()
        score.add(log_probs(size), clean, ids[0, 1:])
        ppl, kld, same = math.exp(score.nll / score.n), score.kld / score.n, score.same_top / score.n
        base = base or ppl
        rows.append({"noise": size, "perplexity": ppl, "mean_kld": kld, "same_top": same})
        table.add_row(
            f"{size:g}", f"{ppl:.4f}", f"{100 * (ppl / base - 1):+.2f} %", f"{kld:.1e}", f"{100 * same:.1f} %"
        )
    Console(width=100).print(table)
    print(json.dumps({"model": loaded.description.name, "context": n_ctx, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
