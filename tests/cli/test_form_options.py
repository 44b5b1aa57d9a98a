"""Grammars, schemas and budgets of thoughts in `run` and `chat`, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

YES_NO = 'root ::= "yes" | "no"'
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "fine": {"type": "boolean"}},
    "required": ["n", "fine"],
    "additionalProperties": False,
}
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"

pytest.importorskip("llguidance", reason="llguidance is not installed: no structured output")


def answer(cli: Cli, *argv: object, command: str = "run") -> tuple[str, str]:
    """The text, and why it ended."""
    done = cli(command, "-p", "Say it:", "-n", 60, "-s", 1, "--json", *argv)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    return result["sequences"][0]["text"], result["stopped"]


@pytest.mark.parametrize("more", [[], ["--ignore-eos"], ["--temp", 0], ["-st", "--chat-template", "chatml"]])
def test_a_grammar(cli: Cli, more: list[object]) -> None:
    text, ended = answer(cli, "--grammar", YES_NO, *more)
    assert text in ("yes", "no")
    assert ended == "end of text"


def test_a_schema(cli: Cli) -> None:
    text, ended = answer(cli, "-j", json.dumps(SCHEMA))
    assert set(json.loads(text)) == {"n", "fine"}
    assert ended == "end of text"
    assert answer(cli, "--json-schema", "{}")[0].startswith("{")


def test_forms_from_files(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "form"
    path.write_text(YES_NO)
    assert answer(cli, "--grammar-file", path)[0] in ("yes", "no")
    path.write_text(json.dumps(SCHEMA))
    assert set(json.loads(answer(cli, "-jf", path)[0])) == {"n", "fine"}


def test_without_a_form_it_is_as_before(cli: Cli) -> None:
    assert answer(cli) == answer(cli, "--reasoning-budget", -1)


@pytest.mark.parametrize("budget", [0, 5])
def test_a_budget_closes_thoughts(cli: Cli, budget: int) -> None:
    options = ("--chat", "--chat-template", THINKS, "--ignore-eos")
    free, closed = answer(cli, *options)[0], answer(cli, *options, "--reasoning-budget", budget)[0]
    thought, word, _ = closed.partition("</think>")
    assert word
    assert "</think>" not in free
    assert bool(thought) == bool(budget)
    assert free.startswith(thought)
    told = answer(cli, *options, "--reasoning-budget", budget, "--grammar", YES_NO)[0]
    assert told.partition("</think>")[2].strip() in ("yes", "no")


def test_a_budget_of_none_turns_thinking_off_where_the_template_can(cli: Cli) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is false %}!{% endif %}:"
    options = ("run", "-p", "x", "-n", 1, "--json", "--chat", "--chat-template", template)
    assert json.loads(cli(*options).out)["prompt"] == "x:"
    assert json.loads(cli(*options, "--reasoning-budget", 0).out)["prompt"] == "x!:"


def test_a_conversation_has_its_form(cli: Cli) -> None:
    options = ("chat", "-p", "Say it:", "-n", 60, "--chat-template", "chatml", "--grammar", YES_NO)
    done = cli(*options)
    assert done.code == 0, done.err
    assert done.out.strip() in ("yes", "no")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--grammar", YES_NO, "-j", "{}"], "--grammar and --json-schema were given together"),
        (["--grammar", " "], "--grammar: the grammar is empty"),
        (["--grammar", "root ::= missing"], "gbnf: "),
        (["--grammar-file", "/nowhere"], "--grammar-file /nowhere: No such file"),
        (["-j", "{"], "--json-schema: no JSON: "),
        (["-j", "[1]"], "--json-schema: [1] is no JSON schema; allowed: an object"),
        (["-j", '{"type": 5}'], "json_schema: "),
        (["--grammar", YES_NO, "-np", "2"], "--grammar and -np 2; allowed: -np 1"),
        (["--chat", "--reasoning-budget", "3", "-np", "2"], "--reasoning-budget and -np 2; allowed: -np 1"),
        (["--reasoning-budget", "-2"], "--reasoning-budget -2; allowed: -1 (any number), 0 (none) or more"),
    ],
)
def test_what_is_wrong(cli: Cli, argv: list[str], said: str) -> None:
    done = cli("run", "-p", "the", "-n", 1, *argv)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_budget_without_a_chat_says_that_it_has_no_effect(cli: Cli) -> None:
    done = cli("run", "-p", "the", "-n", 1, "--reasoning-budget", 3)
    assert done.code == 0
    assert "note: --reasoning-budget 3 has no effect without a chat" in done.err
