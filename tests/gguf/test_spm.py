"""SentencePiece vocabularies: ids and texts are those of the sentencepiece library and of ik_llama.cpp."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridkv.errors import ModelFileError
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer
from tests import models as shipped
from tests.gguf.reference import heldout_text
from tests.gguf.texts import ODD, RUNS, any_text
from tests.gguf.write_qwen35 import Draft, Key, draft, tiny_model
from tests.oracles import ik_llama

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SYMBOLS = ("<tool>", "  ", "\n\n")  # user-defined ones


@cache
def original(prefix: str, symbols: tuple[str, ...] = ()) -> SentencePieceProcessor:
    """A vocabulary trained by the library itself, which learns runs, scripts and words from these texts."""
    written = io.BytesIO()
    text = heldout_text().splitlines(keepends=True) + 20 * [*ODD, *RUNS]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=written,
        model_type="bpe",
        vocab_size=2500,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
        add_dummy_prefix=prefix == "prefix",
        user_defined_symbols=[symbol.replace(" ", "▁") for symbol in symbols],
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=written.getvalue())


def keys_of(sp: SentencePieceProcessor, prefix: str, symbols: Sequence[str] = ()) -> dict[str, Key]:
    """The metadata that a converter writes for it; spaces in user-defined tokens are spaces there."""
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    types = [
        CONTROL if sp.is_control(i) else UNKNOWN if sp.is_unknown(i) else BYTE if sp.is_byte(i) else NORMAL
        for i in range(len(pieces))
    ]
    for symbol in symbols:
        i = sp.piece_to_id(symbol.replace(" ", "▁"))
        pieces[i], types[i] = symbol, USER_DEFINED
    return {
        **{key: value for key, value in draft(tiny_model()).keys.items() if not key.startswith("tokenizer.")},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.add_space_prefix": prefix == "prefix",
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }


def build(keys: dict[str, Key], path: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(Metadata(read_header(Draft(keys=keys).write(path))))
    assert tokenizer is not None
    return tokenizer


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@pytest.fixture(scope="module", params=["prefix", "none"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerFast, SentencePieceProcessor]:
    sp = original(request.param)
    return build(keys_of(sp, request.param), tmp_path_factory.mktemp("spm") / "x.gguf"), sp


class TestAgainstSentencePiece:
    @given(text=any_text)
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @example(text=heldout_text())
    @example(text="a" * 3000 + " " + "🙂" * 300)
    def test_ids_and_texts(self, pair: tuple[PreTrainedTokenizerFast, SentencePieceProcessor], text: str) -> None:
        ours, theirs = pair
        if any(special in text for special in ("<s>", "</s>", "<unk>")):
            return  # in text, these are text to the library and tokens to every chat program
        expected = theirs.encode(text)
        assert ids(ours, text) == expected
        decoded = ours.decode(expected)
        assert decoded == theirs.decode(expected)
        if "▁" not in text:
            assert decoded == text

    @pytest.mark.parametrize("text", [*ODD, *RUNS])
    def test_ids_of_odd_texts(self, pair: tuple[PreTrainedTokenizerFast, SentencePieceProcessor], text: str) -> None:
        ours, theirs = pair
        assert ids(ours, text) == theirs.encode(text)

    def test_the_vocabulary_has_merges_bytes_and_scripts(
        self, pair: tuple[PreTrainedTokenizerFast, SentencePieceProcessor]
    ) -> None:
        """Else the comparison above would compare nothing."""
        theirs = pair[1]
        found = [theirs.id_to_piece(i) for text in (*ODD, heldout_text()) for i in theirs.encode(text)]
        assert sum(piece.startswith("<0x") for piece in found) > 10
        assert sum(len(piece) > 4 and piece.isalpha() for piece in found) > 100
        assert any("中" in piece for piece in found)


def test_user_defined_tokens_are_matched_whole(tmp_path: Path) -> None:
    sp = original("none", SYMBOLS)
    ours = build(keys_of(sp, "none", SYMBOLS), tmp_path / "x.gguf")
    for text in ("a<tool>b", "x  y   z", "one\n\n\ntwo", "<tool><tool>  \n\n <too"):
        assert ids(ours, text) == sp.encode(text), text
        assert ours.decode(ids(ours, text)) == text


def test_special_tokens_in_text_and_the_space_after_them(tmp_path: Path) -> None:
    """A text after a special token begins like a text: as in ik_llama.cpp and Transformers' Llama."""
    keys = keys_of(original("prefix"), "prefix")
    ours = build(keys, tmp_path / "x.gguf")
    with ik_llama.model(tmp_path / "x.gguf", content="vocab") as theirs:
        for text in ("<s>one</s>two", "one</s> two", "</s>", "<s>\n", "one<s>", *ODD, *RUNS, heldout_text()):
            assert ids(ours, text) == theirs.tokenize(text), text
    assert ours("one").input_ids[0] == keys["tokenizer.ggml.bos_token_id"]
    assert ours.decode(ours("one two").input_ids, skip_special_tokens=True) == "one two"
    keys["tokenizer.ggml.add_bos_token"] = False
    keys["tokenizer.ggml.add_eos_token"] = True
    assert build(keys, tmp_path / "x.gguf")("one").input_ids == [*ids(ours, "one"), original("prefix").eos_id()]


def test_without_scores_tokens_rank_by_their_ids(tmp_path: Path) -> None:
    """A converter that has no SentencePiece model writes one score for all; ids are in the order of merges."""
    theirs = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    theirs.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=["<unk>"], max_token_length=12)
    # Pieces of 40 characters: without words to split at, a trainer that is given long ones takes forever.
    text = heldout_text() + 20 * "".join(ODD)
    theirs.train_from_iterator([text[i : i + 40] for i in range(0, len(text), 40)], trainer)
    vocab = json.loads(theirs.to_str())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    ours = build(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(tokens),
            "tokenizer.ggml.scores": [-1000.0] * len(tokens),
            "tokenizer.ggml.token_type": [UNKNOWN] + [NORMAL] * (len(tokens) - 1),
            "tokenizer.ggml.add_space_prefix": False,
        },
        tmp_path / "x.gguf",
    )
    expected = theirs.encode(heldout_text()).ids
    assert len(expected) < len(heldout_text()) / 2
    assert ids(ours, heldout_text()) == expected


DEFECTS: dict[str, tuple[str, Key | None, str]] = {
    "no scores": ("tokenizer.ggml.scores", None, r"'tokenizer.ggml.scores' is missing; expected \d+ numbers"),
    "scores too few": ("tokenizer.ggml.scores", [0.5], r"'tokenizer.ggml.scores' is \[0.5\]; expected \d+ numbers"),
    "scores that are whole": ("tokenizer.ggml.scores", [1] * 2500, "expected 2500 numbers"),
    "score NaN": ("tokenizer.ggml.scores", [float("nan")] * 2500, "expected 2500 numbers"),
    "prefix is a number": ("tokenizer.ggml.add_space_prefix", 1, "is 1; expected true or false"),
    "types too few": ("tokenizer.ggml.token_type", [1], "expected 2500 whole numbers"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects(tmp_path: Path, name: str) -> None:
    key, value, message = DEFECTS[name]
    keys = keys_of(original("prefix"), "prefix")
    del keys[key]
    if value is not None:
        keys[key] = value
    with pytest.raises(ModelFileError, match=message):
        build(keys, tmp_path / "x.gguf")


@pytest.mark.slow
def test_gemma3_is_as_in_ik_llama() -> None:
    """262144 tokens, 414 of them user-defined or bytes, no space prefix."""
    path = shipped.gemma3()
    ours = load_tokenizer(Metadata(read_header(path)))
    assert ours is not None
    with ik_llama.model(path, content="vocab") as theirs:
        for text in (*ODD, *RUNS, heldout_text(), "<start_of_turn>user\nHi<end_of_turn>\n", "<b>x</b>"):
            assert ids(ours, text) == theirs.tokenize(text), text
            assert ours.decode(ids(ours, text)) == text
    turn_end = ours.convert_tokens_to_ids("<end_of_turn>")
    assert end_ids(Metadata(read_header(path)), 262144) == [1, turn_end]
