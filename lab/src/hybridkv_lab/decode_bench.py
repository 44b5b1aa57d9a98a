"""A whole model's steps: prompt tokens and generated tokens per second at several depths, in turns with ik_llama.cpp.

Both run the same GGUF file on the same threads in one process. First both answer the same prompt, and their logits
must agree. A depth beyond the timed prompt is reached without a prefill of that length: the stored K and V rows of the
prompt are repeated, and the recurrent states stay as they are; the time of a step does not depend on the values.
Called by `hybridkv bench decode`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine
from hybridkv.engine.load import Description, Loaded, load
from hybridkv.engine.steps import resolve_step
from hybridkv.held import WeightKind
from hybridkv.hf import packing_rejects
from hybridkv.kernels.weights import Activations
from hybridkv.model import kv_facts
from hybridkv.native import NativeStep
from hybridkv.native.choice import BackendKind
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step
from hybridkv_lab.peers import Found, ik_library
from hybridkv_lab.peers.ik_model import Logits, ik_context, ik_model, runs
from hybridkv_lab.timing import Spread, spread

PEERS: dict[str, Callable[[], Found]] = {"ik": ik_library.find}
OURS = "hybridkv"

DIFFERENCE_LIMIT = 0.1
"""Largest difference of the logits after the first prompt, relative to their own spread. Both quantize the cache and
ik_llama.cpp rounds activations to 8 bits; a wrong layer gives 1 and more. In deep models with experts that rounding
alone can exceed it (`bench/reference_logits.py`), so that a run may allow more."""

_TEXT = "The river runs from the mountains to the sea. In spring the snow melts and the water rises. Every year the"
_N_AGREE = 16
_BURSTS = 4
_PROMPT_ROUNDS, _PROMPT_BUDGET_S = 3, 20.0


class Runner(Protocol):
    """One implementation with one context."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache."""

    def reset(self) -> None:
        """Forget all tokens."""

    def advance(self, ids: Sequence[int]) -> Logits:
        """Process tokens; the logits after them `[V]`."""

    def deepen(self, n_tokens: int) -> None:
        """Repeat the stored rows until there are `n_tokens`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements to make.

    Attributes
    ----------
    types
        KV cache types, the same for K and V.
    depths
        Tokens in the cache when generation is timed.
    n_prompt
        Tokens of the timed prompt, at depth 0.
    n_steps
        Timed steps at each depth.
    profile
        Whether as many steps again are timed operation by operation, where the native step runs.
    difference_limit
        Of the logits from a peer's, for a type to be timed.
    rotated
        Sides whose rows are rotated, here and in ik_llama.cpp: k, v, kv, or none.
    """

    types: tuple[str, ...]
    depths: tuple[int, ...]
    n_prompt: int
    n_steps: int
    n_threads: int
    kind: BackendKind = "auto"
    activations: Activations = "int16"
    profile: bool = False
    difference_limit: float = DIFFERENCE_LIMIT
    rotated: str = ""

    def label(self, kv_type: str) -> str:
        """Name a type with the options that rotate it."""
        return " ".join([kv_type, *(f"-{side}had" for side in self.rotated)])

    @property
    def n_ctx(self) -> int:
        """Tokens that a context must hold, warm-up steps included."""
        steps = self.n_steps * (2 if self.profile else 1)
        return max(*self.depths, self.n_prompt, 2 * _N_AGREE + len(_TEXT)) + steps + _BURSTS


@dataclass(frozen=True, slots=True)
class LogitsGate:
    """The first prompt's answer beside a peer's.

    Attributes
    ----------
    difference
        Of the logits after it: root mean square over that of the peer's around their mean.
    agreed
        How many of the first `_N_AGREE` greedy tokens are the same, counted up to the first that is not.
    limit
        The largest difference that is timed.
    """

    kv_type: str
    peer: str
    difference: float
    agreed: int
    limit: float = DIFFERENCE_LIMIT

    @property
    def passed(self) -> bool:
        """True if the logits agree; a NaN does not."""
        return self.difference <= self.limit


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of a step at a depth, or of the prompt; by runner.

    Attributes
    ----------
    profile
        Milliseconds of our step by kind of operation, `outside` for what is not one; empty if it was not asked for.
    """

    kv_type: str
    depth: int
    n_tokens: int
    time: dict[str, Spread] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)

    @property
    def tok_s(self) -> dict[str, float]:
        """Tokens per second, by runner."""
        return {name: 1e3 * self.n_tokens / t.median_ms for name, t in self.time.items()}

    @property
    def ratio(self) -> dict[str, float]:
        """By peer, how many times faster than it."""
        ours = self.time[OURS].median_ms
        return {name: t.median_ms / ours for name, t in self.time.items() if name != OURS}


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """All that a run found."""

    model: str
    backend: str
    peers: tuple[Found, ...]
    gates: tuple[LogitsGate, ...]
    prompts: tuple[Speed, ...]
    steps: tuple[Speed, ...]
    fallbacks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if every type was stored as asked and every gate passed."""
        return not self.fallbacks and all(gate.passed for gate in self.gates)


class OurRunner:
    """The runner of this package."""

    def __init__(self, loaded: Loaded, step: Step, plan: Plan, kv_type: str) -> None:
        self.notices: list[str] = []
        types = KVTypes(kv_type, kv_type, rotate_k="k" in plan.rotated, rotate_v="v" in plan.rotated)
        specs = Policy(types=types).resolve(kv_facts(loaded.description.facts))
        self._engine = Engine(
            loaded.model, specs, n_ctx=plan.n_ctx, guard=Guard(), notify=self.notices.append, step=step
        )

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache."""
        return self._engine.n_tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self._engine.cache.reset()
        self._engine.history = torch.empty(1, 0, dtype=torch.long)

    def advance(self, ids: Sequence[int]) -> Logits:
        """Process tokens; the logits after them `[V]`."""
        if self.n_tokens == 0:
            logits = self._engine.prefill(ids)
        else:
            assert len(ids) == 1
            logits = self._engine.advance(torch.tensor(ids))
        values: Logits = logits[0].numpy()
        return values

    def profile(self, n_steps: int) -> dict[str, float]:
        """Measure a greedy step's milliseconds by kind of operation; empty where another than the native step runs."""

        def generate() -> None:
            token = 1
            for _ in range(n_steps):
                token = int(self.advance([token]).argmax())

        return self._profile(generate, n_steps, "outside")

    def profile_prompt(self, ids: Sequence[int]) -> dict[str, float]:
        """Measure the milliseconds of a prompt's token by kind of operation, from an empty cache."""
        self.reset()
        return self._profile(lambda: self.advance(ids), len(ids), "attention, and outside")

    def _profile(self, work: Callable[[], object], n_tokens: int, rest: str) -> dict[str, float]:
        step = self._engine.step
        if not isinstance(step, NativeStep):
            return {}
        step.start_timing()
        begin = time.perf_counter()
        work()
        whole = time.perf_counter() - begin
        seconds = {kind: spent for kind, spent in step.timing().items() if spent}
        seconds[rest] = whole - sum(seconds.values())
        return {kind: 1e3 * spent / n_tokens for kind, spent in sorted(seconds.items(), key=lambda item: -item[1])}

    def deepen(self, n_tokens: int) -> None:
        """Repeat the stored rows until there are `n_tokens`."""
        for layer in self._engine.cache.kv_layers:
            while layer.n_seen < n_tokens:
                layer.append(*layer.decode(min(layer.n_stored, n_tokens - layer.n_seen)))
        self._engine.history = torch.zeros(1, n_tokens, dtype=torch.long)


def run_decode_bench(
    description: Description,
    plan: Plan,
    *,
    peers: Sequence[str],
    progress: Callable[[str], object] = lambda _: None,
) -> DecodeReport:
    """Check and time every type.

    Parameters
    ----------
    peers
        Names from `PEERS`; one that is not installed, or does not take the model's files, is reported and left out.

    Raises
    ------
    UsageError
        If the backend that was asked for cannot run the model.
    """
    torch.set_num_threads(plan.n_threads)
    found = tuple(_find(name, description) for name in peers)
    make_step = resolve_step(description.config, "cpu", plan.kind, activations=plan.activations)
    progress(f"load {description.name}")
    # As `hybridkv run` does: a backend that is asked to be Transformers' own has its plain weights.
    weights: WeightKind = "plain" if plan.kind == "eager" or packing_rejects("cpu") else "auto"
    loaded = load(description, dtype=torch.float32, device="cpu", weights=weights, backend=plan.kind)
    step = make_step(loaded.model)
    gates: list[LogitsGate] = []
    prompts: list[Speed] = []
    steps: list[Speed] = []
    fallbacks: list[str] = []
    with ExitStack() as stack:
        handle = stack.enter_context(ik_model(description.path)) if any(p.path for p in found) else None
        for kv_type in plan.types:
            with ExitStack() as contexts:
                ours = OurRunner(loaded, step, plan, kv_type)
                runners: dict[str, Runner] = {OURS: ours}
                if handle is not None and runs(kv_type):
                    runners["ik"] = contexts.enter_context(
                        ik_context(handle, kv_type, n_ctx=plan.n_ctx, n_threads=plan.n_threads, rotated=plan.rotated)
                    )
                label = plan.label(kv_type)
                progress(f"{label}: compare")
                found_gates = _compare(label, runners, _text_ids(loaded), plan.difference_limit)
                gates += found_gates
                if not all(gate.passed for gate in found_gates):
                    continue
                progress(f"{label}: prompt of {plan.n_prompt}")
                prompts.append(_time_prompt(label, runners, plan, _vocabulary(loaded)))
                for depth in _order(plan):
                    progress(f"{label}: depth {depth}")
                    steps.append(_time_steps(label, runners, plan, depth, _vocabulary(loaded)))
                fallbacks += ours.notices
    by_type = {plan.label(kv_type): i for i, kv_type in enumerate(plan.types)}
    steps.sort(key=lambda s: (by_type[s.kv_type], s.depth))
    return DecodeReport(
        description.name, step.name, found, tuple(gates), tuple(prompts), tuple(steps), tuple(fallbacks)
    )


def _find(name: str, description: Description) -> Found:
    found = PEERS[name]()
    if found.path is not None and description.path.suffix != ".gguf":
        return Found(name, "left out: it reads GGUF files only")
    return found


def _vocabulary(loaded: Loaded) -> int:
    return int(loaded.description.config.get_text_config(decoder=True).vocab_size)


def _text_ids(loaded: Loaded) -> list[int]:
    """Tokenize the first prompt: a text where there is a tokenizer."""
    if loaded.tokenizer is not None:
        return list(loaded.tokenizer.encode(_TEXT))
    return _random_ids(2 * _N_AGREE, _vocabulary(loaded))


def _random_ids(n: int, n_vocab: int) -> list[int]:
    return torch.randint(n_vocab, (n,), generator=torch.Generator().manual_seed(1)).tolist()


def _order(plan: Plan) -> list[int]:
    """Order depths: those from the prompt's length up continue after it; shallower ones come last, from the start."""
    depths = sorted(set(plan.depths))
    return [d for d in depths if d >= plan.n_prompt] + [d for d in depths if d < plan.n_prompt]


def _compare(kv_type: str, runners: dict[str, Runner], ids: list[int], limit: float) -> list[LogitsGate]:
    """Compare every peer's first logits and greedy tokens with ours; this also warms everybody up."""
    first: dict[str, Logits] = {}
    greedy: dict[str, list[int]] = {}
    for name, runner in runners.items():
        runner.reset()
        logits = runner.advance(ids)
        first[name] = logits.astype(np.float32, copy=True)
        tokens = greedy[name] = [int(logits.argmax())]
        while len(tokens) < _N_AGREE:
            tokens.append(int(runner.advance(tokens[-1:]).argmax()))
    gates = []
    for name in runners.keys() - {OURS}:
        theirs = first[name]
        difference = float(np.sqrt(np.mean((first[OURS] - theirs) ** 2)) / theirs.std())
        same = [a == b for a, b in zip(greedy[OURS], greedy[name], strict=True)]
        gates.append(LogitsGate(kv_type, name, difference, (*same, False).index(False), limit))
    return gates


def _time_prompt(kv_type: str, runners: dict[str, Runner], plan: Plan, n_vocab: int) -> Speed:
    """Time prompts in turns, each from an empty cache; slow ones once."""
    ids = _random_ids(plan.n_prompt, n_vocab)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_PROMPT_ROUNDS):
        for name, runner in runners.items():
            if sum(seconds[name]) > _PROMPT_BUDGET_S / _PROMPT_ROUNDS:
                continue
            runner.reset()
            begin = time.perf_counter()
            runner.advance(ids)
            seconds[name].append(time.perf_counter() - begin)
    ours = runners[OURS]
    assert isinstance(ours, OurRunner)
    profile = ours.profile_prompt(ids) if plan.profile else {}
    return Speed(kv_type, 0, plan.n_prompt, {name: spread(s) for name, s in seconds.items()}, profile)


def _time_steps(kv_type: str, runners: dict[str, Runner], plan: Plan, depth: int, n_vocab: int) -> Speed:
    """Time greedy steps from `depth` on, in turns of bursts; the first step of a burst is a warm-up."""
    for runner in runners.values():
        if runner.n_tokens == 0 or runner.n_tokens > depth:
            runner.reset()
            if depth:
                runner.advance(_random_ids(min(depth, plan.n_prompt), n_vocab))
        if runner.n_tokens < depth:
            runner.deepen(depth)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    tokens = dict.fromkeys(runners, 1)
    share = -(-plan.n_steps // _BURSTS)
    for _ in range(_BURSTS):
        for name, runner in runners.items():
            for n_done in range(share + 1):
                begin = time.perf_counter()
                tokens[name] = int(runner.advance([tokens[name]]).argmax())
                if n_done:
                    seconds[name].append(time.perf_counter() - begin)
    ours = runners[OURS]
    assert isinstance(ours, OurRunner)
    profile = ours.profile(plan.n_steps) if plan.profile else {}
    return Speed(kv_type, depth, 1, {name: spread(s) for name, s in seconds.items()}, profile)
