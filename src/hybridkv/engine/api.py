"""The names behind `import hybridkv`: a model from its path to text, and the memory that it will take.

>>> import hybridkv                                            # doctest: +SKIP
>>> model = hybridkv.load("model.gguf", type_k="q8_0", type_v="q8_0")  # doctest: +SKIP
>>> print(model.generate("Hello world", n_predict=64))         # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hybridkv.cache import KVSpec, KVTypes
from hybridkv.engine.classify import Classifier
from hybridkv.engine.describe import Description, bundled_model, describe
from hybridkv.engine.engine import Engine
from hybridkv.engine.load import load as load_described
from hybridkv.engine.placed import Split, hosted_names, place_on_card
from hybridkv.engine.sampling import SamplingParams
from hybridkv.engine.steps import resolve_step
from hybridkv.engine.weights import weights_on
from hybridkv.errors import UsageError
from hybridkv.held import WeightKind
from hybridkv.model import LanguageModel, is_hybrid, kv_facts
from hybridkv.planner import Plan, parse_bytes
from hybridkv.planner import plan as count
from hybridkv.policy import Guard, Policy, parse_mode
from hybridkv.runtime import Step
from hybridkv.text.breakers import breaker_ids
from hybridkv.text.chat import chat_prompt
from hybridkv.text.control_words import ControlWords
from hybridkv.text.detokenize import TextStream

_DEFAULT_CTX = 4096


def load(
    model: str | Path | None = None,
    *,
    n_ctx: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    device: str = "auto",
    guard: str = "check",
    trust_remote_code: bool = False,
    n_gpu_layers: int | str | None = None,
    override_tensor: str | Sequence[str] = (),
    cpu_moe: bool = False,
    n_cpu_moe: int | None = None,
    device_memory: int | str | None = None,
) -> Model:
    """Load a model and its tokenizer.

    Parameters
    ----------
    model
        A GGUF file, a model directory, or `owner/name[:quant]` on Hugging Face's hub; None for the bundled model.
    n_ctx
        Tokens in the context; None for 4096, or the trained length if that is less.
    type_k, type_v
        Types of the KV cache.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    guard
        `check`, `upgrade`, `warn`, `strict` or `off`.
    trust_remote_code
        Whether Python code in a model's directory may run.
    n_gpu_layers, override_tensor, cpu_moe, n_cpu_moe
        What lies in main memory beside a CUDA device, as llama.cpp's options say it; by default what does not fit.
    device_memory
        Limit of a CUDA device's memory: bytes, or a size such as `8GiB`; None for what is free.

    Raises
    ------
    UsageError, ModelFileError, ModelError, NoKernelError, ContextError
        For what is wrong, before weights are read where it can be known.
    """
    cap = device_memory if device_memory is None or isinstance(device_memory, int) else parse_bytes(device_memory)
    patterns = (override_tensor,) if isinstance(override_tensor, str) else tuple(override_tensor)
    layers = None if n_gpu_layers is None else str(n_gpu_layers)
    split = Split(layers, patterns, cpu_moe, n_cpu_moe, cap)
    split.check()
    description, place, weights, dtype = _settled(model, device, trust_remote_code=trust_remote_code)
    size = n_ctx or _default_ctx(description)
    watch = Guard(mode=parse_mode(guard))
    asked = Policy(KVTypes(type_k, type_v)).resolve(kv_facts(description.facts))
    specs, messages = watch.before(asked, hybrid=is_hybrid(description.facts), n_ctx=size)
    hosted = _hosted(description, specs, split, place, size)
    loaded = load_described(description, dtype=dtype, device=place, weights=weights, hosted=hosted)
    for line in (*messages, *loaded.notices):
        warnings.warn(line, stacklevel=2)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer, and text needs one", hint="hybridkv.Engine takes token ids")
    step = resolve_step(description.config, place.partition(":")[0])(loaded.model)
    return Model(loaded.model, loaded.tokenizer, loaded.end_ids, specs, step, watch, size)


def _hosted(description: Description, specs: Sequence[KVSpec], split: Split, device: str, n_ctx: int) -> frozenset[str]:
    """Choose what stays in main memory beside a card.

    Raises
    ------
    UsageError
        If something is asked for that has no effect.
    """
    kind = device.partition(":")[0]
    reason = description.rejects_packed(kind, "auto", "auto")
    if reason is None:
        return hosted_names(place_on_card(description, specs, split, device, n_ctx=n_ctx))
    if split != Split():
        raise UsageError(f"a model that is divided: {reason}; allowed: GGUF files whose weights stay packed on cuda")
    return frozenset()


def plan(
    model: str | Path | None = None,
    *,
    n_ctx: int | None = None,
    n_seqs: int = 1,
    type_k: str = "f16",
    type_v: str = "f16",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Plan:
    """Count the bytes that a model will hold, from its header or config alone.

    Parameters
    ----------
    n_seqs
        Sequences of `n_ctx` tokens.
    model, n_ctx, type_k, type_v, device, trust_remote_code
        As `load` takes them.

    Raises
    ------
    UsageError, ModelFileError, ModelError
        For what is wrong.
    """
    description, place, weights, dtype = _settled(model, device, trust_remote_code=trust_remote_code)
    wide = dtype == torch.float32
    held = description.held(weights, place.partition(":")[0], "f32" if wide else "bf16")
    return count(
        Policy(KVTypes(type_k, type_v)).resolve(kv_facts(description.facts)),
        description.facts,
        n_ctx=n_ctx or _default_ctx(description),
        n_seqs=n_seqs,
        conv_itemsize=4 if wide else 2,
        weight_bytes=held.n_bytes,
    )


def _settled(
    model: str | Path | None, device: str, *, trust_remote_code: bool
) -> tuple[Description, str, WeightKind, torch.dtype]:
    """Find a model, its device, and how its weights are held there, before any is read."""
    description = describe(_found(model), remote_code="trusted" if trust_remote_code else "refused")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return description, place, *weights_on(place, "auto", "auto", description)


def _default_ctx(description: Description) -> int:
    trained = description.n_ctx_train
    return _DEFAULT_CTX if trained is None else min(_DEFAULT_CTX, trained)


def _found(model: str | Path | None) -> Path:
    """Find the file or directory of a model; a hub is asked for names that are no paths."""
    if model is None:
        return bundled_model()
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.exists() or "/" not in model or path.suffix == ".gguf" or path.is_absolute():
        return path
    from hybridkv.engine.hub import fetch_model, parse_model

    return fetch_model(parse_model(model))


class Model:
    """A loaded model that takes and gives text. One call at a time.

    Attributes
    ----------
    model, tokenizer, specs, step, guard
        What `hybridkv.Engine` and `hybridkv.Scheduler` take: the weights, how KV layers are stored, what runs the
        layers, what is watched.
    n_ctx
        Tokens in the context.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        end_ids: Sequence[int],
        specs: Sequence[KVSpec],
        step: Step,
        guard: Guard,
        n_ctx: int,
    ) -> None:
        self.model, self.tokenizer, self.n_ctx = model, tokenizer, n_ctx
        self.specs, self.step, self.guard = tuple(specs), step, guard
        self._ends = frozenset(end_ids)
        self._words = ControlWords(tokenizer)
        self._breakers: frozenset[int] | None = None

    def generate(self, prompt: str, *, n_predict: int = 64, **sampling: Any) -> str:
        """Continue a text.

        Parameters
        ----------
        n_predict
            Most tokens; -1 until the context is full.
        sampling
            Fields of `hybridkv.SamplingParams`: `temp`, `top_k`, `top_p`, `min_p`, `seed`, ... DRY's breakers are
            llama.cpp's four unless `dry_breakers` names others.

        Raises
        ------
        UsageError, ContextError, GuardError
            As the engine does.
        """
        return "".join(self.stream(prompt, n_predict=n_predict, **sampling))

    def stream(self, prompt: str, *, n_predict: int = 64, **sampling: Any) -> Iterator[str]:
        """Continue a text, and yield it as it comes."""
        return self._stream(self._words.encode(prompt), n_predict, self._params(sampling))

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        n_predict: int = -1,
        variables: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> str:
        """Answer a conversation in the model's chat template; a string is one message of the user's.

        Parameters
        ----------
        n_predict, sampling
            As `generate` takes them.
        variables
            Of the template, such as `enable_thinking`.

        Raises
        ------
        UsageError
            For a model without a chat template.
        """
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = chat_prompt(self._words, asked, variables).ids()
        return "".join(self._stream(ids, n_predict, self._params(sampling)))

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        params = SamplingParams(**sampling)
        if not params.dry_multiplier or "dry_breakers" in sampling:
            return params
        if self._breakers is None:
            self._breakers = breaker_ids(self.tokenizer)
        return replace(params, dry_breakers=self._breakers)

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the log probability of each continuation of a prompt, all its tokens together.

        Raises
        ------
        UsageError
            For a continuation without tokens, with the tokens of another, or that merges with the prompt's last token.
        ContextError, GuardError
            As the engine does.
        """
        ids = [self._behind(prompt, text) for text in continuations]
        classifier = Classifier(
            self.model, self.specs, ids, n_ctx=self.n_ctx, guard=self.guard, notify=_warn, step=self.step
        )
        scores: list[float] = classifier.score([self._words.encode(prompt)])[0].tolist()
        return scores

    def _behind(self, prompt: str, text: str) -> list[int]:
        """Find the tokens of a continuation, as they follow the prompt's."""
        before, whole = (self._words.encode(each, begins=False) for each in (prompt, prompt + text))
        if whole[: len(before)] != before:
            raise UsageError(
                f"{text!r} merges with the end of the prompt, {prompt[-10:]!r}",
                hint="end the prompt with a word and begin the continuation with a space",
            )
        return whole[len(before) :]

    def _stream(self, ids: Sequence[int], n_predict: int, params: SamplingParams) -> Iterator[str]:
        engine = Engine(self.model, self.specs, n_ctx=self.n_ctx, guard=self.guard, notify=_warn, step=self.step)
        text = TextStream(self.tokenizer, ids)
        for (token,) in engine.generate(ids, params, n_predict=n_predict):
            if token in self._ends:
                break
            yield text.push(token)
        yield text.close()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
