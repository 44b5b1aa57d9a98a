"""The splits of text before byte-level BPE merges: one record per `tokenizer.ggml.pre` name.

Owns the table. Does not own building a tokenizer (`tokenizer.py`, which reads it).

A GGUF file names its pre-tokenizer and does not carry it. Patterns are those of the original
`tokenizer.json` files, in the regular expressions of the `tokenizers` library, so that ids equal the
original's; llama.cpp runs adapted ones. Which names share a pattern: llama.cpp and ik_llama.cpp,
src/llama-vocab.cpp (`llm_tokenizer_bpe`), where the original patterns are quoted beside the adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DEFAULT = "default"
"""The name of converters that did not know the pre-tokenizer, and what llama.cpp takes where a file has none."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of splitting text.

    Parameters
    ----------
    names
        The `tokenizer.ggml.pre` values that mean it.
    splits
        Patterns applied one after the other; each match becomes a piece, and so does what lies between.
    normalizer
        `nfc` where the original composes Unicode first (llama.cpp never does).
    whole_pieces
        `vocabulary` where a piece that is a token is taken whole, without running the merges.
    bos
        Whether a beginning-of-text token is added when the file does not say.
    source
        Where the pattern comes from.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    source: str
    normalizer: Literal["none", "nfc"] = "none"
    whole_pieces: Literal["merges", "vocabulary"] = "merges"
    bos: Literal["absent", "added"] = "absent"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

_RECORDS = (
    PreTokenizer(("gpt-2", "mellum", "a.x-4.0"), (_GPT2,), source="openai/gpt-2 encoder.py; tokenizers, ByteLevel"),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "minerva-7b"),
        (r"\p{N}", _GPT2),
        source="HuggingFaceTB/SmolLM2-135M tokenizer.json: Digits(individual), ByteLevel",
    ),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
        (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",),
        normalizer="nfc",
        source="transformers, models/qwen2/tokenization_qwen2.py",
    ),
    PreTokenizer(
        ("qwen35",),
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
        normalizer="nfc",
        source="transformers, models/qwen3_5/tokenization_qwen3_5.py",
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "lfm2", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        (_LLAMA3,),
        whole_pieces="vocabulary",
        bos="added",
        source="meta-llama/Meta-Llama-3-8B tokenizer.json, quoted in llama-vocab.cpp",
    ),
    PreTokenizer(
        ("dbrx", "smaug-bpe"),
        (_LLAMA3,),
        source="as llama-bpe, without its two flags (llama-vocab.cpp)",
    ),
    PreTokenizer(
        ("tekken",),
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*"
            rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        whole_pieces="vocabulary",
        bos="added",
        source="mistralai/Mistral-Nemo-Base-2407 tokenizer.json, quoted in llama-vocab.cpp",
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2"),
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+{_CONTRACTION}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*{_CONTRACTION}?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        source="openai/tiktoken o200k_base, quoted in llama-vocab.cpp",
    ),
    PreTokenizer(
        (DEFAULT,),
        (
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ),
        source="llama.cpp's own, of no model: src/llama-vocab.cpp (llm_tokenizer_bpe)",
    ),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: record for record in _RECORDS for name in record.names}
)
