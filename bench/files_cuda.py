"""Whole steps of GGUF files on one CUDA device, all weights on the card: decode, prompts, several sequences, memory.

The parts of packed_cuda.py over files that another program reads too. Figures come only after the check: logits of a
prompt and of single tokens against the CPU engine on the same file, rows of the first type that is measured.

    python bench/files_cuda.py 4b-q4_k_m.gguf 4b-q8_0.gguf --out files.jsonl
    python bench/files_cuda.py 35b-q4_k_m.gguf --types q8_0,q4_0 --allowed 0.1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hybridkv.cache import KVTypes
from hybridkv.engine.caches import new_cache
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.engine.steps import resolve_step
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from packed_cuda import PackedBench, measure, packed_parser
from step_cuda_model import CHECK, compare_logits, say, synchronize


class FileBench(PackedBench):
    """Of a file that lies on the card."""

    @property
    def read(self) -> int:
        """Bytes of the file's matrices that one token reads: of routed experts, the chosen ones."""
        config, total = self.model.config.get_text_config(decoder=True), 0
        for name, shape in self.model.source.shapes():
            if len(shape) < 2:
                continue
            part = self.model.source.weight(name).nbytes
            if "_exps." in name:
                part = part * config.num_experts_per_tok // config.num_experts
            total += 0 if name == "token_embd.weight" and self.model.source.has("output.weight") else part
        return total


def opened(options: argparse.Namespace, path: Path, bandwidth: float) -> FileBench:
    """Put a file's weights on the card."""
    start = time.perf_counter()
    description = describe(path)
    model: Any = load(description, dtype=torch.float32, device=options.device, weights="auto").model
    step: Any = resolve_step(description.config, torch.device(options.device).type, notify=say)(model)
    model.n_bytes = getattr(getattr(step, "_decoder", step), "n_bytes", model.source.n_bytes)
    bench = FileBench(options, model, path.stem, step, bandwidth)
    synchronize()
    gib, peak = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
    seconds = time.perf_counter() - start
    bench.report("load", seconds=seconds, step=step.name, weights_gib=model.n_bytes / 2**30, gib=gib, peak_gib=peak)
    if "check" in options.parts:
        check(bench, description)
    return bench


def check(bench: FileBench, description: Any) -> None:
    """Compare logits with the CPU engine on the same file.

    Raises
    ------
    SystemExit
        If they differ by more than is allowed.
    """
    kind = bench.options.types[0]
    specs = Policy(KVTypes(kind, kind)).resolve(kv_facts(description.facts))
    cpu = load(description, dtype=torch.float32, device="cpu", weights="auto").model
    exact, measured = (
        (step, new_cache(model, specs, n_ctx=64, guard=Guard(mode="off"), notify=say))
        for step, model in ((resolve_step(description.config, "cpu")(cpu), cpu), (bench.step, bench.model))
    )
    errors, same = compare_logits(exact, measured, 250)
    bench.report("check", errors=", ".join(f"{error:.1e}" for error in errors), same_best=f"{same} of {len(CHECK)}")
    if not max(errors) < bench.options.allowed:
        raise SystemExit(f"the check failed: logits may differ by {bench.options.allowed}")


def main() -> int:
    """Run the parts that are asked for."""
    parser = packed_parser(__doc__, parts=["check", "decode", "prefill", "memory"], types=["q8_0", "q4_0"])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--allowed", type=float, default=5e-2, help="of logits, relative to their norm")
    options = parser.parse_args()
    with torch.inference_mode():
        measure(options, options.files, opened)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
