"""What the guard costs: prefill with `check` against `off`, in interleaved pairs. The last line is JSON.

python bench/guard_cost.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
import transformers

from hybridkv.cache import KVTypes
from hybridkv.engine.load import bundled_model, describe, load
from hybridkv.hf import ModelCache, cache_argument, kv_facts
from hybridkv.policy import Guard, GuardMode, Policy
from perplexity import TEXT, commit, cpu_name


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="64,512")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    loaded = load(describe(bundled_model()), dtype=torch.float32, device="cpu")
    ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[:20000])])
    specs = Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(loaded.description.facts))

    def seconds(mode: GuardMode, n: int) -> float:
        cache = ModelCache(loaded.model.config, specs, n_ctx=4096, guard=Guard(mode=mode))
        start = time.perf_counter()
        loaded.model(ids[:, :n], **{cache_argument(loaded.model): cache}, logits_to_keep=1)
        return time.perf_counter() - start

    rows = []
    for n in map(int, arguments.tokens.split(",")):
        seconds("off", n)
        pairs = [(seconds("check", n), seconds("off", n)) for _ in range(arguments.pairs)]
        ratios = sorted(check / off for check, off in pairs)
        row = {
            "tokens": n,
            "check_ms": 1e3 * statistics.median(c for c, _ in pairs),
            "off_ms": 1e3 * statistics.median(o for _, o in pairs),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        }
        rows.append(row)
        print(
            f"{n} tokens: check {row['check_ms']:.1f} ms, off {row['off_ms']:.1f} ms, ratio {row['ratio_median']:.3f}"
        )
    print(json.dumps({"model": loaded.description.name, "cpu": cpu_name(), "commit": commit(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
