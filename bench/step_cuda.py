"""Whole steps of a hybrid on one CUDA device: decode, prefill, memory, and Transformers' own cache beside them.

Random bf16 weights, made on the device, at a 4B-like geometry (32 layers, full attention in every fourth, hidden 2560,
16/4 heads of 256, 16/32 linear heads of 128, feed-forward 9216, vocabulary 151936, tied: 3.96 B parameters), at one
like a 35B-A3B with layers taken off, or tiny. A cache is filled to its depth with random rows, not by a prompt. The
floor of a decode step is the bytes that it must read, weights and packed rows and states once each, over the copy
bandwidth measured here. Figures come only after the check: logits against Transformers' forward pass in float32.

    python bench/step_cuda.py --out step.jsonl
    python bench/step_cuda.py --parts check,decode --types q8_0 --depths 4096
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor
from triton import TritonError

from hybridkv.errors import HybridKVError
from hybridkv.hf import EagerStep
from hybridkv.model import layer_facts
from hybridkv.planner import largest_context, plan
from step_cuda_model import (
    GEOMETRIES,
    WARM_STEPS,
    Bench,
    build,
    chosen_step,
    copy_bandwidth,
    fill,
    prompt_speed,
    read_bytes,
    synchronize,
    timed_steps,
)
from step_cuda_peers import baseline, compiled, recurrent_code

PARTS = ("check", "baseline", "compiled", "decode", "prefill", "memory", "profile")


def check(bench: Bench) -> None:
    """The steps under test in bf16 and float32 against Transformers' forward pass in float32, prompt and decode.

    Raises
    ------
    SystemExit
        If they differ by more than bf16 does.
    """
    device, name = bench.options.device, {"4b": "check", "35b": "check-35b"}.get(bench.geometry, bench.geometry)
    prompt, answer = torch.randint(3, 900, (2, 150)), torch.randint(3, 900, (2, 6))
    logits: dict[str, Tensor] = {}
    for label, dtype, kind in (
        ("exact", torch.float32, "eager"),
        ("bf16 eager", torch.bfloat16, "eager"),
        ("float32 step", torch.float32, "auto"),
        ("bf16 step", torch.bfloat16, "auto"),
        ("bf16 eager graph", torch.bfloat16, "graph"),
    ):
        model = build(name, device, torch.float32).to(dtype)
        make = EagerStep if label in ("exact", "bf16 eager") else chosen_step(model, device, kind)
        step = make(model)
        own = Bench(bench.options, model, name, step, 1.0, bench.conditions)
        cache = own.cache("f16", 256)
        found = [step.forward(prompt, cache, 0)]
        found += [step.forward(answer[:, i : i + 1], cache, 150 + i) for i in range(answer.shape[1])]
        logits[label] = torch.stack(found).double()
    exact = logits.pop("exact")
    errors = {k: float((v - exact).norm() / exact.norm()) for k, v in logits.items()}
    bench.report("check", **errors)
    limit = 1.5 * errors["bf16 eager"]
    if errors["float32 step"] > 5e-3 or max(errors["bf16 step"], errors["bf16 eager graph"]) > limit:
        raise SystemExit(f"the check failed: float32 may differ by 5e-3, bf16 by {limit:.3g}")


def decode(bench: Bench) -> None:
    o = bench.options
    for n_seqs in o.batches:
        for depth in o.depths:
            if n_seqs > 1 and depth > 32768:
                continue
            for type_name in o.types:
                n_steps = WARM_STEPS + o.steps
                n_ctx = depth + n_steps + 8
                cache = bench.cache(type_name, n_ctx)
                fill(bench, cache, depth, n_seqs)
                seconds = list(timed_steps(lambda t, p, c=cache: bench.step.forward(t, c, p), n_seqs, depth, n_steps))
                times = sorted(seconds[WARM_STEPS:])
                floor = bench.floor_ms(cache, read_bytes(bench.model, n_seqs))
                ms = 1e3 * median(times)
                values = {"first_ms": 1e3 * seconds[0], "ms": ms, "p90_ms": 1e3 * times[int(0.9 * len(times))]}
                values |= {"floor_ms": floor, "times_floor": ms / floor, "tok_s": 1e3 * n_seqs / ms}
                exact = {"tail": o.tail, "sink": o.sink} if o.tail or o.sink else {}
                bench.report("decode", type=type_name, **exact, n_seqs=n_seqs, depth=depth, **values)
                del cache


def prefill(bench: Bench) -> None:
    for type_name in bench.options.types:
        for n_tokens in bench.options.prompts:
            prompt = torch.randint(3, 900, (1, n_tokens))

            def prepare(t: str = type_name, prompt: Tensor = prompt) -> Callable[[], object]:
                return partial(bench.step.forward, prompt, bench.cache(t, prompt.shape[1]), 0)

            first, tok_s = prompt_speed(n_tokens, prepare)
            bench.report("prefill", type=type_name, tokens=n_tokens, first_ms=1e3 * first, tok_s=tok_s)


def memory(bench: Bench) -> None:
    """Peak against the plan at each depth; then the largest context by plan, allocated and run at its very end."""
    o = bench.options
    facts = layer_facts(bench.model.config)
    for type_name in o.types:
        planned, peak, n_ctx = 0, 0, 0
        for n_ctx in (*o.depths[-1:], 0):
            torch.cuda.empty_cache()
            specs = bench.cache(type_name, 1).specs
            kept = plan(specs, facts, n_ctx=0, conv_itemsize=2, weight_bytes=bench.weight_bytes).total_bytes
            if n_ctx == 0:
                free, _ = torch.cuda.mem_get_info()
                room = free + torch.cuda.memory_allocated() - kept - int(o.spare_gib * 2**30)
                n_ctx = largest_context(specs, room) or 0
                label = "largest"
            else:
                label = "depth"
            torch.cuda.reset_peak_memory_stats()
            cache = bench.cache(type_name, n_ctx)
            fill(bench, cache, n_ctx - 6, 1, n_prompt=2048)
            for _ in timed_steps(lambda t, p, c=cache: bench.step.forward(t, c, p), 1, n_ctx - 6, 5):
                pass
            planned = plan(specs, facts, n_ctx=n_ctx, conv_itemsize=2, weight_bytes=bench.weight_bytes).total_bytes
            peak = torch.cuda.max_memory_allocated()
            sizes = {"planned_gib": planned / 2**30, "peak_gib": peak / 2**30, "over": peak / planned - 1}
            sizes |= {"reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            bench.report("memory", at=label, type=type_name, n_ctx=n_ctx, **sizes)
            del cache


def profile(bench: Bench) -> None:
    """The kernels of one decode step and of one prompt, by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cache = bench.cache(bench.options.types[0], 4200)
    fill(bench, cache, 4096, 1)
    list(timed_steps(lambda t, p: bench.step.forward(t, cache, p), 1, 4096, 4))
    prompt = torch.randint(3, 900, (1, 2048))
    for label, call in (
        ("decode", lambda: list(timed_steps(lambda t, p: bench.step.forward(t, cache, p), 1, 4100, 4))),
        ("prefill", lambda: bench.step.forward(prompt, bench.cache(bench.options.types[0], 2048), 0)),
    ):
        with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            call()
            synchronize()
        print(f"profile of {label} (4 steps, or 2048 tokens)")
        table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60)
        print("\n".join(line[:66] + line[-90:] for line in table.splitlines()), flush=True)


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,baseline,decode,prefill,memory", type=lambda t: t.split(","))
    parser.add_argument("--geometry", default="4b", choices=GEOMETRIES)
    parser.add_argument("--backend", default="auto", choices=("auto", "graph", "eager"))
    parser.add_argument("--types", default="q8_0,q4_0,f16", type=lambda t: t.split(","))
    parser.add_argument("--depths", default="4096,32768,131072", type=numbers)
    parser.add_argument("--batches", default="1,8", type=numbers)
    parser.add_argument("--prompts", default="4096", type=numbers)
    parser.add_argument("--tail", default=0, type=int, help="newest tokens that stay exact")
    parser.add_argument("--sink", default=0, type=int, help="oldest tokens that stay exact")
    parser.add_argument("--steps", default=40, type=int)
    parser.add_argument("--spare-gib", default=2.0, type=float)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    return options


@torch.inference_mode()
def main() -> None:
    o = arguments()
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    card = torch.cuda.get_device_name(0) if o.device.startswith("cuda") else "cpu"
    bandwidth = copy_bandwidth(o.device)
    model = build(o.geometry, o.device, torch.bfloat16)
    bench = Bench(o, model, o.geometry, chosen_step(model, o.device, o.engine)(model), bandwidth)
    conditions = {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}
    conditions |= {"recurrent_layers": recurrent_code()}
    conditions |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "engine": bench.step.name}
    bench.conditions = conditions
    n_billion = sum(p.numel() for p in model.parameters()) / 1e9
    print("  ".join(f"{k} {v}" for k, v in conditions.items()))
    bench.report("conditions", parameters_b=n_billion, copy_tb_s=bandwidth / 1e12)
    parts = {f.__name__: f for f in (check, baseline, compiled, decode, prefill, memory, profile)}
    for name in o.parts:
        begin = time.perf_counter()
        try:
            parts[name](bench)
        except (RuntimeError, TritonError, HybridKVError) as error:
            traceback.print_exc()
            bench.report("failed", what=name, error=str(error).partition("\n")[0][:300])
            if name == "check":
                raise SystemExit("no figures without the check") from error
        print(f"  {name}: {time.perf_counter() - begin:.1f} s", flush=True)
        torch.cuda.empty_cache()
    print(f"total {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
