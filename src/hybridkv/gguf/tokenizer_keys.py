"""The metadata of a byte-level BPE tokenizer, the inverse of `tokenizer.py`.

Owns which keys a tokenizer becomes. Called by `engine/convert.py` with the JSON that the `tokenizers` library writes.
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType

from hybridkv.errors import ModelError
from hybridkv.gguf.architectures.record import Keys
from hybridkv.gguf.pretokenizers import PRE_TOKENIZERS

_GPT2 = PRE_TOKENIZERS["gpt-2"].splits[0]
_HINT = "leave the tokenizer out with --no-tokenizer; the file then runs with --ids"


def tokenizer_keys(tokenizer: dict[str, Any], n_tokens: int) -> Keys:
    """Return tokens, types, merges and the pre-tokenizer's name.

    Parameters
    ----------
    tokenizer
        What tokenizer.json holds.
    n_tokens
        Rows of the embedding, which may be more than there are tokens.

    Raises
    ------
    ModelError
        For a tokenizer that is not byte-level BPE, splits text in a way that has no name, or has more tokens than
        the model.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(f"the tokenizer is of type {model.get('type')!r}; allowed: byte-level BPE", hint=_HINT)
    tokens: dict[int, str] = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= n_tokens:
        raise ModelError(f"the tokenizer has a token {max(tokens)}; the model has {n_tokens}", hint=_HINT)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name(tokenizer),
        "tokenizer.ggml.tokens": [tokens.get(index, f"[PAD{index}]") for index in range(n_tokens)],
        "tokenizer.ggml.token_type": [int(types.get(index, TokenType.UNUSED)) for index in range(n_tokens)],
        "tokenizer.ggml.merges": merges,
    }


def _name(tokenizer: dict[str, Any]) -> str:
    """Return the name of the way a tokenizer splits text: the first that does the same in all respects."""
    splits = _splits(tokenizer.get("pre_tokenizer") or {})
    composes = any(step.get("type") == "NFC" for step in _steps(tokenizer.get("normalizer") or {}, "normalizers"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for name, record in PRE_TOKENIZERS.items():
        alike = (record.normalizer == "nfc", record.whole_pieces == "vocabulary") == (composes, whole)
        if splits == record.splits and alike:
            return name
    raise ModelError(f"the tokenizer splits text in a way that no GGUF name is known for: {splits}", hint=_HINT)


def _splits(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    splits: list[str] = []
    for step in _steps(pre_tokenizer, "pretokenizers"):
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            splits.append(step["pattern"].get("Regex") or step["pattern"].get("String"))
        elif kind == "Digits" and step.get("individual_digits"):
            splits.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            splits += [_GPT2] if step.get("use_regex", True) else []
        else:
            splits.append(f"<{kind}>")
    return tuple(splits)


def _steps(step: dict[str, Any], parts: str) -> list[dict[str, Any]]:
    return list(step[parts]) if step.get("type") == "Sequence" else [step] if step else []
