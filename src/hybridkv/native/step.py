"""The native step: a model's graph as native operations on weights as they lie, and attention through the cache.

Owns the operations and their buffers. The weights are their source's: a mapped file, a directory, or a Transformers
model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hybridkv.kernels import AttentionParams, cpu_native
from hybridkv.kernels.step import Angles, Caches
from hybridkv.kernels.threads import torch_on_one_thread
from hybridkv.kernels.weights import Activations
from hybridkv.kernels.weights import rows as gather
from hybridkv.model import ModelGraph, graph_of
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import cpu as lowering
from hybridkv.native.builder import Builder
from hybridkv.native.checked import run_checked
from hybridkv.native.continuations import Builders, Continuations
from hybridkv.native.draft_span import DraftSpan
from hybridkv.native.held import Continuation, run_many, run_one
from hybridkv.native.hidden import HiddenStates
from hybridkv.native.predict import Predictor
from hybridkv.native.rope_tables import RopeTables
from hybridkv.native.rows import (
    fault_of,
    heads_first,
    is_direct,
    n_before_check,
    new_rows,
    rows_of,
    starts,
)
from hybridkv.native.sources import Typed, activations_used, source_of, types_held
from hybridkv.native.states import StateAddresses, cache_states, next_states
from hybridkv.runtime import Fault, ModelCache, StepResult, WatchedRows, one_by_one
from hybridkv.runtime.attend import attend_new

MAX_ROWS = 512
"""Tokens of all sequences in one step; more go in several. Bounds the buffers."""

HEAD_ROWS = 64
"""Tokens whose logits are computed in one step: a row of them is as wide as the vocabulary."""


class NativeStep:
    """Runs a model's layers natively; `rejects` must have said None.

    Parameters
    ----------
    model
        A `NativeModel`, or a Transformers causal language model on the CPU, whose parameters are then brought into the
        file's order once.
    activations
        What quantized weights are multiplied with; int16 for types that have no products with 8 bits.
    """

    takes_chunks = True

    def __init__(self, model: LanguageModel, activations: Activations = "int16") -> None:
        self._activations: Activations = activations
        self._graph: ModelGraph = graph_of(model.config)
        self._source: Typed = source_of(model)
        self._states = StateAddresses()
        self._drafted: dict[int, Continuation | DraftSpan] = {}
        self._hidden = HiddenStates()
        self._embedding = self._source.weight(self._graph.embed)
        self._layers = self._write(lowering.build_layers, 1)
        self._head = self._write(lowering.build_head, 1)
        self._rope = RopeTables(model.config, self._layers.ropes)
        self._held = Continuations(self._embedding, self._graph.embed_scale, self._rope)

    @property
    def name(self) -> str:
        """With the instruction set, the weights' types, and what activations are rounded to if it was asked for."""
        used = f", {activations_used(self._source)}" if self._activations == "int8" else ""
        return f"native-{cpu_native.isa()}, weights {types_held(self._source)}{used}"

    @property
    def predictor(self) -> Predictor | None:
        """The head of the model that guesses tokens ahead; None if it has none. Hidden states are kept for it."""
        graph = self._graph
        if graph.prediction is None or not self._source.has(graph.prediction.prefix + graph.prediction.project):
            return None
        self._hidden.ask()
        return Predictor(graph, self._source, self._rope.of_kind, self._activations)

    def take_hidden(self, cache: ModelCache) -> Tensor | None:
        """Take the final hidden states of the last step's tokens of a cache, `[n, hidden]`; they are given once."""
        return self._hidden.take(cache)

    def keep_hidden(self, cache: ModelCache, *, wanted: bool) -> None:
        """Stop keeping hidden states of a cache, or begin again; see `DraftStep.keep_hidden`."""
        self._hidden.want(cache, wanted=wanted)

    def start_timing(self) -> None:
        """Time every operation from now on; without this, nothing is timed and nothing costs."""
        self._layers.program.start_timing()
        self._head.program.start_timing()

    def timing(self) -> dict[str, float]:
        """Sum the seconds since `start_timing` by kind of operation, those of the output head apart."""
        seconds: dict[str, float] = {}
        for part, builder in (("", self._layers), ("head: ", self._head)):
            for kind, spent in builder.program.timing():
                seconds[part + kind] = seconds.get(part + kind, 0.0) + spent
        return seconds

    @property
    def _builders(self) -> Builders:
        return self._layers, self._head

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.forward`."""
        if tokens.shape[1] == 1:
            held = self._held.find(cache, len(tokens), 1, position, self._builders)
            if held is not None:
                return self._continue(held, tokens, cache)
        return self._forward(tokens, cache, position)

    @torch_on_one_thread()
    def _forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        self._held.forget(cache)
        for part in self._parts(tokens):
            hidden = self._run(part, cache, position)
            position += part.shape[1]
        self._hidden.note([cache], hidden[0], [hidden.shape[1]])
        logits = self._logits(hidden[:, -1])
        if tokens.shape[1] == 1:
            self._held.keep(cache, self._held.hold(cache, len(tokens), position, self._builders))
        return logits

    def _continue(self, held: Continuation, tokens: Tensor, cache: ModelCache) -> Tensor:
        """Continue a prepared cache by one token per sequence."""
        self._held.forget(cache)  # but for the end of this: what fails in between leaves rows that nobody knows
        logits, faults = run_one(held, tokens)
        self._source.verify()
        for number, found in faults:
            layer = rows_of(cache, self._layers.calls[number].layer)
            if layer.watch.guard.watches:
                raise fault_of(layer, found)
        self._held.keep(cache, held)
        if self._hidden.is_asked:
            self._hidden.note([cache], self._layers.buffer("x")[:1], [1])
        return logits

    def _prepared(
        self, spans: Sequence[int], caches: Sequence[ModelCache], positions: Sequence[int]
    ) -> list[Continuation] | None:
        """Return what takes so many tokens of every cache, prepared if need be; None if not all can be."""
        n_rows = sum(spans)
        if n_rows > HEAD_ROWS:
            return None
        if self._layers.n_rows < n_rows:
            self._layers = self._write(lowering.build_layers, n_rows)
        if self._head.n_rows < n_rows:
            self._head = self._write(lowering.build_head, max(n_rows, 8))
        return self._held.find_all(spans, caches, positions, self._builders)

    def _continue_many(
        self, held: Sequence[Continuation], tokens: Sequence[Sequence[int]], caches: Sequence[ModelCache]
    ) -> StepResult:
        """Continue prepared caches of one sequence each, some of them by several tokens."""
        for cache in caches:
            self._held.forget(cache)
        spans = [len(own) for own in tokens]
        logits, faults = run_many(held, tokens)
        self._source.verify()
        owners = [i for i, n in enumerate(spans) for _ in range(n)]
        failed: dict[int, Fault] = {}
        for index, found in faults:
            number, row = divmod(index, len(owners))
            layer = rows_of(caches[owners[row]], self._layers.calls[number].layer)
            if layer.watch.guard.watches:
                failed.setdefault(row, fault_of(layer, found))
        unsound = {owners[row] for row in failed}
        self._drafted = {}
        for i, (cache, each) in enumerate(zip(caches, held, strict=True)):
            if spans[i] > 1:
                self._drafted[id(cache)] = each
            elif i not in unsound:
                self._held.keep(cache, each)
        self._hidden.note(caches, self._layers.buffer("x")[: len(owners)], spans)
        return StepResult(logits, failed)

    @torch_on_one_thread()
    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
        """Run all sequences at once, weights read once; see `Step.forward_many`."""
        return self.forward_drafts([[token] for token in tokens.tolist()], caches, positions)

    @torch_on_one_thread()
    def forward_drafts(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[ModelCache], positions: Sequence[int]
    ) -> StepResult:
        """Run all tokens of all caches at once, weights read once; see `DraftStep.forward_drafts`.

        A cache whose next call the guard measures for the first time, or whose kernels are not native, goes by itself.
        """
        spans = [len(own) for own in tokens]
        if spans == [1]:
            return one_by_one(self, torch.tensor(tokens[0]), caches, positions)
        if (held := self._prepared(spans, caches, positions)) is not None:
            return self._continue_many(held, tokens, caches)
        for cache in caches:
            self._held.forget(cache)
        layers = [[rows_of(cache, call.layer) for call in self._layers.calls] for cache in caches]
        together = [i for i in range(len(caches)) if all(map(is_direct, layers[i]))]
        flat = torch.tensor([token for own in tokens for token in own])
        if len(together) == len(caches):
            hidden, failed = self._decode_many(flat, caches, layers, positions, spans)
            self._hidden.note(caches, hidden, spans)
            return StepResult(self._logits(hidden, "separate"), failed)
        alone = [i for i in range(len(caches)) if i not in together]
        assert all(spans[i] == 1 for i in alone), spans
        first_rows = starts(spans)
        logits = torch.full((len(flat), self._graph.n_vocab), torch.nan)
        failed = {}
        for group in filter(None, (alone, together)):
            rows = [row for i in group for row in range(first_rows[i], first_rows[i] + spans[i])]
            own = [caches[i] for i in group], [positions[i] for i in group]
            if group is alone:
                part = one_by_one(self, flat[rows], *own)
            else:
                part = self.forward_drafts([tokens[i] for i in group], *own)
            logits[rows] = part.logits
            failed |= {rows[row]: error for row, error in part.failed.items()}
        return StepResult(logits, failed)

    def room(self, cache: ModelCache, n_tokens: int) -> int:
        """Count how many of the next tokens `forward_drafts` takes of this cache; see `DraftStep.room`."""
        if n_tokens == 1:
            return 1
        if self._held.has_room(n_tokens, cache, self._builders):
            return n_tokens
        layers = [rows_of(cache, call.layer) for call in self._layers.calls]
        if not all(map(is_direct, layers)):
            return 1
        return max(1, n_before_check(layers, min((n_tokens, *(layer.store.room() for layer in layers)))))

    def keep(self, cache: ModelCache, n_kept: int) -> None:
        """Truncate a cache to the first tokens of its last step; see `DraftStep.keep`."""
        drafted = self._drafted.pop(id(cache), None)
        if isinstance(drafted, Continuation):
            drafted.keep(n_kept)
            self._held.keep(cache, drafted)
            return
        if drafted is None:
            assert n_kept == 1, n_kept
            return
        drafted.keep(cache, n_kept)

    @torch_on_one_thread()
    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence; see `Step.logits`."""
        self._held.forget(cache)
        logits = []
        for part in self._parts(tokens):
            hidden = self._run(part, cache, position)
            position += part.shape[1]
            self._hidden.note([cache], hidden[0], [hidden.shape[1]])
            logits.append(self._logits(hidden.flatten(0, 1)).view(*part.shape, -1))
        return torch.cat(logits, dim=1)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tokens, max(1, MAX_ROWS // len(tokens)), dim=1)

    def _logits(self, hidden: Tensor, caches: Caches = "shared") -> Tensor:
        """Apply the head to hidden states `[N, hidden size]`: `[N, V]`."""
        if self._head.n_rows < min(len(hidden), HEAD_ROWS):
            self._head = self._write(lowering.build_head, min(len(hidden), HEAD_ROWS))
        head = self._head
        logits = torch.empty(len(hidden), head.buffer("logits").shape[1])
        for begin in range(0, len(hidden), head.n_rows):
            rows = hidden[begin : begin + head.n_rows]
            n_rows = len(rows)
            head.buffer("x")[:n_rows] = rows
            head.program.run(0, len(head.program), n_rows, 1, caches=caches)
            logits[begin : begin + n_rows] = head.buffer("logits")[:n_rows]
        self._source.verify()
        return logits

    def _run(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Run all layers over `tokens` `[B, T]`; hidden states `[B, T, hidden size]`, valid until the next step."""
        n_seqs, n_tokens = tokens.shape
        x = self._embedded(tokens.flatten())
        builder, program = self._layers, self._layers.program
        states = self._states.of(self._layers, cache, n_seqs)
        angles = self._rope.span(position, n_tokens)
        layers = [rows_of(cache, call.layer) for call in builder.calls]
        if n_tokens == 1 and all(is_direct(layer) for layer in layers):
            self._decode(layers, n_seqs, angles, states)
            return x.view(n_seqs, n_tokens, -1)
        begin = 0
        for call, layer in zip(builder.calls, layers, strict=True):
            program.run(begin, call.index, n_seqs, n_tokens, angles=angles, states=states)
            q, k, v = (heads_first(x, n_seqs, n_tokens) for x in (call.q, call.k, call.v))
            out = attend_new(layer, q, k, v, AttentionParams(scale=call.scale))
            heads_first(call.out, n_seqs, n_tokens).copy_(out)
            begin = call.index + 1
        program.run(begin, len(program), n_seqs, n_tokens, angles=angles, states=states)
        return x.view(n_seqs, n_tokens, -1)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Embed `tokens` `[N]` into the first rows of buffer `x`."""
        if self._layers.n_rows < len(tokens):
            self._layers = self._write(lowering.build_layers, len(tokens))
        x = self._layers.buffer("x")[: len(tokens)]
        gather(self._embedding, tokens, out=x)
        return x if self._graph.embed_scale == 1 else x.mul_(self._graph.embed_scale)

    def _decode_many(
        self,
        tokens: Tensor,
        caches: Sequence[ModelCache],
        layers: Sequence[Sequence[WatchedRows]],
        positions: Sequence[int],
        spans: Sequence[int],
    ) -> tuple[Tensor, dict[int, Fault]]:
        """Run all layers over the tokens of each cache at once; the hidden states `[rows, hidden]`, failures by row."""
        x = self._embedded(tokens)
        program, first_rows = self._layers.program, starts(spans)
        self._drafted = {
            id(c): DraftSpan(self._layers, row, n) for c, row, n in zip(caches, first_rows, spans, strict=True)
        }
        held = [cache_states(self._layers, cache, 1) for cache in caches]
        states = program.separate_addresses(held)
        before: list[int] = []
        if max(spans) > 1:
            before = states
            states = program.separate_addresses(
                [
                    next_states(self._layers, cache, own) if n > 1 else own
                    for cache, own, n in zip(caches, held, spans, strict=True)
                ]
            )
        places = [position + i for position, n in zip(positions, spans, strict=True) for i in range(n)]
        angles = self._rope.at(places)
        by_call = [layer for call in zip(*layers, strict=True) for layer in call]
        rows = [new_rows(layer, 1, spans[i % len(spans)]) for i, layer in enumerate(by_call)]
        run = partial(
            program.run,
            n_seqs=len(caches),
            n_tokens=1,
            angles=angles,
            states=states,
            rows=rows,
            caches="separate",
            spans=spans,
            before=before,
        )
        return x, run_checked(self._layers, run, by_call, rows, 1, spans)

    def _decode(self, layers: Sequence[WatchedRows], n_seqs: int, angles: Sequence[Angles], states: list[int]) -> None:
        """Run all layers over one token per sequence, attention included, in one go but where the guard looks in.

        Raises
        ------
        NonFiniteError
            For the first layer whose attention output is not finite, if the guard watches.
        MismatchError
            If the guard measures and a layer's rows or attention are not what its types mean.
        """
        rows = [new_rows(layer, n_seqs) for layer in layers]
        program = self._layers.program
        run = partial(program.run, n_seqs=n_seqs, n_tokens=1, angles=angles, states=states, rows=rows)
        for fault in run_checked(self._layers, run, layers, rows, n_seqs).values():
            raise fault

    def _write(self, build: Callable[[ModelGraph, Builder], None], n_rows: int) -> Builder:
        """Write operations for buffers of `n_rows` rows."""
        builder = Builder(n_rows, self._source, self._activations)
        build(self._graph, builder)
        return builder
