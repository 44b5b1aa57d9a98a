"""What the guard costs: `check` against `off` in interleaved pairs, prefill and decode. The last line is JSON.

python bench/guard_cost.py
python bench/guard_cost.py -m SmolLM2.gguf --backend eager --pairs 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from hybridkv.cli.model_options import limit_spinning

limit_spinning()  # as the commands do, before torch is imported

import torch  # noqa: E402
import transformers  # noqa: E402

from hybridkv.cache import KVTypes  # noqa: E402
from hybridkv.engine.load import bundled_model, describe, load  # noqa: E402
from hybridkv.engine.steps import parse_backend, resolve_step  # noqa: E402
from hybridkv.hf import ModelCache  # noqa: E402
from hybridkv.model import kv_facts  # noqa: E402
from hybridkv.policy import Guard, GuardMode, Policy  # noqa: E402
from perplexity import TEXT, commit, cpu_name  # noqa: E402


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, default=bundled_model())
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", default="64,512,2048")
    parser.add_argument(
        "--decode", type=int, default=256, help="tokens of an answer after the smallest prompt; 0: none"
    )
    parser.add_argument("--pairs", type=int, default=15)
    a = parser.parse_args()
    measured = commit()
    transformers.utils.logging.set_verbosity_error()
    loaded = load(describe(a.model), dtype=torch.float32, device="cpu", weights="auto")
    assert loaded.tokenizer is not None
    ids = torch.tensor([loaded.tokenizer.encode(TEXT.read_text()[:40000])])
    specs = Policy(KVTypes("q4_0", "q4_0")).resolve(kv_facts(loaded.description.facts))
    step = resolve_step(loaded.model.config, "cpu", parse_backend(a.backend))(loaded.model)

    def seconds(mode: GuardMode, n_prompt: int, n_decode: int) -> float:
        """Of the prompt, or of the tokens after it if there are any. No fallback: the limit is out of reach."""
        guard = Guard(mode=mode, limit=1e9)
        cache = ModelCache(loaded.model.config, specs, n_ctx=4096, guard=guard)
        start = time.perf_counter()
        step.forward(ids[:, :n_prompt], cache, 0)
        if n_decode:
            start = time.perf_counter()
            for i in range(n_prompt, n_prompt + n_decode):
                step.forward(ids[:, i : i + 1], cache, i)
        return time.perf_counter() - start

    def compare(n_prompt: int, n_decode: int) -> dict[str, Any]:
        seconds("check", n_prompt, n_decode)
        seconds("off", n_prompt, n_decode)
        pairs = []
        for i in range(a.pairs):  # in turns, also which of the two comes first
            modes: tuple[GuardMode, ...] = ("check", "off") if i % 2 else ("off", "check")
            taken = {mode: seconds(mode, n_prompt, n_decode) for mode in modes}
            pairs.append((taken["check"], taken["off"]))
        ratios = sorted(check / off for check, off in pairs)
        row: dict[str, Any] = {
            "prompt": n_prompt,
            "decode": n_decode,
            "check_ms": 1e3 * statistics.median(c for c, _ in pairs),
            "off_ms": 1e3 * statistics.median(o for _, o in pairs),
            "added_ms": 1e3 * statistics.median(c - o for c, o in pairs),
            "best_check_ms": 1e3 * min(c for c, _ in pairs),
            "best_off_ms": 1e3 * min(o for _, o in pairs),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        }
        what = f"{n_decode} tokens after {n_prompt}" if n_decode else f"prompt of {n_prompt}"
        low, high = row["ratio_quartiles"]
        print(
            f"{what}: check {row['check_ms']:.1f} ms, off {row['off_ms']:.1f} ms, ratio {row['ratio_median']:.3f} "
            f"({low:.3f} .. {high:.3f}); best {row['best_check_ms']:.1f} and {row['best_off_ms']:.1f} ms",
            flush=True,
        )
        return row

    prompts = [int(n) for n in a.tokens.split(",")]
    rows = [compare(n, 0) for n in prompts]
    if a.decode:
        rows.append(compare(prompts[0], a.decode))
    about = {"model": loaded.description.name, "backend": step.name, "cpu": cpu_name(), "commit": measured}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**about, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
