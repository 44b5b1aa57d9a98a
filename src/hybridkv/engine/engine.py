"""The engine: token ids in, token ids out, and nothing non-finite in between.

Owns the cache of a generation, the token history, and the rebuild: if values stop being finite the cache is built
again from the history at the next types of the ladder, and generation continues without losing a token. Knows no
text; `hybridkv.cli.run` turns tokens into words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.engine.caches import new_cache
from hybridkv.engine.drafts import Drafts
from hybridkv.engine.history import History
from hybridkv.engine.ladder import check_weights, labels_of, raised_specs
from hybridkv.engine.model_context import bad_logits
from hybridkv.engine.sampling import Sampler, SamplingParams, Steering
from hybridkv.engine.speculation import Speculation
from hybridkv.engine.steps import resolve_step
from hybridkv.errors import ContextError, GuardError, UsageError
from hybridkv.hf.ranks import same_everywhere
from hybridkv.model import vocab_size_of
from hybridkv.model.protocols import LanguageModel
from hybridkv.model.ranks import ranks_of
from hybridkv.policy import Guard, MismatchError, NonFiniteError
from hybridkv.runtime import ModelCache, Step, is_finite
from hybridkv.runtime.stored import StoredCache


@dataclass(slots=True)
class Timings:
    """Wall time of a generation, rebuilds counted where they happened.

    Attributes
    ----------
    n_guessed, n_right, n_runs
        Tokens that were guessed, those that were right, and the steps that gave generated tokens.
    """

    n_prompt: int = 0
    prompt_s: float = 0.0
    n_generated: int = 0
    generation_s: float = 0.0
    n_rebuilds: int = 0
    n_guessed: int = 0
    n_right: int = 0
    n_runs: int = 0

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens per second."""
        return self.n_prompt / self.prompt_s if self.prompt_s else 0.0

    @property
    def generation_tok_s(self) -> float:
        """Generated tokens per second, all sequences together."""
        return self.n_generated / self.generation_s if self.generation_s else 0.0


CacheFactory = Callable[[Sequence[KVSpec]], ModelCache]


class Engine:
    """Runs one model over one batch of equally long sequences.

    Parameters
    ----------
    model
        A `NativeModel`, or a Transformers causal language model loaded with `attn_implementation="hybridkv"`.
    specs
        How its KV layers are stored at first.
    n_ctx
        Tokens per sequence.
    guard
        What is watched.
    notify
        Where fallbacks and rebuilds are reported.
    step
        Runs the model over new tokens; the best that runs it by default.
    make_cache
        Builds a cache for specs; `new_cache` by default.
    speculation
        What guesses tokens ahead, where one sequence is generated and the step takes guesses; None for nothing.

    Attributes
    ----------
    asked
        How the KV layers were to be stored, before the guard raised any.
    n_held
        How many of each the cache holds: the last that was drawn is processed with the next.
    kept
        The earlier place that `generate` was asked to keep: how many tokens, and their cache.
    """

    def __init__(
        self,
        model: LanguageModel,
        specs: Sequence[KVSpec],
        *,
        n_ctx: int,
        guard: Guard,
        notify: Callable[[str], None],
        step: Step | None = None,
        make_cache: CacheFactory | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._model = model
        self._guard = guard
        self._notify = notify
        self._n_ctx = n_ctx
        self._make_cache = make_cache or self._default_cache
        self._device = model.device
        self.step = resolve_step(model.config, self._device.type)(model) if step is None else step
        self.asked = tuple(specs)
        self._cache = self._make_cache(specs)
        self._drafts = None if speculation is None else speculation.begin(self.step)
        self._tokens = History(n_ctx)
        self.n_held = self._adopted = 0
        self.kept: tuple[int, StoredCache] | None = None
        self.timings = Timings()

    @property
    def history(self) -> Tensor:
        """Tokens of all sequences up to now, int64 `[B, T]`."""
        return self._tokens.tokens

    @history.setter
    def history(self, tokens: Tensor) -> None:
        """Say which tokens the cache holds, of one sequence, where something else than `prefill` has put them there."""
        self._tokens.begin(tokens[0].tolist())

    @property
    def n_tokens(self) -> int:
        """Tokens of each sequence up to now."""
        return self._tokens.length

    @property
    def cache(self) -> ModelCache:
        """The cache of the sequences, without guesses that were not drawn."""
        if self._drafts is not None:
            self._drafts.close(self._cache, self.n_held, ended=False)
            self._count(self._drafts)
        return self._cache

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        n_predict: int,
        n_seqs: int = 1,
        steering: Steering | None = None,
        keep_at: int = 0,
    ) -> Iterator[tuple[int, ...]]:
        """Process a prompt, then yield one token id per sequence and step, until `n_predict` or a full context.

        Parameters
        ----------
        steering
            Which tokens may come, of one sequence; None for all.
        keep_at
            Tokens of the prompt behind which `kept` is a copy of the cache; 0 for none.

        Raises
        ------
        UsageError
            For an empty prompt, a count of 0, or a bias on a token that the model does not have.
        ContextError
            For a prompt that does not fit.
        GuardError
            If no type of the ladder gives finite values, or the mode forbids a fallback.
        """
        self._check(prompt, n_predict, n_seqs)
        params.check_tokens(vocab_size_of(self._model.config))
        assert steering is None or n_seqs == 1
        sampler = Sampler(params, steering)
        start = time.perf_counter()
        n_held, self._adopted = self._adopted, 0
        logits = self.prefill(prompt, n_held, keep_at)
        self.timings.n_prompt = len(prompt) - n_held
        self.timings.prompt_s = time.perf_counter() - start
        if n_seqs > 1:
            self._cache.batch_repeat_interleave(n_seqs)
            self._tokens.branch(n_seqs)
            logits = logits.repeat(n_seqs, 1)
        room = self._n_ctx - len(prompt)
        n_steps = room if n_predict < 0 else min(n_predict, room)
        looks_ahead = self._drafts is not None and n_seqs == 1
        for step in range(n_steps):
            start = time.perf_counter()
            if step > 0:
                logits = self._look_ahead(n_steps - step) if looks_ahead else self._advance(self.history[:, -1:])
            histories = self.history.numpy() if params.looks_back else ()  # a view
            tokens = same_everywhere(sampler.draw(logits, histories), self._model)
            self._tokens.append(tokens)
            self.timings.n_generated += n_seqs
            self.timings.generation_s += time.perf_counter() - start
            yield tuple(tokens.tolist())

    def read_share(self) -> float:
        """Tell how much of the prompt the KV layers hold, from 0 to 1; for any thread, while the model runs."""
        layers, n_tokens = self._cache.kv_layers, self._tokens.length
        return sum(layer.n_seen for layer in layers) / max(1, n_tokens * len(layers))

    def new_cache(self, specs: Sequence[KVSpec]) -> ModelCache:
        """Build an empty cache of this engine's context."""
        return self._make_cache(specs)

    def adopt(self, cache: ModelCache, n_held: int) -> None:
        """Resume from a cache of one sequence that holds `n_held` tokens; the next prompt must begin with them."""
        self._cache, self.n_held, self._adopted = cache, n_held, n_held

    def prefill(self, prompt: Sequence[int], n_held: int = 0, keep_at: int = 0) -> Tensor:
        """Process a prompt, of which the cache holds the first tokens; the logits after it, `[1, V]`, finite."""
        ends = [len(prompt)]
        if self.step.takes_chunks:
            ends = [keep_at, *ends] if n_held < keep_at < len(prompt) else ends
        elif n_held:  # this model's code continues a state by single tokens only
            ends = list(range(n_held + 1, len(prompt) + 1))
        for begin, end in pairwise([n_held, *ends]):
            self._tokens.begin(prompt[:end])
            logits = self._advance(self.history[:, begin:])
            if end == keep_at:
                self.kept = end, self._cache.stored()
        return logits

    def advance(self, tokens: Tensor) -> Tensor:
        """Append one token per sequence, int64 `[B]`; the logits after them, float32 `[B, V]`, finite."""
        self._tokens.append(tokens)
        return self._advance(tokens.unsqueeze(1))

    def _check(self, prompt: Sequence[int], n_predict: int, n_seqs: int) -> None:
        if not prompt:
            raise UsageError("the prompt is empty", hint="give text with -p or -f")
        if n_predict == 0 or n_predict < -1:
            raise UsageError(f"-n {n_predict}; allowed: 1 or more, or -1 until the context is full", hint="try -n 64")
        if n_seqs < 1:
            raise UsageError(f"-np {n_seqs}; allowed: 1 or more")
        if len(prompt) >= self._n_ctx:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self._n_ctx}, answer included",
                hint=f"try -c {2 * len(prompt)} or a shorter prompt",
            )

    def _default_cache(self, specs: Sequence[KVSpec]) -> ModelCache:
        return new_cache(self._model, specs, n_ctx=self._n_ctx, guard=self._guard, notify=self._notify)

    def _advance(self, tokens: Tensor) -> Tensor:
        """Process the newest tokens of the history, `[B, T]`; the logits after them, finite, `[B, V]`."""
        try:
            return self._forward(tokens)
        except (NonFiniteError, MismatchError) as error:
            if ranks_of(self._model.config) > 1:
                # The others may have seen nothing and wait in the middle of this step: nobody can go back alone.
                raise GuardError(
                    f"{error.message}; a rank cannot rebuild its cache alone",
                    hint="use a larger type, rotation (-khad), or one process",
                ) from error
            return self._rebuild(error)

    def _rebuild(self, error: NonFiniteError | MismatchError) -> Tensor:
        """Climb the ladder: the whole history again at the next types, until its logits are finite."""
        check_weights(self._model)
        while True:
            specs = raised_specs(self._cache.specs, self._guard, error)
            self._notify(f"{error.message}; rebuilding {self._tokens.length} tokens at {labels_of(specs)}")
            self.timings.n_rebuilds += 1
            self._cache = self._make_cache(specs)
            try:
                return self._forward(self.history)
            except (NonFiniteError, MismatchError) as again:
                error = again

    @torch.inference_mode()
    def _forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits after `tokens`, float32 `[B, V]`.

        Raises
        ------
        NonFiniteError
            From the layer where it arose, or for the logits.
        """
        logits = self.step.forward(tokens, self._cache, self._tokens.length - tokens.shape[1])
        self.n_held = self._tokens.length
        if self._drafts is not None:
            self._drafts.read(self._cache, self.n_held)
        if not is_finite(logits):
            raise bad_logits(self._cache, self.n_held)
        return logits

    def _look_ahead(self, n_left: int) -> Tensor:
        """Return the logits `[1, V]` after the history: computed with those before them if they were guessed.

        Parameters
        ----------
        n_left
            Tokens to draw, the next one included.
        """
        drafts, text = self._drafts, self._tokens.text
        assert drafts is not None
        try:
            logits = drafts.take(text[-1]) if drafts.tokens else None
            if logits is None:
                logits = self._run_ahead(drafts, text, n_left - 1)
            if drafts.tokens:
                self.n_held = self._tokens.length
                if not is_finite(logits):
                    raise bad_logits(self._cache, self.n_held)
        except (NonFiniteError, MismatchError) as error:
            drafts.drop()
            return self._rebuild(error)
        return logits

    def _run_ahead(self, drafts: Drafts, text: Sequence[int], n_most: int) -> Tensor:
        """Run the history's last token, and guesses behind it; return the logits after that token, `[1, V]`.

        Of a token without a guess, all that is done beside running it counts: it is most of what guessing costs there.
        """
        assert drafts.pace is not None
        costs, undoing = drafts.pace.costs, 0.0
        if drafts.tokens:
            start = time.perf_counter()
            drafts.close(self._cache, len(text) - 1, ended=True)
            self._count(drafts)
            undoing = time.perf_counter() - start
        self.timings.n_runs += 1
        tokens = drafts.propose(text, self._cache, n_most)  # whoever makes guesses counts what they cost
        if len(tokens) == 1 and not (costs.is_due(1) and drafts.is_ordinary(self._cache)):
            return self._forward(self.history[:, -1:])
        start = time.perf_counter()
        if len(tokens) == 1:
            logits = self._forward(self.history[:, -1:])
        else:
            assert drafts.step is not None
            with torch.inference_mode():
                answers = drafts.step.forward_drafts([tokens], [self._cache], [len(text) - 1])
            drafts.open(tokens, answers, 0)
            first = drafts.take(text[-1])
            assert first is not None
            logits = first
        costs.note(len(tokens), undoing + time.perf_counter() - start)
        return logits

    def _count(self, drafts: Drafts) -> None:
        """Take over what was guessed up to now."""
        if drafts.pace is not None:
            self.timings.n_guessed, self.timings.n_right = drafts.pace.n_guessed, drafts.pace.n_right
