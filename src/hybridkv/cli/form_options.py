"""Options that say what an answer has to be, by llama-cli's names: a grammar, a JSON schema, a budget of thoughts."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv.cli.chat_options import read_text
from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.engine.load import Loaded
    from hybridkv.engine.sampling import Steering
    from hybridkv.server.grammar import Grammar

_FORMS = (
    ("--grammar", "grammar"),
    ("--grammar-file", "grammar_file"),
    ("--json-schema", "json_schema"),
    ("--json-schema-file", "json_schema_file"),
)


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group `form of the answer`."""
    group = parser.add_argument_group("form of the answer")
    group.add_argument("--grammar", metavar="GBNF", help="the answer is what this grammar describes: GBNF or Lark")
    group.add_argument("--grammar-file", metavar="FILE", help="read the grammar from a file")
    group.add_argument("-j", "--json-schema", metavar="JSON", help="the answer is JSON by this schema; {}: any object")
    group.add_argument("-jf", "--json-schema-file", metavar="FILE", help="read the schema from a file")
    group.add_argument(
        "--reasoning-budget",
        type=int,
        default=-1,
        metavar="N",
        help="tokens of thought at most in a chat, then they are closed; 0: none, -1: any number (default -1)",
    )


@dataclass(frozen=True, slots=True)
class Form:
    """The form that an answer has to have.

    Attributes
    ----------
    grammar
        None for any text.
    budget
        Tokens of thought; None for any number.
    """

    grammar: Grammar | None = None
    budget: int | None = None

    def __bool__(self) -> bool:
        """Check whether it asks for anything."""
        return self.grammar is not None or self.budget is not None

    def steering_for(self, loaded: Loaded) -> Callable[[str | None], Steering | None]:
        """Build what makes an answer's steering from its conversation's text; None stands for a plain prompt.

        Raises
        ------
        UsageError
            For a model without a tokenizer, and for a grammar that is not taken.
        """
        if not self:
            return lambda _: None
        if loaded.tokenizer is None:
            raise UsageError("a grammar needs a tokenizer, and this model has none", hint="leave the grammar out")
        from hybridkv.model import vocab_size_of
        from hybridkv.server.forms import Forms
        from hybridkv.server.prompts import Prompts

        n_vocab = vocab_size_of(loaded.model.config)
        forms = Forms(Prompts(loaded.tokenizer, n_vocab), n_vocab, loaded.end_ids)
        return lambda text: asyncio.run(forms.steer(self.grammar, text, self.budget))


def form_from(a: argparse.Namespace) -> Form:
    """Read the options.

    Raises
    ------
    UsageError
        For several forms, for what is no JSON schema, and for several sequences.
    """
    if a.reasoning_budget < -1:
        raise UsageError(f"--reasoning-budget {a.reasoning_budget}; allowed: -1 (any number), 0 (none) or more")
    budget = None if a.reasoning_budget < 0 else int(a.reasoning_budget)
    if budget is not None and not a.chat:
        notice(f"--reasoning-budget {budget} has no effect without a chat: a plain prompt has no thoughts")
        budget = None
    given = [option for option, name in _FORMS if getattr(a, name) is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} were given together", hint="one of them will do")
    if (given or budget is not None) and a.parallel > 1:
        option = given[0] if given else "--reasoning-budget"
        raise UsageError(f"{option} and -np {a.parallel}; allowed: -np 1", hint="leave -np out")
    return Form(_grammar(a, given[0]) if given else None, budget)


def _grammar(a: argparse.Namespace, option: str) -> Grammar:
    from hybridkv.server.grammar import Grammar, of_schema

    path = a.grammar_file or a.json_schema_file
    text = read_text(option, Path(path)) if path is not None else a.grammar or a.json_schema
    if option.startswith("--grammar"):
        if not text.strip():
            raise UsageError(f"{option}: the grammar is empty", hint="""try --grammar 'root ::= "yes" | "no"'""")
        return Grammar("gbnf", text)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option}: no JSON: {error}", hint="""try -j '{"type": "object"}'""") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{option}: {schema!r:.80} is no JSON schema; allowed: an object")
    return of_schema(schema or {"type": "object"})
