"""Chat templates by name write what llama.cpp writes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
from jinja2 import TemplateError

from hybridkv.errors import ModelFileError
from hybridkv.text.chat import chat_text
from hybridkv.text.named_templates import TEMPLATES, named_template
from tests.chat_models import CHATML, byte_level

TURNS = [("system", " Be short. "), ("user", " Hi "), ("assistant", " Hello. "), ("user", "Bye\n")]
CASES = [TURNS, TURNS[1:], TURNS[1:2], [TURNS[0], TURNS[3]], [*TURNS[:2], ("assistant", "{{ x }}"), TURNS[3]]]

ORACLE = """
import ctypes, json, sys
import llama_cpp as lib
n = lib.llama_chat_builtin_templates(None, 0)
names = (ctypes.c_char_p * n)()
lib.llama_chat_builtin_templates(names, n)
def apply(name, turns):
    chat = [lib.llama_chat_message(role=role.encode(), content=text.encode()) for role, text in turns]
    buffer = ctypes.create_string_buffer(65536)
    messages = (lib.llama_chat_message * len(chat))(*chat)
    size = lib.llama_chat_apply_template(name.encode(), messages, len(chat), True, buffer, 65536)
    return buffer.raw[:size].decode()
asked, cases = json.loads(sys.argv[1])
print(json.dumps([[name.decode() for name in names], [[apply(name, case) for case in cases] for name in asked]]))
"""


@pytest.fixture(scope="module")
def theirs() -> tuple[list[str], dict[str, list[str]]]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    asked = json.dumps([list(TEMPLATES), CASES])
    done = subprocess.run([sys.executable, "-c", ORACLE, asked], capture_output=True, text=True, check=True)
    names, texts = json.loads(done.stdout.splitlines()[-1])
    return names, dict(zip(TEMPLATES, texts, strict=True))


def render(name: str, turns: Any, begins: str = "") -> str:
    tokenizer = byte_level(named_template(name, begins))
    return chat_text(tokenizer, [{"role": role, "content": text} for role, text in turns], {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_in_llama_cpp(name: str, theirs: tuple[list[str], dict[str, list[str]]]) -> None:
    assert [render(name, case) for case in CASES] == theirs[1][name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"),
        ("gemma", "<start_of_turn>user\nBe.\n\nHi<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral-v3", "[INST] Be.\n\nHi [/INST]"),
        ("mistral-v7", "[SYSTEM_PROMPT] Be.[/SYSTEM_PROMPT][INST] Hi [/INST]"),
        ("llama2-sys", "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nHi  [/INST]"),
        ("vicuna", "Be.\n\nUSER: Hi \nASSISTANT:"),
    ],
)
def test_some_as_they_are_written(name: str, text: str) -> None:
    assert render(name, [("system", "Be."), ("user", "Hi ")]) == text


def test_which_names_are_left_out(theirs: tuple[list[str], dict[str, list[str]]]) -> None:
    known = set(theirs[0])
    assert set(TEMPLATES) <= known
    assert len(TEMPLATES) > 0.7 * len(known)


def test_chatml_is_what_models_bring() -> None:
    turns = [{"role": role, "content": text} for role, text in TURNS]
    assert chat_text(byte_level(CHATML), turns, {}) == render("chatml", TURNS)


def test_the_beginning_of_text_and_other_roles() -> None:
    assert render("chatml", [("user", "x"), ("tool", "21")], "<bos>").startswith("<bos><|im_start|>user\nx<|im_end|>")
    assert "<|im_start|>tool\n21<|im_end|>" in render("chatml", [("user", "x"), ("tool", "21")])
    with pytest.raises((ModelFileError, TemplateError), match="vicuna has no messages of role tool"):
        render("vicuna", [("user", "x"), ("tool", "21")])
    for name, case in itertools.product(TEMPLATES, CASES):
        assert "{role}" not in render(name, case)
