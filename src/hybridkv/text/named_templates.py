"""Chat templates by the names that llama.cpp has for them, each a record of what stands around a message.

Source: llama.cpp, src/llama-chat.cpp, whose output `tests/text/test_named_templates.py` holds them to.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_ALL = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True, slots=True)
class Named:
    """The form of a conversation; `{}` is what a message says, `{role}` its role.

    Attributes
    ----------
    system, user, assistant
        Messages of these roles.
    opens
        Where the answer begins.
    trims
        Roles whose text loses white space at its ends.
    merges
        Whether the system message stands inside of the user message after it, before its text.
    other
        Messages of any other role, such as a tool's; None where there is no way to write them.
    """

    system: str
    user: str
    assistant: str
    opens: str
    trims: Collection[str] = ()
    merges: bool = False
    other: str | None = None


def _roles(form: str, opens: str, *, trims: Collection[str] = ()) -> Named:
    """Write all roles alike."""
    system, user, assistant = (form.replace("{role}", role) for role in ("system", "user", "assistant"))
    return Named(system, user, assistant, opens, trims, other=form)


def _mistral(user: str, assistant: str, *, system: str = "{}\n\n", trims: Collection[str] = ()) -> Named:
    return Named(system, user, assistant, "", trims, merges=True)


_GRANITE = _roles(
    "<|start_of_role|>{role}<|end_of_role|>{}<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>"
)
_EXAONE = Named("[|system|]{}[|endofturn|]\n", "[|user|]{}\n", "[|assistant|]{}[|endofturn|]\n", "[|assistant|]", _ALL)
_BAILING = ("<role>SYSTEM</role>{}", "<role>HUMAN</role>{}", "<role>ASSISTANT</role>{}")

TEMPLATES: Mapping[str, Named] = MappingProxyType(
    {
        "bailing": Named(*_BAILING, "<role>ASSISTANT</role>"),
        "bailing-think": Named(*_BAILING, "<role>ASSISTANT</role><think>"),
        "chatml": _roles("<|im_start|>{role}\n{}<|im_end|>\n", "<|im_start|>assistant\n"),
        "command-r": Named(
            "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            _ALL,
        ),
        "deepseek": Named("{}", "### Instruction:\n{}\n", "### Response:\n{}\n<|EOT|>\n", "### Response:\n"),
        "deepseek2": Named("{}\n\n", "User: {}\n\n", "Assistant: {}<｜end▁of▁sentence｜>", "Assistant:"),
        "deepseek3": Named("{}\n\n", "<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", "<｜Assistant｜>"),
        "exaone-moe": _roles("<|{role}|>\n{}<|endofturn|>\n", "<|assistant|>\n", trims=_ALL),
        "exaone3": _EXAONE,
        "exaone4": _EXAONE,
        "falcon3": _roles("<|{role}|>\n{}\n", "<|assistant|>\n"),
        "gemma": Named(
            "{}\n\n",
            "<start_of_turn>user\n{}<end_of_turn>\n",
            "<start_of_turn>model\n{}<end_of_turn>\n",
            "<start_of_turn>model\n",
            _ALL,
            merges=True,
        ),
        "glmedge": _roles("<|{role}|>\n{}", "<|assistant|>"),
        "gpt-oss": Named(
            "<|start|>system<|message|>{}<|end|>",
            "<|start|>user<|message|>{}<|end|>",
            "<|start|>assistant<|message|>{}<|return|>",
            "<|start|>assistant",
        ),
        "granite": _GRANITE,
        "granite-4.0": _GRANITE,
        "granite-4.1": _GRANITE,
        "grok-2": Named(
            "System: {}<|separator|>\n\n",
            "Human: {}<|separator|>\n\n",
            "Assistant: {}<|separator|>\n\n",
            "Assistant:",
            ("system", "user"),
        ),
        "kimi-k2": _roles("<|im_{role}|>{role}<|im_middle|>{}<|im_end|>", "<|im_assistant|>assistant<|im_middle|>"),
        "llama2": Named("{}\n", "[INST] {} [/INST]", "{}</s>", "", merges=True),
        "llama2-sys": Named("<<SYS>>\n{}\n<</SYS>>\n\n", "[INST] {} [/INST]", "{}</s>", "", merges=True),
        "llama2-sys-strip": Named("<<SYS>>\n{}\n<</SYS>>\n\n", "[INST] {} [/INST]", "{}</s>", "", _ALL, merges=True),
        "llama3": _roles(
            "<|start_header_id|>{role}<|end_header_id|>\n\n{}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            trims=_ALL,
        ),
        "llama4": _roles(
            "<|header_start|>{role}<|header_end|>\n\n{}<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            trims=_ALL,
        ),
        "megrez": _roles("<|role_start|>{role}<|role_end|>{}<|turn_end|>", "<|role_start|>assistant<|role_end|>"),
        "minicpm": Named("{}", "<用户>{}<AI>", "{}", "", _ALL),
        "mistral-v1": _mistral(" [INST] {} [/INST]", " {}</s>"),
        "mistral-v3": _mistral("[INST] {}[/INST]", " {}</s>", trims=("assistant",)),
        "mistral-v3-tekken": _mistral("[INST]{}[/INST]", "{}</s>"),
        "mistral-v7": Named("[SYSTEM_PROMPT] {}[/SYSTEM_PROMPT]", "[INST] {}[/INST]", " {}</s>", ""),
        "mistral-v7-tekken": Named("[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "[INST]{}[/INST]", "{}</s>", ""),
        "openchat": Named(
            "{}<|end_of_turn|>",
            "GPT4 Correct User: {}<|end_of_turn|>",
            "GPT4 Correct Assistant: {}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
        ),
        "orion": Named("{}\n\n", "Human: {}\n\nAssistant: </s>", "{}</s>", "", merges=True),
        "phi3": _roles("<|{role}|>\n{}<|end|>\n", "<|assistant|>\n"),
        "phi4": _roles("<|im_start|>{role}<|im_sep|>{}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        "seed_oss": _roles("<seed:bos>{role}\n{}<seed:eos>", "<seed:bos>assistant\n", trims=("assistant",)),
        "solar-open": _roles("<|begin|>{role}<|content|>{}<|end|>", "<|begin|>assistant"),
        "vicuna": Named("{}\n\n", "USER: {}\n", "ASSISTANT: {}</s>\n", "ASSISTANT:"),
        "vicuna-orca": Named("SYSTEM: {}\n", "USER: {}\n", "ASSISTANT: {}</s>\n", "ASSISTANT:"),
        "zephyr": _roles("<|{role}|>\n{}<|endoftext|>\n", "<|assistant|>\n"),
    }
)
"""Left out: those of llama.cpp's whose messages depend on each other."""


def named_template(name: str, begins: str = "") -> str:
    """Write a template in Jinja.

    Parameters
    ----------
    begins
        What the vocabulary puts before a text: llama.cpp leaves it to the tokenizer.
    """
    named = TEMPLATES[name]
    lines = [_text(begins), "{% set ns = namespace(first='') %}", "{% for m in messages %}"]
    for number, role in enumerate(("system", "user", "assistant")):
        lines.append(f"{{% {'elif' if number else 'if'} m.role == {role!r} %}}")
        content = f"m.content{' | trim' if role in named.trims else ''}"
        before, _, after = getattr(named, role).partition("{}")
        if named.merges and role == "system":
            lines.append(f"{{% set ns.first = {_quoted(before)} + ({content}) + {_quoted(after)} %}}")
        elif named.merges and role == "user":
            lines.append(f"{_text(before)}{{{{ ns.first }}}}{{{{ {content} }}}}{_text(after)}{{% set ns.first = '' %}}")
        else:
            lines.append(f"{_text(before)}{{{{ {content} }}}}{_text(after)}")
    lines.append("{% else %}")
    if named.other is None:
        lines.append(f"{{{{ raise_exception({_quoted(f'{name} has no messages of role ')} + m.role) }}}}")
    else:
        before, _, after = named.other.partition("{}")
        lines.append(f"{'{{ m.role }}'.join(map(_text, before.split('{role}')))}{{{{ m.content }}}}{_text(after)}")
    lines += ["{% endif %}", "{% endfor %}", "{% if add_generation_prompt %}", _text(named.opens), "{% endif %}"]
    return "".join(lines)


def _text(text: str) -> str:
    """Write literal text as an expression: Jinja cuts line ends of plain text."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
