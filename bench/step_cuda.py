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
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from triton import TritonError

from hybridkv.cache import KVTypes
from hybridkv.errors import HybridKVError
from hybridkv.hf import IMPLEMENTATION, EagerStep, ModelCache, Step, cache_argument, is_finite, kv_facts, layer_facts
from hybridkv.hf.layers import QuantizedLayer
from hybridkv.hf.step import resolve_step
from hybridkv.plan import largest_context, plan
from hybridkv.policy import Guard, Policy

PARTS = ("check", "baseline", "decode", "prefill", "memory", "profile")
_DELTA: dict[str, Any] = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
_DELTA |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256, "num_attention_heads": 16}
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "4b": (
        "Qwen3_5ForCausalLM",
        {**_DELTA, "hidden_size": 2560, "num_key_value_heads": 4, "intermediate_size": 9216, "num_hidden_layers": 32},
    ),
    "35b": (
        "Qwen3_5MoeForCausalLM",
        {
            **_DELTA,
            **{"hidden_size": 2048, "num_key_value_heads": 2, "num_hidden_layers": 20, "num_experts": 256},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        },
    ),
    "check": (
        "Qwen3_5ForCausalLM",
        {**_DELTA, "hidden_size": 512, "num_key_value_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 4},
    ),
    "tiny": (
        "Qwen3_5ForCausalLM",
        {
            **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
            **{"head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
            **{"linear_value_head_dim": 16, "num_hidden_layers": 4},
        },
    ),
}
FILL_ROWS = 16384


def build(geometry: str, device: str, dtype: torch.dtype) -> Any:
    """A random model; full attention in every fourth layer."""
    class_name, sizes = GEOMETRIES[geometry]
    model_class = getattr(transformers, class_name)
    n_layers = sizes["num_hidden_layers"]
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layers)]
    vocabulary = 1000 if geometry in ("check", "tiny") else 151936
    config = model_class.config_class(
        **sizes, layer_types=kinds, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2**20
    )
    config._attn_implementation = IMPLEMENTATION
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


@dataclass
class Bench:
    """What all parts share."""

    options: argparse.Namespace
    model: Any
    geometry: str
    step: Step
    bandwidth: float
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(p.nbytes for p in self.model.parameters())

    def cache(self, type_name: str, n_ctx: int) -> ModelCache:
        """An empty cache of one type."""
        specs = Policy(KVTypes(type_name, type_name)).resolve(kv_facts(layer_facts(self.model.config)))
        device = torch.device(self.options.device).type
        return ModelCache(self.model.config, specs, device=device, n_ctx=n_ctx, guard=Guard(), notify=say)

    def floor_ms(self, cache: ModelCache, n_read: int) -> float:
        """Milliseconds that a step's bytes take."""
        return 1e3 * (n_read + cache.kv_bytes_used + cache.state_bytes) / self.bandwidth

    def report(self, part: str, **values: Any) -> None:
        """Print a line, and write it where results are kept."""
        line = {"part": part, "geometry": self.geometry, **values}
        if self.options.out is not None:
            with self.options.out.open("a") as out:
                out.write(json.dumps({**self.conditions, **line}) + "\n")
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)


def say(text: str) -> None:
    print(f"  note: {text}", flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by the best of some copies."""
    n = 2**32 if device.startswith("cuda") else 2**24
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n / min(times)


def read_bytes(model: Any, n_seqs: int) -> int:
    """Bytes of the weights that a decode step reads: of experts, those that are chosen at most, each once."""
    config = model.config.get_text_config(decoder=True)
    total, experts = 0, 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            experts += parameter.nbytes
        else:
            total += parameter.nbytes
    if experts:
        total += experts * min(config.num_experts, n_seqs * config.num_experts_per_tok) // config.num_experts
    return total


def fill(bench: Bench, cache: ModelCache, depth: int, n_seqs: int, n_prompt: int = 40) -> None:
    """A cache that holds `depth` tokens: a prompt's, and random rows behind them."""
    tokens = torch.randint(3, 900, (1, n_prompt))
    bench.step.forward(tokens, cache, 0)
    if n_seqs > 1:
        cache.batch_repeat_interleave(n_seqs)
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            facts, store = layer.store.spec.facts, layer.store
            shape = (n_seqs, facts.n_kv_heads, FILL_ROWS // n_seqs, facts.head_dim_k)
            rows = torch.randn(shape, dtype=torch.bfloat16, device=bench.options.device)
            while store.n_seen < depth:
                part = rows[:, :, : depth - store.n_seen]
                store.append(part, part)


def timed_steps(run: Callable[[Tensor, int], Tensor], n_seqs: int, depth: int, n: int) -> Iterator[float]:
    """Seconds of each of n decode steps, the choice of the next token and its way to the host included."""
    token = torch.full((n_seqs, 1), 7)
    for i in range(n):
        synchronize()
        start = time.perf_counter()
        logits = run(token, depth + i)
        assert is_finite(logits)
        token = logits.argmax(-1, keepdim=True).cpu()
        yield time.perf_counter() - start


def check(bench: Bench) -> None:
    """The steps under test in bf16 and float32 against Transformers' forward pass in float32, prompt and decode.

    Raises
    ------
    SystemExit
        If they differ by more than bf16 does.
    """
    device, name = bench.options.device, "tiny" if bench.geometry == "tiny" else "check"
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


def chosen_step(model: Any, device: str, kind: str) -> Callable[[Any], Step]:
    """What runs by default, or for `graph`: Transformers' own forward pass as a graph."""
    engine = "eager" if kind in ("graph", "eager") else "auto"
    mode = "off" if kind == "eager" else "on"
    return resolve_step(model.config, torch.device(device).type, engine, graphs=mode, notify=say)


def decode(bench: Bench) -> None:
    o = bench.options
    for n_seqs in o.batches:
        for depth in o.depths:
            if n_seqs > 1 and depth > 32768:
                continue
            for type_name in o.types:
                n_ctx = depth + o.steps + 8
                cache = bench.cache(type_name, n_ctx)
                fill(bench, cache, depth, n_seqs)
                seconds = list(timed_steps(lambda t, p, c=cache: bench.step.forward(t, c, p), n_seqs, depth, o.steps))
                times = sorted(seconds[3:])
                floor = bench.floor_ms(cache, read_bytes(bench.model, n_seqs))
                ms = 1e3 * median(times)
                values = {"first_ms": 1e3 * seconds[0], "ms": ms, "p90_ms": 1e3 * times[int(0.9 * len(times))]}
                values |= {"floor_ms": floor, "times_floor": ms / floor, "tok_s": 1e3 * n_seqs / ms}
                bench.report("decode", type=type_name, n_seqs=n_seqs, depth=depth, **values)
                del cache


def prefill(bench: Bench) -> None:
    for type_name in bench.options.types:
        for n_tokens in bench.options.prompts:
            prompt, seconds = torch.randint(3, 900, (1, n_tokens)), []
            for _ in range(3):
                cache = bench.cache(type_name, n_tokens)
                synchronize()
                start = time.perf_counter()
                bench.step.forward(prompt, cache, 0)
                synchronize()
                seconds.append(time.perf_counter() - start)
                del cache
            best = median(seconds[1:])
            first = 1e3 * seconds[0]
            bench.report("prefill", type=type_name, tokens=n_tokens, first_ms=first, tok_s=n_tokens / best)


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


def baseline(bench: Bench) -> None:
    """Transformers alone: DynamicCache, its default attention, a few steps."""
    o, model = bench.options, bench.model
    model.set_attn_implementation("sdpa")
    name = cache_argument(model)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    try:
        for n_seqs in o.batches:
            for depth in o.depths:
                if n_seqs > 1 and depth > 32768:
                    continue
                cache = transformers.DynamicCache(config=model.config)
                model(input_ids=torch.randint(3, 900, (n_seqs, 8), device=o.device), **{name: cache}, use_cache=True)
                for layer in cache.layers:
                    if getattr(layer, "keys", None) is not None:
                        shape = (n_seqs, heads, depth, dim)
                        layer.keys, layer.values = (
                            torch.randn(shape, dtype=torch.bfloat16, device=o.device) for _ in range(2)
                        )

                def run(token: Tensor, position: int, cache: Any = cache) -> Tensor:
                    positions = torch.full(token.shape, position, device=o.device)
                    inputs = {name: cache, "input_ids": token.to(o.device), "position_ids": positions}
                    logits: Tensor = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
                    return logits

                ms = 1e3 * median(list(timed_steps(run, n_seqs, depth, 8))[2:])
                bench.report("baseline decode", n_seqs=n_seqs, depth=depth, ms=ms)
                del cache
        for n_tokens in o.prompts:
            seconds = []
            for _ in range(2):
                prompt = torch.randint(3, 900, (1, n_tokens), device=o.device)
                cache = transformers.DynamicCache(config=model.config)
                synchronize()
                start = time.perf_counter()
                model(input_ids=prompt, **{name: cache}, use_cache=True, logits_to_keep=1)
                synchronize()
                seconds.append(time.perf_counter() - start)
                del cache
            bench.report("baseline prefill", tokens=n_tokens, tok_s=n_tokens / seconds[-1])
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


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
    parser.add_argument("--engine", default="auto", choices=("auto", "graph", "eager"))
    parser.add_argument("--types", default="q8_0,q4_0,f16", type=lambda t: t.split(","))
    parser.add_argument("--depths", default="4096,32768,131072", type=numbers)
    parser.add_argument("--batches", default="1,8", type=numbers)
    parser.add_argument("--prompts", default="4096", type=numbers)
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
    conditions |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "engine": bench.step.name}
    bench.conditions = conditions
    n_billion = sum(p.numel() for p in model.parameters()) / 1e9
    print("  ".join(f"{k} {v}" for k, v in conditions.items()))
    bench.report("conditions", parameters_b=n_billion, copy_tb_s=bandwidth / 1e12)
    parts = {f.__name__: f for f in (check, baseline, decode, prefill, memory, profile)}
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
