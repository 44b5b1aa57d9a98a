"""Text of growing sequences: the pieces add up to what the tokenizer makes of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridkv.engine.load import bundled_model
from hybridkv.gguf.describe import describe_gguf  # noqa: F401 - registers what tokenizers need
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import load_tokenizer
from hybridkv.text.detokenize import TextStream, token_bytes
from tests.gguf.test_spm import build, keys_of, original

TEXTS = (
    "Hello world,  this\n\n\tis",
    "😀👩‍👩‍👧‍👦 e\u0301 \u0000 日本語",
    "ends in \ufffd",
    "\ufffd\ufffd begins so",
    "€",
)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "byte-level":
        return load_tokenizer(Metadata(read_header(bundled_model())))
    path: Path = tmp_path_factory.mktemp("spm") / "x.gguf"
    return build(keys_of(original("no prefix"), "no prefix"), path)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def pieces(tokenizer: Any, prompt: list[int], rest: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in rest), stream.close()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Once upon a time", "a prompt that ends in \ufffd", "x\n", "日"])
def test_pieces_add_up(tokenizer: Any, prompt: str, text: str) -> None:
    before = encode(tokenizer, prompt)
    after = encode(tokenizer, prompt + text)
    if after[: len(before)] != before:
        after = before + encode(tokenizer, text)
    said = pieces(tokenizer, before, after[len(before) :])
    assert prompt + "".join(said) == tokenizer.decode(after)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in said)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens(tokenizer: Any, data: st.DataObject) -> None:
    """Also what no text encodes to, and a prompt that ends inside a character."""
    n_tokens = tokenizer.backend_tokenizer.get_vocab_size()
    some_bytes = encode(tokenizer, "😀é日")
    ids = st.lists(st.one_of(st.sampled_from(some_bytes), st.integers(0, n_tokens - 1)), max_size=12)
    prompt, rest = encode(tokenizer, "x ") + data.draw(ids), data.draw(ids)
    decode = tokenizer.backend_tokenizer.decode
    whole, before = decode(prompt + rest), decode(prompt)
    # Byte fallback makes U+FFFD of all bytes in a row if one is wrong, those before it too, which were said by then.
    recalled = "\ufffd" in whole and tokenizer.backend_tokenizer.token_to_id("<0x00>") is not None
    if whole.startswith(before) and not recalled:
        assert before + "".join(pieces(tokenizer, prompt, rest)) == whole


def test_a_character_in_four_tokens_comes_in_one_piece(tokenizer: Any) -> None:
    ids = encode(tokenizer, "🜁")
    assert len(ids) >= 4
    assert [piece for piece in pieces(tokenizer, encode(tokenizer, "x"), ids) if piece] == ["🜁"]
    assert "".join(pieces(tokenizer, encode(tokenizer, "x"), ids[:-1])).strip("\ufffd") == ""
    # The prompt may be the first half of it.
    assert "".join(pieces(tokenizer, encode(tokenizer, "x") + ids[:-2], ids[-2:])) == "🜁"


@pytest.mark.parametrize("text", TEXTS[:2])
def test_bytes_of_tokens(tokenizer: Any, text: str) -> None:
    assert b"".join(token_bytes(tokenizer, token) for token in encode(tokenizer, text)) == text.encode()
    assert token_bytes(tokenizer, tokenizer.backend_tokenizer.get_vocab_size()) == b""


def test_breakers_are_the_tokens_that_hold_them() -> None:
    from hybridkv.text.breakers import DRY_BREAKERS, breaker_ids
    from tests.chat_models import CHATML, byte_level

    words = byte_level(CHATML)
    ids = breaker_ids(words)
    assert {words.decode([i]) for i in ids} == set(DRY_BREAKERS)
    [last] = breaker_ids(words, ["stop"])  # over four tokens of a byte-level vocabulary without merges
    assert words.decode([last]) == "p"
    assert breaker_ids(words, []) == frozenset()
