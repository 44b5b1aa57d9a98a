"""What the parts of step_cuda.py share: random models, caches filled to a depth, timed steps, results."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.engine.steps import resolve_step
from hybridkv.hf import IMPLEMENTATION, ModelCache
from hybridkv.hf.layers import QuantizedLayer
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step, is_finite

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
    "check-35b": (
        "Qwen3_5MoeForCausalLM",
        {
            **_DELTA,
            **{"hidden_size": 512, "num_key_value_heads": 2, "num_hidden_layers": 4, "num_experts": 64},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
        },
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
WARM_STEPS, WARM_PROMPTS, TIMED_PROMPTS = 100, 2, 5
"""Those to warm up are not timed: kernels are compiled, and clocks rise again."""


def build(geometry: str, device: str, dtype: torch.dtype) -> Any:
    """A random model; full attention in every fourth layer."""
    class_name, sizes = GEOMETRIES[geometry]
    model_class = getattr(transformers, class_name)
    n_layers = sizes["num_hidden_layers"]
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n_layers)]
    vocabulary = 1000 if geometry in ("check", "check-35b", "tiny") else 151936
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
        """An empty cache of one type, with the exact rows that are asked for."""
        types = KVTypes(type_name, type_name, tail=self.options.tail, sink=self.options.sink)
        specs = Policy(types).resolve(kv_facts(layer_facts(self.model.config)))
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


CHECK = (24, 8, 1, 1, 1)
"""Tokens of each call whose logits are compared: two chunks of a prompt, and single tokens, the last two replayed."""


def compare_logits(exact: tuple[Step, Any], measured: tuple[Step, Any], n_vocab: int) -> tuple[list[float], int]:
    """Run the calls of `CHECK` on two steps with their empty caches: relative errors, and how often the best agrees."""
    seeded, position, errors, same = torch.Generator().manual_seed(5), 0, [], 0
    for n in CHECK:
        tokens = torch.randint(3, n_vocab, (1, n), generator=seeded)
        right, got = (step.forward(tokens, cache, position).cpu().double() for step, cache in (exact, measured))
        errors.append(float((got - right).norm() / right.norm()))
        same += int(right.argmax() == got.argmax())
        position += n
    return errors, same


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


def prompt_speed(n_tokens: int, prepare: Callable[[], Callable[[], object]]) -> tuple[float, float]:
    """Seconds of the first of some prompts, and tokens per second at the median of those after the warm-up.

    `prepare` makes an empty cache, and gives the call that fills it.
    """
    seconds = []
    for _ in range(WARM_PROMPTS + TIMED_PROMPTS):
        run = prepare()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
        del run
    return seconds[0], n_tokens / median(seconds[WARM_PROMPTS:])


def chosen_step(model: Any, device: str, kind: str) -> Callable[[Any], Step]:
    """What runs by default, or for `graph`: Transformers' own forward pass as a graph."""
    engine = "eager" if kind in ("graph", "eager") else "auto"
    mode = "off" if kind == "eager" else "on"
    return resolve_step(model.config, torch.device(device).type, engine, graphs=mode, notify=say)
