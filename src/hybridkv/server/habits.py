"""The words of other servers' clients, in those of our schema: renamed, or left out and said so.

One table for names that mean something here, one for values that mean something else elsewhere. What has no meaning
here is left out, and the reply's header `x-hybridkv-ignored` lists it. With `--strict` none of this happens.
Knows no HTTP; `hybridkv.server.relax` applies it to requests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, get_args

from hybridkv.server.sampler_fields import MIN_TEMPERATURE
from hybridkv.server.schema import MAX_STOP_CHARACTERS, ChatRequest, CompletionRequest, ReasoningFormat
from hybridkv.server.turns import relax_messages, relax_tools

Body = dict[str, Any]

RENAMED = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "typ_p": "typical_p",
    "top_nsigma": "top_n_sigma",
    "nsigma": "top_n_sigma",
    "dry_last_n": "dry_penalty_last_n",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "thinking_budget": "reasoning_budget",
    "thinking_budget_tokens": "reasoning_budget",
}
"""Other servers' names for our fields; ours wins where both are given."""

_INERT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "store")
"""OpenAI's fields with which nothing is done."""

_NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "presence_penalty", "frequency_penalty"),
    *("repeat_penalty", "repeat_last_n", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    *("xtc_probability", "xtc_threshold", "max_tokens", "max_completion_tokens", "seed", "n", "reasoning_budget"),
)
_GREEDY_TOP_P = 1e-9


class Relaxed:
    """A body in our words.

    Parameters
    ----------
    body
        As it came; not changed.
    chat
        Whether it is a conversation.
    model
        The served model's name.

    Attributes
    ----------
    body
        In our words.
    ignored
        What was left out, each once, in the order of the body.
    """

    def __init__(self, body: Body, *, chat: bool, model: str) -> None:
        self.ignored: dict[str, None] = {}
        self._chat, self._model = chat, model
        # Null is what an absent field is, everywhere.
        self.body: Body = {name: value for name, value in body.items() if value is not None}
        for work in (self._rename, self._formats, self._numbers, self._values, self._together):
            work()
        if chat:
            self._conversation()
        known = (ChatRequest if chat else CompletionRequest).model_fields
        for name in [name for name in self.body if name not in known]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if self.body.pop(name, None) not in (None, [], {}, ""):
            self.ignored[name] = None

    def _rename(self) -> None:
        for theirs, ours in RENAMED.items():
            if theirs in self.body and self.body.get(ours) in (None, self.body[theirs]):
                self.body[ours] = self.body.pop(theirs)
        for name in _INERT:
            self._drop(name)
        if self.body.pop("model", None) not in (None, "", self._model):
            self.ignored["model"] = None

    def _formats(self) -> None:
        """Bring the ways of vLLM and SGLang to ask for a form into ours."""
        asked = self.body.pop("structured_outputs", None)
        if isinstance(asked, dict):
            names = {"json": "json_schema"}
            self.body |= {names.get(str(name), str(name)): held for name, held in asked.items() if held}
        for name in ("guided_choice", "choice"):
            words = self.body.get(name)
            if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
                self.body["regex"] = "|".join(re.escape(word) for word in self.body.pop(name))
        form = self.body.get("response_format")
        if isinstance(form, dict) and isinstance(form.get("json_schema"), dict):
            named = {k: v for k, v in form["json_schema"].items() if k in ("name", "schema", "description", "strict")}
            self.body["response_format"] = {**form, "json_schema": {k: v for k, v in named.items() if v is not None}}
        if isinstance(form, dict) and form.get("type") == "text":
            del self.body["response_format"]
        if self.body.get("grammar") == "" or self.body.get("json_schema") in ({}, ""):
            self.body = {k: v for k, v in self.body.items() if k not in ("grammar", "json_schema") or v}

    def _numbers(self) -> None:
        """Convert numbers in strings, and names of what no number is."""
        for name in _NUMBERS:
            value = self.body.get(name)
            if isinstance(value, str):
                if not value.strip():
                    del self.body[name]
                elif re.fullmatch(r"\s*-?[0-9]+(\.[0-9]+)?\s*", value):
                    self.body[name] = float(value) if "." in value else int(value)

    def _values(self) -> None:
        for name, change in _VALUES.items():
            if name in self.body:
                value = change(self.body[name])
                if value is None:
                    del self.body[name]
                else:
                    self.body[name] = value
        for name in ("max_tokens", "max_completion_tokens"):
            if name not in self.body:
                continue
            if _is_number(self.body[name]) and self.body[name] < 0:
                self.body["until_full"] = True
                del self.body[name]
            elif self._chat and self.body[name] == 0 and _is_number(self.body[name]):
                del self.body[name]  # a chat of no tokens says nothing: 0 is "no limit" there

    def _together(self) -> None:
        if not self.body.get("stream"):
            self._drop("stream_options")
        elif isinstance(options := self.body.get("stream_options"), dict):
            self.body["stream_options"] = {k: v for k, v in options.items() if k == "include_usage"}
        if "max_completion_tokens" in self.body:
            self._drop("max_tokens")
        if not self._chat:
            if isinstance(self.body.get("logprobs"), bool):
                self.body |= {"logprobs": 1} if self.body.pop("logprobs") else {}
            if self.body.get("best_of") not in (None, self.body.get("n", 1)):
                self._drop("best_of")
            return
        if _is_number(count := self.body.get("logprobs")):
            self.body["logprobs"] = True
            self.body.setdefault("top_logprobs", count)
        if not self.body.get("logprobs") and self.body.pop("top_logprobs", 0) != 0:
            self.ignored["top_logprobs"] = None

    def _conversation(self) -> None:
        """Translate thinking in others' words, messages and tools."""
        variables = self.body.get("chat_template_kwargs")
        variables = dict(variables) if isinstance(variables, dict) else {}
        for name in ("enable_thinking", "think"):
            if isinstance(self.body.get(name), bool):
                variables.setdefault("enable_thinking", self.body.pop(name))
        for name in ("thinking", "reasoning"):
            asked = self.body.get(name)
            if not isinstance(asked, dict):
                continue
            del self.body[name]
            if asked.get("type") in ("enabled", "disabled"):
                variables.setdefault("enable_thinking", asked["type"] == "enabled")
            if isinstance(asked.get("enabled"), bool):
                variables.setdefault("enable_thinking", asked["enabled"])
            for theirs, ours in (
                ("effort", "reasoning_effort"),
                ("budget_tokens", "reasoning_budget"),
                ("max_tokens", "reasoning_budget"),
            ):
                if asked.get(theirs) is not None:
                    self.body.setdefault(ours, asked[theirs])
        if variables:
            self.body["chat_template_kwargs"] = variables
        if self.body.get("reasoning_format") not in (None, *get_args(ReasoningFormat)):
            self._drop("reasoning_format")
        for found in (relax_tools(self.body), relax_messages(self.body)):
            self.ignored |= dict.fromkeys(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _temperature(value: Any) -> Any:
    return 0 if _is_number(value) and value < MIN_TEMPERATURE and not math.isnan(value) else value


def _top_k(value: Any) -> Any:
    return None if _is_number(value) and value <= 0 else value


def _top_p(value: Any) -> Any:
    return _GREEDY_TOP_P if _is_number(value) and value == 0 else value


def _seed(value: Any) -> Any:
    return None if _is_number(value) and value == -1 else value


def _stop(value: Any) -> Any:
    if isinstance(value, list):
        return [item for item in value if item not in ("", None)] or None
    return value if value != "" else None


def _logit_bias(value: Any) -> Any:
    """Convert to an object llama.cpp's list of pairs, and its `false` for a token that may not come."""
    if isinstance(value, list):
        pairs = [item for item in value if isinstance(item, list) and len(item) == 2]
        value = {str(token): bias for token, bias in pairs} if len(pairs) == len(value) else value
    if isinstance(value, dict):
        return {token: -1e9 if bias is False else bias for token, bias in value.items()} or None
    return value


def _text(value: Any) -> Any:
    return value if value != "" else None


def _words(value: Any) -> Any:
    return [value] if isinstance(value, str) and len(value) <= MAX_STOP_CHARACTERS else value


_VALUES: dict[str, Callable[[Any], Any]] = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "seed": _seed,
    "stop": _stop,
    "logit_bias": _logit_bias,
    "suffix": _text,
    "regex": _text,
    "session": _text,
    "dry_sequence_breakers": _words,
}
"""What a value means elsewhere, in ours; None for nothing."""
