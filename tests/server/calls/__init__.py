"""The calls of client libraries that people make of a server like this one, in one numbered list."""

from tests.server.calls import of_instructor, of_langchain, of_litellm, of_llm, of_openai
from tests.server.calls.record import SAYS, TOO_LONG, Call

CALLS: tuple[Call, ...] = (
    *of_openai.CALLS,
    *of_langchain.CALLS,
    *of_litellm.CALLS,
    *of_instructor.CALLS,
    *of_llm.CALLS,
)

__all__ = ["CALLS", "SAYS", "TOO_LONG", "Call"]
