"""The words of the code: docstrings of functions start with a verb."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hybridkv

ROOT = Path(hybridkv.__file__).parent
LAB = Path(__file__).parent.parent / "lab/src/hybridkv_lab"
QUESTIONS = ("How", "What", "When", "Where", "Whether", "Which", "Who", "Why")
MOST_QUESTIONS = 20
"""Function docstrings that begin with a question word: lower it when there are fewer, and never raise it."""


def docstrings() -> Iterator[tuple[str, str]]:
    """Give every function of the package, by file and name, with its docstring."""
    for path in sorted([*ROOT.rglob("*.py"), *LAB.rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.name}:{node.lineno} {node.name}", text


def test_docstrings_say_what_a_function_does() -> None:
    """`Check whether ...`, `Explain why ...`, `Return ...`: the reader does not assemble the verb."""
    found = [f"{place}: {text.splitlines()[0]}" for place, text in docstrings() if text.split()[0] in QUESTIONS]
    assert len(found) <= MOST_QUESTIONS, found
    assert len(list(docstrings())) > 1000
