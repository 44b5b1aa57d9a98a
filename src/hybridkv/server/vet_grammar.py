"""A process of its own that tries a grammar and can be killed: `{kind, text, limits}` in, `{grammar}` or `{error}` out.

Run by its path (`hybridkv.server.grammar`), so that it imports llguidance alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def vet(kind: str, text: str, limits: dict[str, Any]) -> dict[str, str]:
    """Bring a grammar into llguidance's form and try it; what is wrong in its words."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    try:
        grammar = grammar_from(kind, text)  # type: ignore[arg-type]
    except ValueError as error:
        return {"error": str(error)}
    problem = LLMatcher.validate_grammar(grammar, limits=LLParserLimits(verbose_errors=False, **limits))
    return {"error": problem} if problem and not problem.startswith("WARNING") else {"grammar": grammar}


def main() -> None:
    """Answer one question."""
    asked = json.load(sys.stdin)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (asked["max_bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (asked["max_cpu_s"],) * 2)
    except ImportError:  # no such limits on Windows; the time is limited there, too
        pass
    json.dump(vet(asked["kind"], asked["text"], asked["limits"]), sys.stdout)


if __name__ == "__main__":
    main()
