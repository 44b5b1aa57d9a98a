"""Transformers alone beside us: its dynamic cache with its default attention, and its static cache compiled.

Where flash-linear-attention is installed, Transformers takes its kernels for the recurrent layers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache

from hybridkv.hf import IMPLEMENTATION, cache_argument
from step_cuda_model import Bench, prompt_speed, timed_steps

Forward = Callable[[Tensor, int], Tensor]


def recurrent_code() -> str:
    """What Transformers runs its recurrent layers with."""
    if not transformers.utils.import_utils.is_flash_linear_attention_available():
        return "its torch code"
    return f"flash-linear-attention {importlib.metadata.version('flash-linear-attention')}"


def baseline(bench: Bench) -> None:
    """The dynamic cache: a few decode steps, and prompts."""
    with _Alone(bench) as model:
        for n_seqs, depth in _cases(bench):
            cache = transformers.DynamicCache(config=model.config)
            _prompt(bench, cache, n_seqs)
            heads, dim = model.config.num_key_value_heads, model.config.head_dim
            for layer in cache.layers:
                if getattr(layer, "keys", None) is not None:
                    shape = (n_seqs, heads, depth, dim)
                    layer.keys, layer.values = (
                        torch.randn(shape, dtype=torch.bfloat16, device=bench.options.device) for _ in range(2)
                    )
            forward = _forward(bench, cache, model)
            ms = 1e3 * median(list(timed_steps(forward, n_seqs, depth, 8))[2:])
            bench.report("baseline decode", n_seqs=n_seqs, depth=depth, ms=ms)
            del cache, forward
        for n_tokens in bench.options.prompts:

            def prepare(n: int = n_tokens) -> Callable[[], object]:
                prompt = torch.randint(3, 900, (1, n), device=bench.options.device)
                cache = {cache_argument(model): transformers.DynamicCache(config=model.config)}
                return partial(model, input_ids=prompt, **cache, use_cache=True, logits_to_keep=1)

            _, tok_s = prompt_speed(n_tokens, prepare)
            bench.report("baseline prefill", tokens=n_tokens, tok_s=tok_s)


def compiled(bench: Bench) -> None:
    """The static cache, the forward pass compiled with graphs (`mode="reduce-overhead"`): decode steps."""
    with _Alone(bench) as model:
        for n_seqs, depth in _cases(bench):
            torch.compiler.reset()
            run = torch.compile(model.forward, mode="reduce-overhead")
            cache = transformers.StaticCache(config=model.config, max_cache_len=depth + 32)
            _prompt(bench, cache, n_seqs)
            for layer in cache.layers:  # the rows between count as attended: full attention over the whole depth
                if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                    layer.cumulative_length.fill_(depth)
                elif hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = depth
            seconds = list(timed_steps(_forward(bench, cache, run), n_seqs, depth, 14))
            ms = 1e3 * median(seconds[6:])
            bench.report("compiled decode", n_seqs=n_seqs, depth=depth, ms=ms, first_s=sum(seconds[:6]))
            del cache


class _Alone:
    """The model with Transformers' default attention."""

    def __init__(self, bench: Bench) -> None:
        self._model = bench.model

    def __enter__(self) -> Any:
        self._model.set_attn_implementation("sdpa")
        return self._model

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(IMPLEMENTATION)


def _cases(bench: Bench) -> list[tuple[int, int]]:
    o = bench.options
    return [(n, depth) for n in o.batches for depth in o.depths if n == 1 or depth <= 32768]


def _prompt(bench: Bench, cache: Cache, n_seqs: int) -> None:
    ids = torch.randint(3, 900, (n_seqs, 8), device=bench.options.device)
    bench.model(input_ids=ids, **{cache_argument(bench.model): cache}, use_cache=True)


def _forward(bench: Bench, cache: Cache, run: Callable[..., Any]) -> Forward:
    device, name = bench.options.device, cache_argument(bench.model)

    def forward(token: Tensor, position: int) -> Tensor:
        positions = torch.full(token.shape, position, device=device)
        inputs = {name: cache, "input_ids": token.to(device), "position_ids": positions}
        logits: Tensor = run(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits.clone()  # a graph's memory is written over by the next step

    return forward
