"""One rank of a model on two, on a card of its own where there are cards, beside the whole model in the same process.

Run by torchrun: python -m torch.distributed.run --nproc-per-node 2 -m tests.hf.cut_model OUT DIRECTORY...

Writes `OUT-RANK.json`: what this rank holds, and how far its logits are from the whole model's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridkv.cache import KVTypes
from hybridkv.hf import EagerStep, ModelCache, quantized_cache
from hybridkv.hf.load import count_parameters, load_config, load_weights
from hybridkv.hf.ranks import exit_rank, local_rank, n_ranks, rank, same_everywhere
from hybridkv.model import kv_facts, layer_facts
from hybridkv.planner import plan
from hybridkv.policy import Policy

VOCABULARY = 96
"""Even: Transformers 5.17 cuts a head no other way."""
N_CTX = 64
PROMPT, STEPS = 20, 4
PAIRS = (("f32", "f32"), ("q8_0", "q4_0"))


@torch.inference_mode()
def logits(model: Any, cache: ModelCache) -> Tensor:
    """After a prompt in one piece, and after each of some tokens behind it."""
    ids = torch.arange(3, 3 + PROMPT + STEPS).remainder(VOCABULARY).unsqueeze(0)
    step = EagerStep(model)
    found = [step.logits(ids[:, :PROMPT], cache, 0)[0]]
    found += [step.forward(ids[:, i : i + 1], cache, i) for i in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(found)


def compare(directory: Path) -> dict[str, Any]:
    device = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": torch.float32, "device": device, "attn_implementation": "hybridkv"}
    whole = load_weights(directory, **options)
    cut = load_weights(directory, **options, n_ranks=n_ranks())
    found: dict[str, Any] = {"pairs": []}
    config = load_config(directory)
    for type_k, type_v in PAIRS:
        caches = [quantized_cache(m, type_k=type_k, type_v=type_v, n_ctx=N_CTX) for m in (whole, cut)]
        expected, seen = (logits(model, cache) for model, cache in zip((whole, cut), caches, strict=True))
        facts = layer_facts(config, n_ranks=n_ranks())
        planned = plan(Policy(KVTypes(type_k, type_v)).resolve(kv_facts(facts)), facts, n_ctx=N_CTX)
        (k, _), (k_cut, _) = (cache.kv_layers[0].decode(PROMPT) for cache in caches)
        heads = k_cut.shape[1]
        own = k[:, rank() * heads : (rank() + 1) * heads] if heads < k.shape[1] else k
        found["pairs"].append(
            {
                "logits": float((expected - seen).abs().max()),
                "largest": float(expected.abs().max()),
                "keys": float((own - k_cut).norm() / k_cut.norm()),
                "kv_bytes": [cache.kv_bytes for cache in caches],
                "state_bytes": [cache.state_bytes for cache in caches],
                "planned": [planned.kv_bytes, planned.state_bytes],
            }
        )
    local = [p.to_local() if isinstance(p, DTensor) else p for p in cut.parameters()]
    found["weights"] = [sum(p.numel() for p in local), count_parameters(config, n_ranks=n_ranks())]
    found["all_weights"] = count_parameters(config)
    found["agreed"] = same_everywhere(torch.tensor([rank() + 5]), cut).tolist()
    return found


def main() -> None:
    out, *directories = sys.argv[1:]
    results = {Path(d).name: compare(Path(d)) for d in directories}
    Path(f"{out}-{rank()}.json").write_text(json.dumps(results))
    exit_rank()


if __name__ == "__main__":
    main()
