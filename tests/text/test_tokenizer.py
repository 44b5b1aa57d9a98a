"""The tokenizer of a file by itself against Transformers' class over the same: ids, text and special tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer, read_tokenizer
from hybridkv.text.tokenizer import TextTokenizer
from tests import models as shipped
from tests.gguf.reference import REFERENCE
from tests.gguf.texts import ODD, RUNS, any_text
from tests.gguf.write_qwen35 import draft, tiny_model, tokenizer_keys
from tests.thin import slow_but

FILES = {"bundled": lambda: REFERENCE, "smollm2": shipped.smollm2, "gemma3": shipped.gemma3}


@cache
def both(name: str) -> tuple[TextTokenizer, PreTrainedTokenizerFast]:
    meta = Metadata(read_header(FILES[name]()))
    own, theirs = read_tokenizer(meta), load_tokenizer(meta)
    assert own is not None
    assert theirs is not None
    return own, theirs


QUICK = [name for name in FILES if name != "gemma3"]
"""Reading 262144 tokens takes both readers seconds."""


@pytest.mark.parametrize("name", slow_but(FILES, QUICK))
def test_texts(name: str) -> None:
    own, theirs = both(name)
    for text in (*ODD, *RUNS, *own.all_special_tokens, "x" + "".join(own.all_special_tokens) + "y"):
        ids = theirs(text).input_ids
        assert own.encode(text) == own(text).input_ids == ids
        assert own.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert own.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", slow_but(FILES, QUICK))
@settings(max_examples=50, deadline=None)
@given(text=any_text)
def test_any_text(name: str, text: str) -> None:
    own, theirs = both(name)
    assert own.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", FILES)
def test_special_tokens(name: str) -> None:
    own, theirs = both(name)
    assert own.special_tokens_map == theirs.special_tokens_map
    assert own.all_special_tokens == theirs.all_special_tokens
    assert own.eos_token_id == theirs.eos_token_id
    assert own.chat_template == theirs.chat_template
    one, two = (t.backend_tokenizer.get_added_tokens_decoder() for t in (own, theirs))
    assert {i: (t.content, t.special) for i, t in one.items()} == {i: (t.content, t.special) for i, t in two.items()}


def test_a_role_of_a_plain_token(tmp_path: Path) -> None:
    """A file may call a token of its vocabulary the end of text that is no control token: it is matched whole too."""
    file = draft(tiny_model())
    file.keys |= tokenizer_keys()
    types = list(file.keys["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
    eos = int(file.keys["tokenizer.ggml.eos_token_id"])  # type: ignore[arg-type]
    types[eos] = 1
    file.keys["tokenizer.ggml.token_type"] = types
    meta = Metadata(read_header(file.write(tmp_path / "x.gguf")))
    own, theirs = read_tokenizer(meta), load_tokenizer(meta)
    assert own is not None
    assert theirs is not None
    text = f"a{theirs.eos_token}b"
    assert own.encode(text) == theirs.encode(text)
    assert eos in own.encode(text)
    assert end_ids(meta, len(types)) == [eos]
