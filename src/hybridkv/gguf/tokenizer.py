"""The tokenizer in a GGUF file, as a Transformers tokenizer.

Owns: byte-level BPE (`tokenizer.ggml.model` = `gpt2`) from the file's tokens, merges, token types and
special ids, and the chat template. Does not own how text is split before merging (`pretokenizers.py`).
Called by `load.py`.

Token types, source: gguf-py `TokenType`. Control tokens become special tokens, user-defined ones plain
added tokens; both are matched whole in the text. Unused ones stay out of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from gguf import TokenType

from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

# Transformers' name for a special token, and GGUF's. Roles beyond these have no name in Transformers.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def load_tokenizer(meta: Metadata) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer of a file; None where the file has none.

    Raises
    ------
    ModelFileError
        For a kind of tokenizer or a pre-tokenizer that is not in the tables, and for lists that do not
        fit together.
    """
    if not meta.has("tokenizer.ggml.model"):
        return None
    kind = meta.text("tokenizer.ggml.model")
    if kind not in _KINDS:
        meta.fail(
            f"unknown tokenizer {kind!r} in 'tokenizer.ggml.model'; known: {', '.join(_KINDS)}",
            hint="load the model from its Hugging Face directory instead",
        )
    from transformers import PreTrainedTokenizerFast

    tokens = meta.texts("tokenizer.ggml.tokens")
    ids = {name: meta.token_id(role, len(tokens)) for name, role in _ROLES.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    template = meta.text("tokenizer.chat_template") if meta.has("tokenizer.chat_template") else None
    return PreTrainedTokenizerFast(
        tokenizer_object=_KINDS[kind](meta, tokens),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        # What generates text needs its prompts to end together.
        padding_side="left",
        **named,
    )


def end_ids(meta: Metadata, n_tokens: int) -> list[int]:
    """Return the ids that end a generation: end of text, of turn and of message, each once."""
    ids = [meta.token_id(role, n_tokens) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(index for index in ids if index is not None))


def _byte_level_bpe(meta: Metadata, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pre = _pre_tokenizer(meta)
    vocab, types = _vocabulary(meta, tokens)
    whole = pre.whole_pieces == "vocabulary"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(meta, vocab), ignore_merges=whole))
    if pre.normalizer == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for type_, add in (
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        # Tokens that the vocabulary has keep their ids.
        add([AddedToken(token, normalized=False) for token, index in vocab.items() if types[index] == type_])
    tokenizer.post_processor = _post_processor(meta, tokens, pre)
    return tokenizer


def _pre_tokenizer(meta: Metadata) -> PreTokenizer:
    name = meta.text("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        meta.fail(
            f"unknown pre-tokenizer {name!r} in 'tokenizer.ggml.pre'; known: {', '.join(PRE_TOKENIZERS)}",
            hint="load the model from its Hugging Face directory instead",
        )
    return PRE_TOKENIZERS[name]


def _splitter(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def _post_processor(meta: Metadata, tokens: list[str], pre: PreTokenizer) -> processors.PostProcessor:
    """Return what adds the beginning and end of text, as the file's flags say."""
    from tokenizers import processors

    added = {}
    for role, default in (("bos", pre.bos == "added"), ("eos", False)):
        key = f"tokenizer.ggml.add_{role}_token"
        if not meta.flag(key, default=default):
            continue
        index = meta.token_id(role, len(tokens))
        if index is not None:
            added[role] = {"id": role, "ids": [index], "tokens": [tokens[index]]}
        elif meta.has(key):
            meta.expected(f"tokenizer.ggml.{role}_token_id", f"the token that {key!r} adds")
    offsets = processors.ByteLevel(trim_offsets=False)
    if not added:
        return offsets
    single = " ".join(role for role in ("bos", "$A", "eos") if role in {"$A", *added})
    pair = f"{single} {single.replace('$A', '$B')}"
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(added.values()))
    return processors.Sequence([offsets, template])


def _vocabulary(meta: Metadata, tokens: list[str]) -> tuple[dict[str, int], list[int]]:
    """Return the tokens in use with their ids, and the type of every token."""
    types = [int(TokenType.NORMAL)] * len(tokens)
    if meta.has("tokenizer.ggml.token_type"):
        types = meta.integers("tokenizer.ggml.token_type", len(tokens))
    vocab: dict[str, int] = {}
    for index, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if not token or type_ == TokenType.UNUSED:
            continue
        if vocab.setdefault(token, index) != index:
            meta.fail(f"tokens {vocab[token]} and {index} of 'tokenizer.ggml.tokens' are both {token[:60]!r}")
    return vocab, types


def _merges(meta: Metadata, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the merges as pairs; `tokenizers` raises a bare Exception for parts it does not know."""
    merges = []
    for merge in meta.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            meta.fail(f"'tokenizer.ggml.merges': {merge[:60]!r} does not join two tokens into a third")
        merges.append((left, right))
    return merges


_KINDS: Mapping[str, Callable[[Metadata, list[str]], Tokenizer]] = MappingProxyType({"gpt2": _byte_level_bpe})
