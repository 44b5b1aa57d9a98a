"""Many sequences on one model: each iteration decodes a token of all that run, and a chunk of one prompt.

Owns the sequences, who may begin and when, and the stored prefixes. A sequence has a cache of its own, so that none
sees another's state; the step brings them together only where weights are read. One thread calls `step` or
`run_forever`; everything else may be called from any thread. Knows no text and no HTTP; `hybridkv.server` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine.admission import Admission, is_out_of_memory
from hybridkv.engine.counters import SchedulerCounters
from hybridkv.engine.drafts import Drafts
from hybridkv.engine.intake import Intake
from hybridkv.engine.ladder import check_weights, labels_of, raised_specs
from hybridkv.engine.model_context import ModelContext, bad_logits
from hybridkv.engine.pieces import Pieces
from hybridkv.engine.prefixes import PrefixStore
from hybridkv.engine.requests import Event, Request, RequestHandle, SchedulerStats
from hybridkv.engine.reuse import Reuse
from hybridkv.engine.rounds import ask_steering, run_next, run_prompt, take_next
from hybridkv.engine.running_sequence import RunningSequence
from hybridkv.engine.sampling import draw_each
from hybridkv.engine.session import Message, load_session, save_session
from hybridkv.engine.speculation import Speculation, rejects_drafts
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import AdmissionError, HybridKVError, UsageError
from hybridkv.model.protocols import LanguageModel
from hybridkv.native import NativeStep
from hybridkv.policy import Guard, MismatchError, NonFiniteError
from hybridkv.runtime import ModelCache, Step, is_finite

MAX_PARALLEL = 256
"""Sequences that may run at once; the native step's buffers hold a row for each."""

PREFILL_CHUNK = 256
"""Most prompt tokens in one iteration, unless a scheduler is told otherwise."""

T = TypeVar("T")


class Scheduler:
    """Runs requests.

    Parameters
    ----------
    model
        A Transformers causal language model, loaded with `attn_implementation="hybridkv"`.
    specs
        How KV layers are stored where a request does not say.
    n_parallel
        Sequences that run at once.
    n_ctx
        Most tokens of a sequence, prompt and answer.
    guard
        What is watched, in every sequence.
    notify
        Where fallbacks and rebuilds are reported, on the scheduler's thread.
    step
        Runs the model over new tokens; the best that runs it by default.
    memory_bytes
        What KV rows and states of running sequences may take; None for no limit. Requests wait for it.
    prefix_bytes
        What stored prefixes may take beside that; 0 stores none.
    prefill_chunk
        Most prompt tokens in one iteration, while which the others wait; None for `PREFILL_CHUNK`, or `n_ctx` if
        less.
    max_waiting
        Requests that may wait to begin.
    speculation
        What guesses tokens ahead, where the step takes guesses; None for nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        specs: Sequence[KVSpec],
        *,
        n_parallel: int,
        n_ctx: int,
        guard: Guard,
        notify: Callable[[str], None],
        step: Step | None = None,
        memory_bytes: int | None = None,
        prefix_bytes: int = 0,
        prefill_chunk: int | None = None,
        max_waiting: int = 64,
        speculation: Speculation | None = None,
    ) -> None:
        prefill_chunk = min(PREFILL_CHUNK, n_ctx) if prefill_chunk is None else prefill_chunk
        for name, value, most in (("n_parallel", n_parallel, MAX_PARALLEL), ("prefill_chunk", prefill_chunk, n_ctx)):
            if not 1 <= value <= most:
                raise UsageError(f"{name} {value}; allowed: 1 to {most}")
        self._context = ModelContext(model, specs, n_ctx=n_ctx, guard=guard, notify=notify)
        self._n_parallel = n_parallel
        self.step_of_model = resolve_step(model.config, self._context.device)(model) if step is None else step
        takes_pieces = self.step_of_model.takes_chunks
        self._pieces = Pieces.on(self._context.device, prefill_chunk) if takes_pieces else None
        self._speculation = None if speculation is None or rejects_drafts(self.step_of_model) else speculation
        self._costs = None if self._speculation is None else self._speculation.costs
        native = isinstance(self.step_of_model, NativeStep)
        self.admission = Admission(
            model,
            n_ctx=n_ctx,
            budget_bytes=memory_bytes,
            prefill_chunk=prefill_chunk,
            conv_itemsize=4 if native else model.dtype.itemsize,
            n_states=1 if self._speculation is None else 2,
            more_bytes=0 if self._speculation is None else self._speculation.sequence_bytes,
        )
        self.prefixes = PrefixStore(prefix_bytes)
        self._reuse = Reuse(self._context, self.prefixes, self._pieces)
        self._intake = Intake(max_waiting)
        self._running: tuple[RunningSequence, ...] = ()
        self._turn = 0
        self._counters = SchedulerCounters()

    # ---- From any thread.

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> RequestHandle:
        """Queue a request.

        Parameters
        ----------
        listener
            Gets each event on the scheduler's thread, in place of the handle's iterator.

        Raises
        ------
        AdmissionError
            If it can never fit, too many wait, or the scheduler is shutting down; carries the numbers.
        UsageError, NoKernelError
            For token ids that the model does not have, or types that do not exist or do not run here.
        """
        self._context.check_ids(request)
        specs = self._context.specs_of(request.types)
        planned = self.admission.check(specs, len(request.prompt_ids), request.max_tokens)

        def make(number: int) -> RunningSequence:
            handle = RequestHandle(number, request, listener)
            return RunningSequence(handle, specs, specs, planned, self._reuse.wanted(request))

        def refusal(n_waiting: int) -> AdmissionError:
            return AdmissionError(
                f"{n_waiting} requests wait already, as many as may",
                reason="queue_full",
                planned_bytes=planned,
                budget_bytes=self.admission.budget_bytes,
                n_tokens=len(request.prompt_ids) + request.max_tokens,
                most_tokens=self.admission.most_tokens(specs),
                hint="try again later",
            )

        return self._intake.take(make, refusal)

    def stats(self) -> SchedulerStats:
        """Count what was done up to now, and what runs at this moment."""
        running = self._running
        caches = [s.cache for s in running if s.cache is not None]
        return self._counters.stats(
            running=len(running),
            waiting=len(self._intake),
            kv_bytes=sum(cache.kv_bytes for cache in caches),
            kv_bytes_used=sum(cache.kv_bytes_used for cache in caches),
            state_bytes=sum(cache.state_bytes for cache in caches),
            reserved_bytes=sum(s.planned_bytes for s in running),
            budget_bytes=self.admission.budget_bytes,
            prefix_bytes=self.prefixes.nbytes,
            prefix_budget_bytes=self.prefixes.budget_bytes,
            prefix_checkpoints=len(self.prefixes),
        )

    def save(self, handle: RequestHandle, path: Path, messages: tuple[Message, ...] = ()) -> int:
        """Write a sequence to a session file, as far as the stored prefixes hold it; the tokens that they hold.

        For any thread but the scheduler's own. After the sequence has ended, that is all but its last token, unless
        the budget has let it go.

        Parameters
        ----------
        messages
            Of the conversation, to keep beside it.

        Raises
        ------
        SessionError
            If no prefix holds any of it, or the file cannot be written.
        """
        name = f"request {handle.number}"
        session = self.call(lambda: self._reuse.export_session(handle.request, handle.token_ids, name)).result()
        save_session(path, replace(session, messages=messages), self._context.model)
        return session.n_cached

    def restore(self, path: Path, types: KVTypes | None = None) -> tuple[int, ...]:
        """Read a session file into the stored prefixes; its tokens, with which a prompt has to begin.

        For any thread but the scheduler's own. Rows of other types are converted, and `notify` says so.

        Parameters
        ----------
        types
            Of the requests that resume from it; None for those that do not say.

        Raises
        ------
        SessionError
            If the file is not a session of this model, or has no room among the stored prefixes.
        """
        session = load_session(path, self._context.model)
        self.call(lambda: self._reuse.import_session(session, path, types)).result()
        return session.tokens

    def shutdown(self, *, drain: bool) -> None:
        """Take no more requests; finish those that are there, or cancel them. `run_forever` then returns."""
        self._intake.close(None if drain else lambda: self._running)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something done between two iterations, on the scheduler's thread.

        Raises
        ------
        AdmissionError
            If the scheduler has stopped.
        """
        return self._intake.call(work)

    # ---- On the scheduler's thread.

    def run_forever(self) -> None:
        """Iterate until `shutdown`, sleeping while there is nothing to do.

        Whatever goes wrong here ends all sequences with an error event before it is raised.
        """
        try:
            while self.iterate() or self._intake.wait():
                pass
        finally:
            for sequence in (*self._running, *self._intake.stop()):
                sequence.reuses = False
                self._end(sequence, Event(finished="error", message="the scheduler has stopped"))

    @torch.inference_mode()
    def iterate(self) -> bool:
        """Run one iteration; return False if there was nothing to run."""
        self._intake.run_commands()
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return False
        start = time.perf_counter()
        decoding = [s for s in self._running if not s.prefills]
        prefilling = [s for s in self._running if s.prefills]
        if decoding:
            self._decode(decoding)
        if prefilling:
            self._prefill(self._next_of(prefilling))
        self._counters.iteration(time.perf_counter() - start)
        return True

    def _next_of(self, prefilling: list[RunningSequence]) -> RunningSequence:
        """Choose the prompt whose turn it is: the first behind the last one, in the order of requests."""
        chosen = next((s for s in prefilling if s.handle.number > self._turn), prefilling[0])
        self._turn = chosen.handle.number
        return chosen

    def _drop_cancelled(self) -> None:
        for sequence in (*self._intake.drop_cancelled(), *(s for s in self._running if s.handle.cancelled)):
            self._end(sequence, Event(finished="cancelled"))

    def _admit(self) -> None:
        """Let waiting sequences begin in their order, as far as there are places and bytes."""
        while len(self._running) < self._n_parallel:
            sequence = self._intake.pop(self._fits, self._enter)
            if sequence is None:
                return
            try:
                self._begin(sequence)
            except (HybridKVError, MemoryError, RuntimeError) as error:
                self._fail(sequence, error)

    def _fits(self, sequence: RunningSequence) -> bool:
        budget = self.admission.budget_bytes
        return budget is None or sum(s.planned_bytes for s in self._running) + sequence.planned_bytes <= budget

    def _enter(self, sequence: RunningSequence) -> None:
        self._running = (*self._running, sequence)

    def _leave(self, sequence: RunningSequence) -> None:
        self._running = tuple(s for s in self._running if s is not sequence)

    def _begin(self, sequence: RunningSequence) -> None:
        """Give a sequence its cache."""
        found = self._reuse.begin(sequence)
        if self._speculation is not None:
            sequence.drafts = self._speculation.begin(self.step_of_model) or Drafts()
        if found is not None:
            sequence.handle.count_cached(found.end)
            self._counters.cached_tokens += found.end

    def _decode(self, batch: list[RunningSequence]) -> None:
        """Decode one token of each sequence, and more where they were guessed."""
        start = time.perf_counter()
        try:
            run_next(self.step_of_model, batch, self._costs)
        except (HybridKVError, MemoryError, RuntimeError) as error:
            for sequence in batch:  # whose doing it was is not known, and the states may be half a token on
                self._fail(sequence, error)
            return
        while batch:
            taken = take_next(batch)
            for sequence, fault in taken.failed:
                self._rebuild(sequence, fault)
            if not taken.sequences:
                break
            batch = [s for s in self._draw(taken.sequences, taken.logits) if not s.handle.finished]
        self._counters.decode_s += time.perf_counter() - start

    def _prefill(self, sequence: RunningSequence) -> None:
        """Process the next chunk of one prompt, and draw the first token after its last."""
        start = time.perf_counter()
        cache, begin, end = sequence.cache, sequence.position, sequence.piece_end(self._pieces)
        assert cache is not None
        try:
            logits = run_prompt(self.step_of_model, sequence, end)
            if not is_finite(logits):
                sequence.position = end
                raise bad_logits(cache, end)
        except (NonFiniteError, MismatchError) as error:
            self._rebuild(sequence, error)
            return
        except (HybridKVError, MemoryError, RuntimeError) as error:
            self._fail(sequence, error)
            return
        sequence.position = end
        sequence.drafts.read(cache, end)
        self._counters.prompt_tokens += end - begin
        self._counters.prefill_s += time.perf_counter() - start
        if cache.specs != sequence.specs and not self._keep_within(sequence, cache):
            return
        if self._reuse.is_due(sequence):
            self._reuse.leave(sequence)
        if not sequence.prefills:
            self._draw([sequence], logits)

    def _draw(self, batch: Sequence[RunningSequence], logits: Tensor) -> list[RunningSequence]:
        """Draw and hand out the next token of each, from finite logits `[N, V]`; the sequences that drew."""
        batch, logits, lost = ask_steering(batch, logits)
        for sequence, error in lost:
            self._fail(sequence, error)
        drawn = draw_each([s.sampler for s in batch], logits, [s.seen for s in batch])
        for index, (sequence, token) in enumerate(zip(batch, drawn, strict=True)):
            self._counters.generated_tokens += 1
            event = sequence.take(token, logits[index])
            if event.finished is not None:
                self._counters.n_finished += 1
                self._retire(sequence)
            else:
                self._count_guesses(sequence)
            sequence.handle.put(event)
        return batch

    def _count_guesses(self, sequence: RunningSequence) -> None:
        n_guessed, n_right = sequence.drafts.counts()
        if n_guessed:
            self._counters.guessed_tokens += n_guessed
            self._counters.right_guesses += n_right
            sequence.handle.count_guesses(n_guessed, n_right)

    # ---- Ends.

    def _rebuild(self, sequence: RunningSequence, error: NonFiniteError | MismatchError) -> None:
        """Put a sequence back in front of the queue, to process all its tokens again at larger types."""
        assert sequence.cache is not None
        try:
            check_weights(self._context.model)
            specs = raised_specs(sequence.cache.specs, self._context.guard, error)
            planned = self.admission.check(specs, sequence.n_ctx, 0)
        except HybridKVError as final:
            self._fail(sequence, final)
            return
        self._context.notify(f"{error.message}; rebuilding {len(sequence.history)} tokens at {labels_of(specs)}")
        self._counters.n_rebuilds += 1
        self._requeue(sequence, specs, planned)

    def _keep_within(self, sequence: RunningSequence, cache: ModelCache) -> bool:
        """Count the bytes of types that the guard has raised; without room for them, the sequence waits for it."""
        sequence.specs = cache.specs
        try:
            sequence.planned_bytes = self.admission.check(cache.specs, sequence.n_ctx, 0)
        except AdmissionError as error:
            self._fail(sequence, error)
            return False
        budget = self.admission.budget_bytes
        if budget is None or sum(s.planned_bytes for s in self._running) <= budget:
            return True
        self._requeue(sequence, cache.specs, sequence.planned_bytes)
        return False

    def _requeue(self, sequence: RunningSequence, specs: tuple[KVSpec, ...], planned_bytes: int) -> None:
        sequence.start_over(specs, planned_bytes)
        self._intake.put_back(sequence)
        self._leave(sequence)

    def _fail(self, sequence: RunningSequence, error: Exception) -> None:
        """End one sequence with an error; what is not an error of its own ends them all.

        Raises
        ------
        RuntimeError
            The error, if it is a fault of the program.
        """
        if isinstance(error, HybridKVError):
            message = str(error)
        elif is_out_of_memory(error):
            message = f"not enough memory for a sequence of {sequence.n_ctx} tokens"
        else:
            raise error
        sequence.reuses = False  # what its cache holds may be wrong
        self._counters.n_failed += 1
        self._end(sequence, Event(finished="error", message=message))

    def _end(self, sequence: RunningSequence, event: Event) -> None:
        if event.finished == "cancelled":
            self._counters.n_cancelled += 1
        self._retire(sequence)
        sequence.handle.put(event)

    def _retire(self, sequence: RunningSequence) -> None:
        """Take a sequence out, leaving a checkpoint at the end of what it has processed."""
        sequence.undo_guesses()
        if sequence.reuses and sequence.cache is not None and not sequence.prefills:
            self._reuse.leave(sequence)
        sequence.cache = None
        self._count_guesses(sequence)
        self._leave(sequence)
