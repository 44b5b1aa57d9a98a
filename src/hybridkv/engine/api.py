"""`hybridkv.load`: three lines from import to text.

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

from hybridkv.cache import KVTypes
from hybridkv.engine.describe import bundled_model, describe
from hybridkv.engine.engine import Engine
from hybridkv.engine.load import load as load_described
from hybridkv.engine.sampling import SamplingParams
from hybridkv.engine.steps import resolve_step
from hybridkv.engine.weights import engine_for, weights_on
from hybridkv.errors import UsageError
from hybridkv.model import is_hybrid, kv_facts
from hybridkv.policy import Guard, Policy, parse_mode
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
) -> TextModel:
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

    Raises
    ------
    UsageError, ModelFileError, ModelError, NoKernelError
        For what is wrong, before weights are read where it can be known.
    """
    description = describe(_found(model), remote_code="trusted" if trust_remote_code else "refused")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    watch = Guard(mode=parse_mode(guard))
    asked = Policy(KVTypes(type_k, type_v)).resolve(kv_facts(description.facts))
    trained = description.n_ctx_train
    size = n_ctx or (_DEFAULT_CTX if trained is None else min(_DEFAULT_CTX, trained))
    specs, said = watch.before(asked, hybrid=is_hybrid(description.facts), n_ctx=size)
    device_type = place.partition(":")[0]
    engine = engine_for(device_type, "auto", "auto")
    weights, dtype = weights_on(place, "auto", engine, description)
    loaded = load_described(description, dtype=dtype, device=place, weights=weights, engine=engine)
    for line in (*said, *loaded.notices):
        warnings.warn(line, stacklevel=2)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer, and text needs one", hint="hybridkv.engine takes token ids")
    step = resolve_step(description.config, device_type, engine)(loaded.model)
    return TextModel(loaded.model, loaded.tokenizer, loaded.end_ids, specs, step, watch, size)


def _found(model: str | Path | None) -> Path:
    """The file or directory of a model; a hub is asked for names that are no paths."""
    if model is None:
        return bundled_model()
    path = Path(model).expanduser()
    if isinstance(model, Path) or path.exists() or "/" not in model or path.suffix == ".gguf" or path.is_absolute():
        return path
    from hybridkv.engine.hub import fetch_model, parse_model

    return fetch_model(parse_model(model))


class TextModel:
    """A loaded model that takes and gives text. One call at a time.

    Attributes
    ----------
    model, tokenizer
        Themselves.
    n_ctx
        Tokens in the context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end_ids: Sequence[int],
        specs: Any,
        step: Any,
        guard: Guard,
        n_ctx: int,
    ) -> None:
        self.model, self.tokenizer, self.n_ctx = model, tokenizer, n_ctx
        self._ends = frozenset(end_ids)
        self._specs, self._step, self._guard = specs, step, guard
        self._words = ControlWords(tokenizer)
        self._breakers: frozenset[int] | None = None

    def generate(self, prompt: str, *, n_predict: int = 64, **sampling: Any) -> str:
        """Go on from a text.

        Parameters
        ----------
        n_predict
            Most tokens; -1 until the context is full.
        sampling
            Fields of `hybridkv.engine.SamplingParams`: `temp`, `top_k`, `top_p`, `min_p`, `seed`, ... DRY's breakers
            are llama.cpp's four unless `dry_breakers` names others.

        Raises
        ------
        UsageError, ContextError, GuardError
            As the engine does.
        """
        return "".join(self.stream(prompt, n_predict=n_predict, **sampling))

    def stream(self, prompt: str, *, n_predict: int = 64, **sampling: Any) -> Iterator[str]:
        """Go on from a text, piece by piece."""
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

    def _stream(self, ids: Sequence[int], n_predict: int, params: SamplingParams) -> Iterator[str]:
        engine = Engine(self.model, self._specs, n_ctx=self.n_ctx, guard=self._guard, notify=_warn, step=self._step)
        text = TextStream(self.tokenizer, ids)
        for (token,) in engine.generate(ids, params, n_predict=n_predict):
            if token in self._ends:
                break
            yield text.push(token)
        yield text.close()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
