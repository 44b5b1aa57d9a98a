"""A tokenizer and a chat template, with the names that Transformers' fast tokenizers have for what is used here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens."""

    input_ids: list[int]


class TextTokenizer:
    """Turns text into token ids and back.

    Parameters
    ----------
    backend
        Does the work; tokens of `special` are added to it as whole ones where they are not yet.
    special
        Tokens by their roles in Transformers' words: `bos_token`, `eos_token`, ...
    chat_template
        A Jinja template; None if the model has none.
    """

    is_fast: Final = True

    def __init__(self, backend: Tokenizer, special: Mapping[str, str], chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = dict(special)
        self.chat_template = chat_template
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        new = dict.fromkeys(token for token in special.values() if token not in known)
        backend.add_tokens([AddedToken(token, special=True) for token in new])

    @property
    def all_special_tokens(self) -> list[str]:
        """Tokens that have a role, each once."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end of text; None if there is none."""
        token = self.special_tokens_map.get("eos_token")
        found: int | None = None if token is None else self.backend_tokenizer.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with what the vocabulary puts around it."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Return the ids of a text as Transformers' tokenizers do."""
        return Encoded(self.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        """Return the text of token ids."""
        text: str = self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **values: Any
    ) -> str:
        """Return the text that the template makes of a conversation.

        Parameters
        ----------
        values
            Whatever else the template can read; `tokenize=False` is Transformers' and says nothing here.

        Raises
        ------
        ValueError
            For a conversation without messages.
        """
        from hybridkv.text.template import render

        values.pop("tokenize", None)
        if not messages:
            raise ValueError("a chat template needs at least one message")
        assert self.chat_template is not None
        values = {**self.special_tokens_map, "add_generation_prompt": add_generation_prompt, **values}
        return render(self.chat_template, messages, **values)
