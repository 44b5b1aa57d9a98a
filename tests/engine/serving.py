"""What the tests of the scheduler share: small models of several kinds, prompts, and a sequence run alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine import Event, Request, RequestHandle, SamplingParams, Scheduler
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step
from tests.families import build

GREEDY = SamplingParams(temp=0)
Q8 = KVTypes("q8_0", "q8_0")
Q8_TAILED = KVTypes("q8_0", "q8_0", tail=32, sink=3, center=True)
TAILED = KVTypes("q4_0", "q4_0", rotate_k=True, tail=32, sink=3, center=True)


@cache
def model(family: str = "qwen3_5_text") -> PreTrainedModel:
    return build(family, attention="hybridkv")


def specs_for(of: PreTrainedModel, types: KVTypes = Q8) -> tuple[KVSpec, ...]:
    return Policy(types).resolve(kv_facts(layer_facts(of.config)))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def scheduler(
    family: str = "qwen3_5_text", *, types: KVTypes = Q8, step: Step | None = None, **options: Any
) -> Scheduler:
    of = model(family)
    settings: dict[str, Any] = {
        "n_parallel": 4,
        "n_ctx": 512,
        "guard": Guard(),
        "notify": lambda _: None,
        "prefill_chunk": 32,
        **options,
    }
    return Scheduler(of, specs_for(of, types), step=step, **settings)


def drain(run: Scheduler, most: int = 5000) -> int:
    """Iterate until nothing is left; how many iterations that took."""
    for count in range(most):
        if not run.iterate():
            return count
    raise AssertionError("it does not end")


def tokens(handle: RequestHandle) -> list[int | None]:
    return [event.token for event in events(handle)]


def events(handle: RequestHandle) -> list[Event]:
    assert handle.finished
    return list(handle)


def alone(request: Request, family: str = "qwen3_5_text", **options: Any) -> list[int | None]:
    """What a request gets from a scheduler of its own."""
    run = scheduler(family, **options)
    handle = run.submit(request)
    drain(run)
    return tokens(handle)


def requests(lengths: Sequence[int], n_new: int = 12, **options: Any) -> list[Request]:
    return [
        Request(
            prompt(n, seed), n_new, options.get("params", GREEDY), **{k: v for k, v in options.items() if k != "params"}
        )
        for seed, n in enumerate(lengths)
    ]
