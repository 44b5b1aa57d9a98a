"""The tokenizer in a GGUF file, by itself and as a Transformers tokenizer.

Owns: the kinds of `tokenizer.ggml.model`, special tokens by their roles, what ends a generation, and the
chat template. Does not own how text becomes tokens (`bpe.py`, `spm.py`). Called by `load.py` and `mapped.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from gguf import TokenType

from hybridkv.gguf.bpe import byte_level_bpe
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.spm import sentencepiece_bpe
from hybridkv.gguf.vocabulary import Vocabulary, read_vocabulary
from hybridkv.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Transformers' name for a special token, and GGUF's. Roles beyond these have no name in Transformers.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Control tokens that end a turn, whatever the file calls them: converters of many models name the end of
# text alone. Source: llama.cpp, src/llama-vocab.cpp (`special_eog_ids`).
TURN_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|eom|>",
    "<end_of_turn>",
    "<EOT>",
)

_KINDS: Mapping[str, Callable[[Metadata, Vocabulary], Tokenizer]] = MappingProxyType(
    {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
)


def read_tokenizer(meta: Metadata) -> TextTokenizer | None:
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
    vocabulary = read_vocabulary(meta)
    tokens = vocabulary.tokens
    ids = {name: meta.token_id(role, len(tokens)) for name, role in _ROLES.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    template = meta.text("tokenizer.chat_template") if meta.has("tokenizer.chat_template") else None
    return TextTokenizer(_KINDS[kind](meta, vocabulary), named, template)


def load_tokenizer(meta: Metadata) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer of a file as Transformers' class; see `read_tokenizer`."""
    found = read_tokenizer(meta)
    if found is None:
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        chat_template=found.chat_template,
        clean_up_tokenization_spaces=False,
        # What generates text needs its prompts to end together.
        padding_side="left",
        **found.special_tokens_map,
    )


def end_ids(meta: Metadata, n_tokens: int) -> list[int]:
    """Return the ids that end a generation: end of text, of turn and of message, each once."""
    ids = [meta.token_id(role, n_tokens) for role in ("eos", "eot", "eom")]
    if meta.has("tokenizer.ggml.tokens") and meta.has("tokenizer.ggml.token_type"):
        tokens = meta.texts("tokenizer.ggml.tokens")
        types = meta.integers("tokenizer.ggml.token_type", len(tokens))
        words = {tokens[index]: index for index, type_ in enumerate(types) if type_ == TokenType.CONTROL}
        ids += [words[token] for token in TURN_ENDS if token in words]
    return list(dict.fromkeys(index for index in ids if index is not None))
