"""SentencePiece BPE: `tokenizer.ggml.model` = `llama`, tokens with scores and no merges.

Owns: the way from scores to merges, spaces as `▁`, and bytes for characters that are no token. Called by
`tokenizer.py`.

SentencePiece joins, again and again, the two neighbours whose joined text is the token with the highest
score, the leftmost of equals. The `tokenizers` library joins by the rank of the pair. So each way of
cutting a token into two tokens is a merge, ranked by the score of the whole. Equal scores (files whose
converter had no scores) fall back on the order of ids, which is the order in which BPE learned them.

Source: Kudo and Richardson 2018 (SentencePiece), bpe_model.cc; llama.cpp, src/llama-vocab.cpp
(`llm_tokenizer_spm`) for the defaults of the flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import TokenType

from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.vocabulary import Vocabulary, add_whole_tokens, begin_and_end

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"


def sentencepiece_bpe(meta: Metadata, vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer.

    Raises
    ------
    ModelFileError
        For scores that do not fit the tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = meta.reals("tokenizer.ggml.scores", len(vocabulary.tokens))
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", default=True)
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    model = models.BPE(
        vocab=dict(vocabulary.ids),
        merges=_merges(vocabulary, scores),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    add_whole_tokens(tokenizer, vocabulary)
    if (ends := begin_and_end(meta, vocabulary, bos=True)) is not None:
        tokenizer.post_processor = ends
    return tokenizer


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Return every way of joining two tokens into a third, the best first.

    Only plain tokens: control, user-defined and byte tokens are never parts of others.
    """
    plain = {token: vocabulary.ids[token] for token in vocabulary.of_type(TokenType.NORMAL)}
    merges = []
    for token in sorted(plain, key=lambda token: (-scores[plain[token]], plain[token])):
        # The longest left part first: in a run of one character, merged from the left, the odd one is last.
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                merges.append((left, right))
    return merges
