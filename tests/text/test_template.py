"""Templates rendered without Transformers, character for character as `apply_chat_template` renders them."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hybridkv.text.template import render
from hybridkv.text.tokenizer import TextTokenizer
from tests import chat_models

SHIPPED = {name: value for name, value in vars(chat_models).items() if name.isupper() and isinstance(value, str)}
LOOPS = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n  {{ m.content }}\n{% endfor %}"
GENERATION = "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
HELPERS = (
    "{% set ns = namespace(self=1, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.role }} "
    "{{ m | tojson(indent=2, sort_keys=true) }}{{ dict(a=m.content).a }}{{ dict.fromkeys([1], 2) }}{% endfor %}"
    "{{ strftime_now('%%') }}{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
)
THOUGHTS = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content is defined }};{% endfor %}"
CLASSES = "[{{ ''.__class__ }}{{ dict.__class__ }}{{ namespace().__class__ }}]"
TEMPLATES = SHIPPED | {
    "loops": LOOPS,
    "generation": GENERATION,
    "helpers": HELPERS,
    "thoughts": THOUGHTS,
    "classes": CLASSES,
}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": 'Hello <|im_end|> & "world" é\n'}],
    "turns": [
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ],
    "absent": [{"role": "assistant", "content": None, "reasoning": "why", "parts": [1, 2.5, (True, None)]}],
    "objects": [{"role": "user", "content": "x", "image": object(), "nested": {"a": {"b": "c"}}}],
}

BAD = {
    "an underscore": "{% set ns = namespace(_x=1) %}",
    "an underscore, set": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "a change": "{{ messages.append(1) }}",
    "an exception": "{{ raise_exception('no') }}",
    "no Jinja": "{% for %}",
    "a division": "{{ 1 / 0 }}",
    "a wide range": "{{ range(1000000) | length }}",
    "an unknown name": "{{ nothing.content }}",
}


def transformers_tokenizer(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=template, bos_token="<s>")


def own_tokenizer(template: str) -> TextTokenizer:
    return TextTokenizer(backend(), {"bos_token": "<s>"}, template)


def backend() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))


def outcome(tokenizer: Any, messages: list[dict[str, Any]]) -> str | type[BaseException]:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, OverflowError) as error:
        return type(error)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_as_transformers(template: str, chat: str) -> None:
    wanted = outcome(transformers_tokenizer(TEMPLATES[template]), CHATS[chat])
    assert outcome(own_tokenizer(TEMPLATES[template]), CHATS[chat]) == wanted


@pytest.mark.parametrize("template", BAD)
def test_refused_as_by_transformers(template: str) -> None:
    wanted = outcome(transformers_tokenizer(BAD[template]), CHATS["one"])
    assert isinstance(wanted, type)
    assert outcome(own_tokenizer(BAD[template]), CHATS["one"]) is wanted


def test_what_the_sandbox_forbids_is_a_security_error() -> None:
    with pytest.raises(SecurityError):
        render("{% set ns = namespace(_x=1) %}", [])


def test_a_conversation_needs_a_message() -> None:
    with pytest.raises(ValueError, match="at least one"):
        own_tokenizer("{{ 1 }}").apply_chat_template([])
