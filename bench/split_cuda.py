"""A model with experts on a card with little memory: decode steps and prompts, routed experts on the CPU.

Takes a GGUF file, and the memory that the card is to have: the plan and torch both keep within it. Figures come only
after the check: logits of a prompt and of single tokens against the CPU engine on the same file. Each line says how
much of a step the CPU's experts took. Prompts are timed with experts on the CPU and sent to the card: what
`native/hosted.py` chooses between. Rows behind the first 40 are random.

    python bench/split_cuda.py model.gguf --device-memory 8GiB
    python bench/split_cuda.py model.gguf --device-memory 8GiB --depths 4096 --parts check,decode
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine.caches import new_cache
from hybridkv.engine.describe import describe
from hybridkv.engine.load import load
from hybridkv.engine.placed import Split, hosted_names, place_on_card
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import HybridKVError
from hybridkv.model import kv_facts
from hybridkv.native.cuda_step import PackedStep
from hybridkv.native.hosted import Pinned
from hybridkv.planner import parse_bytes
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache, is_finite
from step_cuda_model import compare_logits

PARTS = ("check", "decode", "prompts", "memory")
WARM_STEPS = 30
FILL_ROWS = 2048  # as many as a prompt stores at once: more would take more of the card
NEVER = 1 << 30


class Bench:
    """A model that is divided, and what is measured of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.description = describe(options.model)
        self.specs = self._specs(options.type)
        self.n_ctx = max(options.depths) + WARM_STEPS + options.steps + 64
        split = Split(n_cpu_moe=options.n_cpu_moe, device_memory=parse_bytes(options.device_memory))
        placement = place_on_card(self.description, self.specs, split, options.device, n_ctx=self.n_ctx)
        self.n_cpu_moe = placement.n_cpu_moe
        for line in placement.lines():
            card, host = line.card_bytes / 2**20, line.host_bytes / 2**20
            print(f"  {line.name:16}{card:10.0f} MiB on the card {host:10.0f} MiB in main memory")
        start = time.perf_counter()
        loaded = load(
            self.description,
            dtype=torch.float32,
            device=options.device,
            weights="auto",
            hosted=hosted_names(placement),
        )
        self.model: Any = loaded.model
        self.step = resolve_step(self.description.config, "cuda", notify=say)(self.model)
        decoder = getattr(self.step, "_decoder", self.step)  # the step whose decoding is recorded
        self.pinned: Pinned | None = decoder.pinned if isinstance(decoder, PackedStep) else None
        self.host_s = 0.0
        if self.pinned is not None:
            self._time_host(self.pinned)
        self.report("load", seconds=time.perf_counter() - start, n_cpu_moe=self.n_cpu_moe, step=self.step.name)

    def _specs(self, name: str) -> tuple[KVSpec, ...]:
        return Policy(KVTypes(name, name)).resolve(kv_facts(self.description.facts))

    def _time_host(self, pinned: Pinned) -> None:
        compute = pinned._compute

        def timed(layer: int, n: int) -> None:
            start = time.perf_counter()
            compute(layer, n)
            self.host_s += time.perf_counter() - start

        pinned._compute = timed  # type: ignore[method-assign]

    def cache(self, n_ctx: int, model: Any = None, specs: tuple[KVSpec, ...] = ()) -> ModelCache:
        """An empty cache of one sequence."""
        guard = Guard(mode="off")
        return new_cache(model or self.model, specs or self.specs, n_ctx=n_ctx, guard=guard, notify=say)

    def report(self, part: str, **values: Any) -> None:
        """Print a line, and write it where results are kept."""
        line = {"part": part, "cap": self.options.device_memory, "type": self.options.type, **values}
        if self.options.out is not None:
            with self.options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)


def say(text: str) -> None:
    print(f"  note: {text}", flush=True)


def check(bench: Bench) -> None:
    """Compare logits with the CPU engine on the same file.

    Raises
    ------
    SystemExit
        If they differ by more than is allowed.
    """
    specs = bench._specs("f16")
    cpu = load(bench.description, dtype=torch.float32, device="cpu", weights="auto").model
    exact = resolve_step(bench.description.config, "cpu")(cpu), bench.cache(64, cpu, specs)
    errors, _ = compare_logits(exact, (bench.step, bench.cache(64, None, specs)), 900)
    bench.report("check", errors=", ".join(f"{error:.1e}" for error in errors), allowed=bench.options.allowed)
    if not max(errors) < bench.options.allowed:
        raise SystemExit("the check failed: nothing is measured")


def fill(bench: Bench, cache: ModelCache, depth: int) -> None:
    """Take a prompt of 40 tokens, and random rows behind them."""
    bench.step.forward(torch.randint(3, 900, (1, 40)), cache, 0)
    for layer in cache.quantized:
        facts, store = layer.store.spec.facts, layer.store
        shape = (1, facts.n_kv_heads, FILL_ROWS, facts.head_dim_k)
        rows = torch.randn(shape, dtype=torch.bfloat16, device=bench.options.device)
        while store.n_seen < depth:
            part = rows[:, :, : depth - store.n_seen]
            store.append(part, part)


def decode(bench: Bench) -> None:
    """Time single tokens at each depth."""
    for depth in bench.options.depths:
        n_steps = WARM_STEPS + bench.options.steps
        cache = bench.cache(depth + n_steps + 8)
        fill(bench, cache, depth)
        token, times, host = torch.full((1, 1), 7), [], []
        for i in range(n_steps):
            torch.cuda.synchronize()
            start, bench.host_s = time.perf_counter(), 0.0
            logits = bench.step.forward(token, cache, depth + i)
            assert is_finite(logits)
            token = logits.argmax(-1, keepdim=True).cpu()
            times.append(time.perf_counter() - start)
            host.append(bench.host_s)
        ms = 1e3 * median(times[WARM_STEPS:])
        bench.report(
            "decode", depth=depth, ms=ms, tok_s=1e3 / ms, p90_ms=1e3 * sorted(times[WARM_STEPS:])[-len(times) // 10],
            host_ms=1e3 * median(host[WARM_STEPS:]), first_ms=1e3 * times[0], n_cpu_moe=bench.n_cpu_moe,
        )  # fmt: skip
        del cache


def prompts(bench: Bench) -> None:
    """Time prompts with experts on the CPU, sent to the card, and as the constants choose."""
    pinned = bench.pinned
    ways: dict[str, list[int]] = {"chosen": [] if pinned is None else list(pinned.least)}
    if pinned is not None:
        ways |= {"on the CPU": [NEVER] * pinned.n_layers, "sent": [1] * pinned.n_layers}
        print(f"  experts are sent from {min(pinned.least)} to {max(pinned.least)} rows on", flush=True)
    for n_tokens in bench.options.prompts:
        prompt: Tensor = torch.randint(3, 900, (1, n_tokens))
        for way, least in ways.items():
            if pinned is not None:
                pinned.least[:] = least
            seconds, host = [], 0.0
            for _ in range(1 + bench.options.repeats):
                cache = bench.cache(n_tokens)
                torch.cuda.synchronize()
                start, bench.host_s = time.perf_counter(), 0.0
                bench.step.forward(prompt, cache, 0)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                host = bench.host_s
                del cache
            s = median(seconds[1:])
            bench.report("prompt", tokens=n_tokens, experts=way, ms=1e3 * s, tok_s=n_tokens / s, host_ms=1e3 * host)
    if pinned is not None:
        pinned.least[:] = ways["chosen"]


def memory(bench: Bench) -> None:
    """Report the most that was allocated and reserved, beside the cap that held."""
    bench.report(
        "memory", allocated_mib=torch.cuda.max_memory_allocated() / 2**20,
        reserved_mib=torch.cuda.max_memory_reserved() / 2**20,
    )  # fmt: skip


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--device-memory", default="8GiB")
    parser.add_argument("--n-cpu-moe", type=int, help="layers whose experts are in main memory (default: what fits)")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--depths", type=numbers, default=[4096, 32768, 131072])
    parser.add_argument("--prompts", type=numbers, default=[256, 1024, 2048])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--allowed", type=float, default=5e-2, help="of logits, relative to their norm")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"a card of {options.device_memory}",
            flush=True,
        )
        bench = Bench(options)
        for part in PARTS:
            if part in options.parts:
                try:
                    globals()[part](bench)
                except (HybridKVError, RuntimeError) as error:
                    print(f"{part} failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
                    if part == "check":
                        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
