"""The tokens that may come next in one answer: free thoughts up to a budget, then what a grammar allows.

Follows the answer token by token on the scheduler's thread, by bytes, because a word that ends thoughts may be one
token or several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hybridkv.server.grammar import Matcher

_TAIL = 64


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks of thoughts, and how long they may be.

    Attributes
    ----------
    opens, closes
        The words around them.
    opened, may_open
        Whether the prompt has opened them, and whether the answer may.
    open_ids, close_ids
        Tokens of the words.
    gap_ids
        Tokens of nothing but line ends, which may follow the closing word.
    budget
        Tokens of thought at most; None for any number.
    """

    opens: str
    closes: str
    opened: bool
    may_open: bool
    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    gap_ids: tuple[int, ...] = ()
    budget: int | None = None


@dataclass(slots=True)
class Steer:
    """Steers one answer.

    Attributes
    ----------
    bytes_of
        What a token is in UTF-8.
    thinking
        None for an answer without thoughts.
    matcher
        What comes after them; None for anything.
    """

    bytes_of: Callable[[int], bytes]
    thinking: Thinking | None
    matcher: Matcher | None
    n_thought: int = 0
    _state: Literal["begin", "thoughts", "gap", "rest"] = field(init=False)
    _text: bytes = b""
    _forced: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        thinking = self.thinking
        self._state = "rest"
        if thinking is not None and (thinking.opened or thinking.may_open):
            self._state = "thoughts" if thinking.opened else "begin"
        self._force()

    def allowed(self) -> Tensor | None:
        """Return the ids of the tokens that may come next; None for all."""
        if self._forced:
            return torch.tensor(self._forced[:1])
        if self._state == "thoughts" or self.matcher is None:
            return None
        ids = self.matcher.allowed()
        if self.thinking is None or self._state == "rest":
            return ids
        more = self.thinking.gap_ids
        if self._state == "begin":  # thoughts that begin with several tokens cannot be told from what the grammar takes
            more = self.thinking.open_ids if len(self.thinking.open_ids) == 1 else ()
        return torch.tensor(sorted({*ids.tolist(), *more}))

    def accept(self, token: int) -> None:
        """Take the token that came."""
        if self._forced and token == self._forced[0]:
            del self._forced[0]
        if self._state == "rest" or self.thinking is None:
            self._match(token)
        elif self._state == "thoughts":
            self._think(token, self.thinking)
        elif self._state == "begin":
            self._begin(token, self.thinking)
        elif token in self.thinking.gap_ids:
            self._state = "rest"
        else:
            self._state = "rest"
            self._match(token)

    def _match(self, token: int) -> None:
        if self.matcher is not None:
            self.matcher.accept(token)

    def _begin(self, token: int, thinking: Thinking) -> None:
        self._text += self.bytes_of(token)
        text, opens = self._text.lstrip(), thinking.opens.encode()
        if text.startswith(opens):
            self._state, self._text = "thoughts", text[len(opens) :]
            self._force()
        elif self.matcher is not None and token not in thinking.open_ids:
            self._state = "rest"
            self._match(token)
        elif text and not opens.startswith(text):
            self._state = "rest"

    def _think(self, token: int, thinking: Thinking) -> None:
        self.n_thought += 1
        self._text = (self._text + self.bytes_of(token))[-_TAIL:]
        if thinking.closes.encode() in self._text:
            self._state, self._text, self._forced = "gap" if self.matcher is not None else "rest", b"", []
            return
        self._force()

    def _force(self) -> None:
        """Have the thoughts closed once they have taken all that they may."""
        thinking = self.thinking
        if (
            self._state == "thoughts"
            and not self._forced
            and thinking is not None
            and thinking.budget is not None
            and self.n_thought >= thinking.budget
        ):
            self._forced = list(thinking.close_ids)


def line_ends(bytes_of: Callable[[int], bytes], ids: Sequence[int]) -> tuple[int, ...]:
    """Find those of the tokens that are nothing but line ends."""
    return tuple(token for token in ids if (text := bytes_of(token)) and not text.strip(b"\n"))
