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

import packed_cuda
from hybridkv.cache import KVTypes
from hybridkv.engine.caches import new_cache
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import HybridKVError
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from packed_cuda import PackedBench
from step_cuda_model import copy_bandwidth, say, synchronize

CHECK = (24, 8, 1, 1, 1)
"""Tokens of each call whose logits are compared: a prompt in two parts, and single tokens, the last two replayed."""


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
    pairs = [
        (step, new_cache(model, specs, n_ctx=64, guard=Guard(mode="off"), notify=say))
        for step, model in ((resolve_step(description.config, "cpu")(cpu), cpu), (bench.step, bench.model))
    ]
    seeded, position, errors, same = torch.Generator().manual_seed(5), 0, [], 0
    for n in CHECK:
        tokens = torch.randint(3, 250, (1, n), generator=seeded)
        exact, got = (step.forward(tokens, cache, position).cpu().double() for step, cache in pairs)
        errors.append(float((got - exact).norm() / exact.norm()))
        same += int(exact.argmax() == got.argmax())
        position += n
    bench.report("check", errors=", ".join(f"{error:.1e}" for error in errors), same_best=f"{same} of {len(CHECK)}")
    if not max(errors) < bench.options.allowed:
        raise SystemExit(f"the check failed: logits may differ by {bench.options.allowed}")


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--parts", type=names, default=["check", "decode", "prefill", "memory"])
    parser.add_argument("--types", type=names, default=["q8_0", "q4_0"])
    parser.add_argument("--depths", type=numbers, default=[4096, 131072])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--prompts", type=numbers, default=[2048])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--allowed", type=float, default=5e-2, help="of logits, relative to their norm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.tail, options.sink = 0, 0
    with torch.inference_mode():
        bandwidth = copy_bandwidth(options.device)
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
        print(f"{card}, torch {torch.__version__}, copies {bandwidth / 1e9:.0f} GB/s", flush=True)
        for path in options.files:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            bench = opened(options, path, bandwidth)
            for part in ("decode", "prefill", "memory", "profile"):
                if part in options.parts:
                    try:
                        getattr(packed_cuda, part)(bench)
                    except (HybridKVError, RuntimeError) as error:
                        print(f"{part} of {path} failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
            del bench
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
