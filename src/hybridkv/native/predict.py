"""A model's head of multi-token prediction as native operations: guesses of the tokens behind the next one.

Owns the head's operations and how rows come into its cache, a layer of its own that the model's caches know nothing of.
The weights are the model's source's. What it guesses need not be exact, only likely: wrong guesses cost time and never
change the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hybridkv.cache import AttentionFacts, KVLayer, KVSpec, KVTypes, resolve
from hybridkv.cache.spec import UNBOUNDED
from hybridkv.kernels import ENCODERS, KERNELS, AttentionParams
from hybridkv.kernels.cache_rows import CacheRows
from hybridkv.kernels.step import Angles
from hybridkv.kernels.weights import Activations
from hybridkv.kernels.weights import rows as gather
from hybridkv.model import Attention, ModelGraph
from hybridkv.native import cpu as lowering
from hybridkv.native.builder import Builder
from hybridkv.native.draft_rows import DraftRows
from hybridkv.native.rows import heads_first, is_direct, new_rows
from hybridkv.native.sources import Typed
from hybridkv.policy import Guard
from hybridkv.runtime import WatchedRows
from hybridkv.runtime.attend import attend_new
from hybridkv.runtime.view import LayerWatch

WINDOW = 1024
"""Tokens that a head attends to, itself included: of longer texts it guesses hardly better with more, and rows cost."""

MOST_NEW = 8
"""Tokens that are read at once before a guess; of a longer prompt only the last so many are.

With 64, the first 60 tokens behind a prompt took 3 % fewer steps, and reading took a small model four times as long.
"""

_FEW = 16

Turns = Callable[[str | None, Sequence[int]], Angles]


def _rows_spec(graph: ModelGraph) -> KVSpec:
    """Say how the rows of a head are stored, of a model that has one."""
    assert graph.prediction is not None
    branches = graph.prediction.block.branches
    a = next(part for branch in branches for part in branch.parts if isinstance(part, Attention))
    facts = AttentionFacts(0, a.n_heads, a.n_kv_heads, a.head_dim, a.head_dim, window=WINDOW)
    return KVSpec(facts, KVTypes("f16", "f16"))


def rows_bytes(graph: ModelGraph) -> int:
    """Count the bytes of a head's cache of one sequence; 0 for a model without one."""
    return 0 if graph.prediction is None else _rows_spec(graph).bytes_at(UNBOUNDED)


class Predictor:
    """The head; one for all sequences. Its calls are for a thread that keeps torch to itself (`torch_on_one_thread`).

    Parameters
    ----------
    graph
        Of a model that has one.
    source
        Holds its weights.
    turns
        Gives RoPE's angles of positions.
    activations
        What products round them to, as in the model.
    """

    def __init__(self, graph: ModelGraph, source: Typed, turns: Turns, activations: Activations = "int16") -> None:
        assert graph.prediction is not None
        self._graph, self._source, self._turns = graph, source, turns
        self._activations: Activations = activations
        own = graph.prediction.prefix + graph.prediction.embed
        self._embedding = source.weight(own if source.has(own) else graph.embed)
        self._norm = source.vector(graph.norm.weight).flatten()
        p = graph.prediction
        names = (p.prefix + p.head, graph.head, graph.embed)
        self._head = DraftRows(source.weight(next(name for name in names if source.has(name))), p.tokens)
        self._many = self._write(MOST_NEW)
        self._one = self._write(1)
        self._head_begins = len(self._one.program)
        lowering.build_prediction_head(graph, self._one, self._head.weight)

    def new_rows(self) -> WatchedRows:
        """Create an empty cache of one sequence: exact rows, which nothing guards."""
        store = KVLayer(_rows_spec(self._graph), lambda spec: resolve(spec, "cpu", KERNELS, ENCODERS))
        watch = LayerWatch(Guard(mode="off"), lambda _: None)
        watch.awaits_first_check = False
        return WatchedRows(store, watch)

    def read(self, rows: WatchedRows, tokens: Sequence[int], hidden: Tensor, position: int) -> None:
        """Read tokens that the text now has, each with the model's final hidden state `[n, hidden]` before it."""
        self._head.take(tokens)
        one = self._one
        normed = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + self._graph.norm.eps) * self._norm
        if len(tokens) == 1 and is_direct(rows):
            one.buffer("hidden").copy_(normed)
            self.add(rows, tokens[0], position)
            return
        # Many are attended as a prompt's are; few by the code that reads tiles of rows once.
        native = is_direct(rows) and len(tokens) <= min(_FEW, rows.store.room())
        last = self._run(rows, tokens, normed, position, native=native)
        one.buffer("hidden").copy_(last)
        one.program.run(self._head_begins, len(one.program), 1, 1, angles=self._angles([0]))

    def guess(self) -> tuple[int, float]:
        """Return the likeliest token after what was read or added last, and its share."""
        logits = self._one.buffer("logits")[0].numpy()  # over a few thousand values a sixth of what torch takes
        token = int(logits.argmax())
        return self._head.token(token), float(1 / np.exp(logits - logits[token]).sum())

    def add(self, rows: WatchedRows, token: int, position: int) -> None:
        """Continue as if a guessed token were the text's."""
        one = self._one
        gather(self._embedding, torch.tensor([token]), out=one.buffer("embedding"))
        one.program.run(
            0,
            len(one.program),
            1,
            1,
            angles=self._angles([position]),
            rows=[new_rows(rows, 1)],
            caches="separate",
            spans=[1],
        )

    def _run(self, rows: WatchedRows, tokens: Sequence[int], hidden: Tensor, position: int, *, native: bool) -> Tensor:
        """Run the block over some tokens; the last one's hidden state `[1, hidden]`."""
        n = len(tokens)
        if self._many.n_rows < n:
            self._many = self._write(n)
        many, program = self._many, self._many.program
        gather(self._embedding, torch.tensor(tokens), out=many.buffer("embedding")[:n])
        many.buffer("hidden")[:n] = hidden
        angles = self._angles(range(position, position + n))
        if native:
            new: list[CacheRows] = [new_rows(rows, 1, n)]
            program.run(0, len(program), 1, 1, angles=angles, rows=new, caches="separate", spans=[n])
        else:
            (call,) = many.calls
            program.run(0, call.index, 1, n, angles=angles)
            q, k, v = (heads_first(x, 1, n) for x in (call.q, call.k, call.v))
            heads_first(call.out, 1, n).copy_(attend_new(rows, q, k, v, AttentionParams(scale=call.scale)))
            program.run(call.index + 1, len(program), 1, n, angles=angles)
        return many.buffer("hidden")[n - 1 : n]

    def _angles(self, positions: Sequence[int]) -> list[Angles]:
        return [self._turns(kind, list(positions)) for kind in self._one.ropes]

    def _write(self, n_rows: int) -> Builder:
        builder = Builder(n_rows, self._source, self._activations)
        lowering.build_prediction(self._graph, builder)
        return builder
