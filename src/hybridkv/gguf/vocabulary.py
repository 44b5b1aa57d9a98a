"""The parts that all kinds of vocabulary share: tokens with their types, tokens matched whole, begin and end of text.

Owns the reading of `tokenizer.ggml.tokens`, `token_type` and the `add_*_token` flags. Does not own how
text becomes tokens (`bpe.py`, `spm.py`), which call it.

Token types, source: gguf-py `TokenType`. Control tokens become special tokens, user-defined ones plain
added tokens; both are matched whole in the text. Unused ones stay out of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from hybridkv.gguf.metadata import Metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer, processors


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file.

    Parameters
    ----------
    tokens
        All of them, by id.
    types
        Their `TokenType` numbers, by id.
    ids
        Ids of those in use, by text.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]

    def of_type(self, type_: TokenType) -> list[str]:
        """Return the tokens in use that have this type, in order of their ids."""
        of_type = (index for index, each in enumerate(self.types) if each == type_)
        return [token for token in map(self.tokens.__getitem__, of_type) if token in self.ids]


def read_vocabulary(meta: Metadata) -> Vocabulary:
    """Read the tokens.

    Raises
    ------
    ModelFileError
        If they are missing, do not fit their types, or if two have one text.
    """
    tokens = meta.texts("tokenizer.ggml.tokens")
    types = [int(TokenType.NORMAL)] * len(tokens)
    if meta.has("tokenizer.ggml.token_type"):
        types = meta.integers("tokenizer.ggml.token_type", len(tokens))
    used = [index for index, type_ in enumerate(types) if type_ != TokenType.UNUSED and tokens[index]]
    ids = dict(zip(map(tokens.__getitem__, used), used, strict=True))
    if len(ids) < len(used):
        first = next(index for index in used if ids[tokens[index]] != index)
        again = next(index for index in used if index > first and tokens[index] == tokens[first])
        meta.fail(f"tokens {first} and {again} of 'tokenizer.ggml.tokens' are both {tokens[first][:60]!r}")
    return Vocabulary(tokens, types, ids)


def add_whole_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Have control and user-defined tokens matched whole in the raw text; they keep their ids."""
    from tokenizers import AddedToken

    for type_, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add([AddedToken(token, normalized=False) for token in vocabulary.of_type(type_)])


def begin_and_end(
    meta: Metadata, vocabulary: Vocabulary, *, bos: bool, eos: bool = False
) -> processors.PostProcessor | None:
    """Return what adds the beginning and end of text, as the file's flags say, or None if neither is added.

    `bos` and `eos` are what holds where the file has no such flag.
    """
    from tokenizers import processors

    tokens = vocabulary.tokens
    added: dict[str, dict[str, Any]] = {}
    for role, default in (("bos", bos), ("eos", eos)):
        key = f"tokenizer.ggml.add_{role}_token"
        if not meta.flag(key, default=default):
            continue
        index = meta.token_id(role, len(tokens))
        if index is not None:
            added[role] = {"id": role, "ids": [index], "tokens": [tokens[index]]}
        elif meta.has(key):
            meta.expected(f"tokenizer.ggml.{role}_token_id", f"the token that {key!r} adds")
    if not added:
        return None
    single = " ".join(role for role in ("bos", "$A", "eos") if role in {"$A", *added})
    pair = f"{single} {single.replace('$A', '$B')}"
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(added.values()))
