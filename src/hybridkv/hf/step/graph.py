"""The graph step: a decode step recorded once as a CUDA graph and replayed for every token after it.

A decode step of a hybrid is hundreds of launches of a few microseconds, and the host takes far longer to ask for them
than the device to run them. A replay asks once. What changes from step to step (tokens, positions, row counters)
lies in memory that the recorded kernels read, and so do states and rows, which they update in place.

A recording belongs to one cache and to the very tensors that this cache held when it was made: it is looked up by the
cache, compared tensor by tensor before each replay, dropped if one of them is another, and dies with the cache. So it
can run neither on another sequence's state nor on memory that has moved.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hybridkv.cache.device_rows import N_COUNTERS, counters_of
from hybridkv.errors import ModelError
from hybridkv.hf.step.host_work import Waits, Work, sent_to
from hybridkv.model.facts import layer_facts
from hybridkv.model.protocols import Config
from hybridkv.runtime import ModelCache, Step, StepResult, one_by_one
from hybridkv.runtime.attend import non_finite
from hybridkv.runtime.view import DeviceStep, Notify

LOG = logging.getLogger("hybridkv")

_HOST_ROPE = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the longest position, which Transformers asks the device for."""

_TRIAL_TOKENS = 2


def rejects(config: Config, device: str, *, native: bool = False) -> str | None:
    """Explain why decode steps of this config cannot be recorded on this type of device; None if they can.

    Whatever shows only when the model runs is found out before the first recording; see `GraphStep`.

    Parameters
    ----------
    native
        Whether our own operations run it, and not Transformers' code.
    """
    if device != "cuda":
        return f"graphs are CUDA's, and this runs on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if native:
        return None
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in _HOST_ROPE:
        return f"RoPE of type {kind!r} asks the device for its positions at each step"
    windows = [f.attention.layer for f in layer_facts(config) if f.attention is not None and f.attention.window]
    return _windows_reject(windows)


def _windows_reject(layers: Sequence[int]) -> str | None:
    if not layers:
        return None
    return f"layers {', '.join(map(str, layers))} have a sliding window, for which Transformers makes a mask"


class Decoder(Step, Protocol):
    """A step whose decoding can be recorded.

    Attributes
    ----------
    makes_masks
        Whether it gives attention a mask where a layer has a sliding window.
    """

    makes_masks: bool

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        ...

    def decode(self, tokens: Tensor, cache: ModelCache, positions: Tensor) -> Tensor:
        """Decode one token per sequence: tokens and positions int64 `[B, 1]` on the device; logits `[B, V]`."""
        ...


class Recorder(Protocol):
    """Makes a function of no arguments into one that does the same work on the same memory without its Python code."""

    def trial(self, body: Callable[[], None]) -> str | None:
        """Run the body as often as it takes to find out why it cannot be recorded; None if it can."""
        ...

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Record the body without running it."""
        ...


def set_sync_debug_mode(mode: int | str) -> None:
    """Call torch's function without its warning that the mode is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


class CudaRecorder:
    """Records CUDA graphs, each step's with memory of its own: a pool is gone with the last graph that used it."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def trial(self, body: Callable[[], None]) -> str | None:
        """Run once, run again with host syncs as errors, then capture and discard."""
        body()
        mode = torch.cuda.get_sync_debug_mode()
        set_sync_debug_mode("error")
        try:
            with sent_to(_Allowed(mode)):
                body()
        except (RuntimeError, ModelError) as error:
            return str(error).partition("\n")[0]
        finally:
            set_sync_debug_mode(mode)
        try:
            self.record(body)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Capture the body: as one graph, or as several with its work on the CPU between them."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        parts = _Parts()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            parts.begin()
            try:
                with sent_to(parts):
                    body()
            finally:
                parts.end()
        torch.cuda.synchronize()
        return parts.replay


class _Allowed(Waits):
    """Does work on the CPU, which waits for the device, while other waiting is an error."""

    def __init__(self, mode: int) -> None:
        super().__init__(torch.device("cuda"))
        self._mode = mode

    def run(self, work: Work, meanwhile: Work | None = None) -> None:
        """Wait and work."""
        set_sync_debug_mode(self._mode)
        try:
            super().run(work, meanwhile)
        finally:
            set_sync_debug_mode("error")


class _Parts:
    """Captures a step as graphs in one pool of memory, and keeps what the CPU does between them."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        self._steps: list[Callable[[], object]] = []

    def begin(self) -> None:
        """Capture what the device is asked from now on."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """End a graph."""
        self._graph.capture_end()
        self._steps.append(self._graph.replay)

    def run(self, work: Work, meanwhile: Work | None = None) -> None:
        """End a graph here, and begin another behind the work, which is done at each replay and not now."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.end()
        self._steps.append(event.record)
        if meanwhile is not None:
            self.begin()
            meanwhile()
            self.end()
        self._steps += [event.synchronize, work]
        self.begin()

    def replay(self) -> None:
        """Run all parts in order."""
        for step in self._steps:
            step()


@dataclass(slots=True)
class Recording:
    """A recorded step of one cache.

    Attributes
    ----------
    memory
        The cache's tensors at the time.
    staged, inputs
        int64 `[B + 1 + KV layers * N_COUNTERS]`: tokens, their position, and where each layer's rows are, on the host
        and on the device.
    health
        int32 `[KV layers, 2]` on the device; see `DeviceStep`.
    logits
        float32 `[B, V]`, overwritten by every replay.
    replay
        Runs the step; None until the second.
    """

    memory: tuple[Tensor, ...]
    staged: Tensor
    inputs: Tensor
    health: Tensor
    logits: Tensor | None = None
    replay: Callable[[], object] | None = None

    @classmethod
    def of(cls, memory: Sequence[Tensor], n_layers: int, n_seqs: int) -> Recording:
        """Allocate inputs and health for a cache of this memory and `n_layers` KV layers; nothing is recorded yet."""
        device, n = memory[0].device, n_seqs + 1 + n_layers * N_COUNTERS
        staged = torch.empty(n, dtype=torch.long, pin_memory=device.type == "cuda")
        inputs = torch.empty(n, dtype=torch.long, device=device)
        health = torch.zeros(n_layers, 2, dtype=torch.int32, device=device)
        return cls(tuple(memory), staged, inputs, health)

    def stage(self, tokens: Tensor, position: int, rows: Sequence[int]) -> None:
        """Hand the step its inputs, once it is counted. The copy needs no waiting: the step before it has ended."""
        n_seqs = len(tokens)
        self.staged[:n_seqs] = tokens[:, 0]
        self.staged[n_seqs:] = torch.tensor([position, *rows])
        self.inputs.copy_(self.staged, non_blocking=True)

    def result(self, cache: ModelCache) -> Tensor:
        """Wait for the step and return its logits: here the host waits for the device, and nowhere else in a step.

        Raises
        ------
        NonFiniteError
            For the first layer whose attention output is not finite, if the guard watches.
        """
        for layer, (output, source) in zip(cache.quantized, self.health.tolist(), strict=True):
            if output and layer.watch.guard.watches:
                upstream: Literal["cache", "input"] = "input" if source else "cache"
                raise non_finite(layer.store, layer.store.kernels.decode, upstream)
        assert self.logits is not None
        return self.logits.clone()

    def holds(self, memory: Sequence[Tensor]) -> bool:
        """Check whether these are the very tensors that the recording reads and writes."""
        return len(memory) == len(self.memory) and all(map(is_, memory, self.memory))


class GraphStep:
    """Replays recordings of another step's decoding; what is no decoding, that step does itself.

    Before the first recording a trial on an empty cache of the same types finds out whether anything in the model asks
    the device; if so, that is said once, and the other step continues by itself.

    Parameters
    ----------
    decoder
        Does the work.
    notify
        Where it is reported that nothing is recorded.
    recorder
        How it is recorded.
    """

    def __init__(self, decoder: Decoder, *, notify: Notify = LOG.warning, recorder: Recorder | None = None) -> None:
        self._decoder = decoder
        self._notify = notify
        self._recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self._recordings: WeakKeyDictionary[ModelCache, Recording] = WeakKeyDictionary()
        self._answers: dict[tuple[Any, ...], str | None] = {}
        self._said: set[str] = set()

    @property
    def name(self) -> str:
        """The other step's, and that its decoding is recorded."""
        return f"{self._decoder.name}, decode as a graph"

    @property
    def takes_chunks(self) -> bool:
        """As the other step does."""
        return self._decoder.takes_chunks

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.forward`.

        Raises
        ------
        NonFiniteError
            For the first layer whose attention output is not finite, if the guard watches.
        """
        if tokens.shape[1] != 1 or not self._records(cache):
            return self._decoder.forward(tokens, cache, position)
        memory, rows = _count(cache, len(tokens), position, self._decoder.device)
        recording = self._recordings.get(cache)
        if recording is None or not recording.holds(memory):
            # A cache that decodes one token alone, as a copy for one label does, is not worth a recording.
            recording = self._recordings[cache] = Recording.of(memory, len(cache.quantized), len(tokens))
            recording.stage(tokens, position, rows)
            self._run(cache, recording)
            return recording.result(cache)
        if recording.replay is None:
            recording.replay = self._recorder.record(partial(self._run, cache, recording))
        recording.stage(tokens, position, rows)
        recording.replay()
        return recording.result(cache)

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
        """Replay one sequence after the other: a recording is of one cache; see `Step.forward_many`."""
        return one_by_one(self, tokens, caches, positions)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.logits`."""
        if tokens.shape[1] == 1:
            return self.forward(tokens, cache, position).unsqueeze(1)
        return self._decoder.logits(tokens, cache, position)

    def _records(self, cache: ModelCache) -> bool:
        """Check whether the next token of this cache is decoded from a recording."""
        if cache not in self._recordings and (reason := self._reason(cache)) is not None:
            if reason not in self._said:
                self._said.add(reason)
                self._notify(f"decoding is not recorded as a graph: {reason}")
            return False
        return _settled(cache)

    def _reason(self, cache: ModelCache) -> str | None:
        """Explain why this cache's steps cannot be recorded; None if they can, or if it is too early to know."""
        layers = cache.quantized
        if not layers:
            return "no layer has a KV cache"
        windows = [layer.store.spec.facts.layer for layer in layers if layer.store.spec.facts.window]
        if self._decoder.makes_masks and windows:
            return _windows_reject(windows)
        key = (cache.specs, tuple(layer.store.kernels for layer in layers))
        if key not in self._answers:
            device = self._decoder.device.type
            reasons = (layer.store.device_step_refusal(device) for layer in layers)
            known = next((reason for reason in reasons if reason is not None), None)
            if known is None and not _settled(cache):
                return None
            self._answers[key] = self._trial(cache) if known is None else known
        return self._answers[key]

    def _trial(self, cache: ModelCache) -> str | None:
        """Decode a token on an empty cache of the same types, which nobody needs afterwards."""
        device, scratch = self._decoder.device, cache.empty(n_ctx=_TRIAL_TOKENS + 1)
        tokens = torch.zeros(1, _TRIAL_TOKENS, dtype=torch.long, device=device)
        self._decoder.forward(tokens, scratch, 0)
        memory, rows = _count(scratch, 1, _TRIAL_TOKENS, device)
        recording = Recording.of(memory, len(scratch.quantized), 1)
        recording.stage(tokens[:, :1].cpu(), _TRIAL_TOKENS, rows)
        return self._recorder.trial(partial(self._run, scratch, recording))

    def _run(self, cache: ModelCache, recording: Recording) -> None:
        """Run the recorded part: one step, by the row counters on the device alone."""
        n_layers = len(recording.health)
        n_seqs = len(recording.inputs) - 1 - n_layers * N_COUNTERS
        tokens, position, rows = torch.split(recording.inputs, [n_seqs, 1, n_layers * N_COUNTERS])
        tokens, positions = tokens.unsqueeze(1), position.expand(n_seqs, 1)
        rows = rows.to(torch.int32).view(n_layers, N_COUNTERS, 1).expand(-1, -1, n_seqs).contiguous()
        recording.health.zero_()
        with _on_device(cache, rows, recording.health):
            logits = self._decoder.decode(tokens, cache, positions)
        if recording.logits is None:
            recording.logits = torch.empty_like(logits, dtype=torch.float32)
        recording.logits.copy_(logits)


def _settled(cache: ModelCache) -> bool:
    """Check that the cache has its memory, and that the guard has nothing to measure in the next step."""
    for layer in cache.quantized:
        store, watch = layer.store, layer.watch
        measures = watch.awaits_first_check and store.has_packed(1)  # of exact rows alone there is nothing to measure
        if measures or not store.n_stored or watch.should_check(store.n_seen + 1, 1):
            return False
    return all(all(layer.has_previous_state.values()) for layer in cache.stateful)


def _count(cache: ModelCache, n_seqs: int, position: int, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Count one token per sequence in every KV layer, which takes more memory where it must.

    Returns all tensors that then hold rows and states, and where every layer's rows are.
    """
    memory: list[Tensor] = []
    counters: list[int] = []
    for layer in cache.quantized:
        store = layer.store
        assert store.n_seen == position, (store.n_seen, position)
        store.reserve_only(n_seqs, 1, device)
        segments = store.segments
        counters += counters_of(segments)
        for segment in segments:
            memory += segment.memory
    for state in cache.stateful:
        memory += state.memory
    return memory, counters


@contextmanager
def _on_device(cache: ModelCache, rows: Tensor, health: Tensor) -> Iterator[None]:
    """Let every KV layer store and attend by row counters on the device."""
    layers = cache.quantized
    try:
        for layer, counters, word in zip(layers, rows, health, strict=True):
            layer.device_step = DeviceStep(counters, word)
        yield
    finally:
        for layer in layers:
            layer.device_step = None
