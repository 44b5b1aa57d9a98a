from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from hybridkv.errors import ModelFileError
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pretokenizers import PRE_TOKENIZERS
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import end_ids, load_tokenizer
from tests import models as shipped
from tests.gguf.reference import REFERENCE, heldout_text, original_tokenizer_json
from tests.gguf.texts import COMBINING_MARKS, ODD, RUNS, any_text
from tests.gguf.write_qwen35 import Draft, Key, draft, tiny_model, tokenizer_keys
from tests.oracles import ik_llama

# ik_llama.cpp's adapted patterns of these leave out the original's `\p{M}`.
WITHOUT_MARKS = ("tekken", "gpt-4o", "llama4", "kanana2")

SPELLED = bytes_to_unicode()
"""The character that stands for each byte in a vocabulary; made anew at each call."""


def build(keys: dict[str, Key], tmp_path: Path) -> PreTrainedTokenizerFast:
    path = Draft(keys=keys).write(tmp_path / "x.gguf")
    tokenizer = load_tokenizer(Metadata(read_header(path)))
    assert tokenizer is not None
    return tokenizer


@cache
def greedy_vocabulary() -> tuple[list[str], list[str]]:
    """Return tokens and merges learned without splitting text first: where a text is cut, they show."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
    )
    # Pieces of 100 characters: a trainer that is given one long piece takes forever.
    text = heldout_text() + 20 * "".join(ODD)
    tokenizer.train_from_iterator([text[i : i + 100] for i in range(0, len(text), 100)], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in state["merges"]]


def greedy_keys(pre: str) -> dict[str, Key]:
    """Return the metadata of a file with that vocabulary, and what ik_llama.cpp needs to read it."""
    tokens, merges = greedy_vocabulary()
    return {
        **draft(tiny_model()).keys,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": list(merges),
    }


class TestReference:
    tokenizer = load_tokenizer(Metadata(read_header(REFERENCE)))
    original = Tokenizer.from_str(original_tokenizer_json())

    @pytest.mark.parametrize("text", [*ODD, "<|endoftext|>a <|endoftext|>\n"])
    def test_ids_of_odd_texts(self, text: str) -> None:
        assert self.tokenizer is not None
        ids = self.original.encode(text).ids
        assert self.tokenizer(text).input_ids == ids
        assert self.tokenizer.decode(ids) == self.original.decode(ids, skip_special_tokens=False)

    def test_ids_of_real_text(self) -> None:
        assert self.tokenizer is not None
        text = heldout_text()
        ids = self.original.encode(text).ids
        assert len(ids) > 4000
        assert self.tokenizer(text).input_ids == ids
        assert self.tokenizer.decode(ids) == text

    def test_vocabulary_and_special_tokens(self) -> None:
        assert self.tokenizer is not None
        assert self.tokenizer.get_vocab() == self.original.get_vocab()
        for role in ("bos", "eos", "pad"):
            assert getattr(self.tokenizer, f"{role}_token") == "<|endoftext|>"
            assert getattr(self.tokenizer, f"{role}_token_id") == 0
        assert self.tokenizer.decode([0, 36], skip_special_tokens=True) == self.original.decode([36])


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_splits_agree_with_ik_llama(tmp_path: Path, pre: str) -> None:
    ours = build(greedy_keys(pre), tmp_path)
    with ik_llama.model(tmp_path / "x.gguf", content="vocab") as theirs:
        for text in (*ODD, heldout_text()):
            if text != COMBINING_MARKS or pre not in WITHOUT_MARKS:
                assert ours(text).input_ids == theirs.tokenize(text), text


OPENAI = {"gpt-2": "gpt2", "llama-bpe": "cl100k_base", "dbrx": "cl100k_base", "gpt-4o": "o200k_base"}


@pytest.mark.parametrize("pre", OPENAI)
def test_splits_agree_with_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: str) -> None:
    """OpenAI's own patterns in OpenAI's own engine: the originals of these four."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *args, **kwargs: {})
    pattern = getattr(openai_public, OPENAI[pre])()["pat_str"]
    tokens, _ = greedy_vocabulary()
    to_byte = {character: byte for byte, character in SPELLED.items()}
    ranks = {bytes(to_byte[character] for character in token): rank for rank, token in enumerate(tokens)}
    original = tiktoken.Encoding(pre, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = build(greedy_keys(pre) | {"tokenizer.ggml.add_bos_token": False}, tmp_path)
    to_rank = {token: rank for rank, token in enumerate(tokens)}
    for text in (*ODD, *RUNS, heldout_text()):
        found = [to_rank[token] for token in ours.convert_ids_to_tokens(ours(text).input_ids)]
        assert found == original.encode(text), text


@pytest.fixture(scope="module")
def theirs() -> Iterator[ik_llama.IkModel]:
    with ik_llama.model(shipped.smollm2(), content="vocab") as model:
        yield model


class TestSmolLM2:
    """A real vocabulary of 49152 tokens, 17 of them special."""

    @staticmethod
    @cache
    def ours() -> PreTrainedTokenizerFast:
        tokenizer = load_tokenizer(Metadata(read_header(shipped.smollm2())))
        assert tokenizer is not None
        return tokenizer

    @staticmethod
    @cache
    def known_bytes() -> frozenset[str]:
        """Bytes that are tokens, as the vocabulary spells them."""
        return frozenset(SPELLED.values()) & TestSmolLM2.ours().get_vocab().keys()

    def test_ids_agree_with_ik_llama(self, theirs: ik_llama.IkModel) -> None:
        for text in (*ODD, *RUNS, heldout_text(), "<|im_start|>user\nHi<|im_end|>\n", "x<|endoftext|>"):
            assert self.ours()(text).input_ids == theirs.tokenize(text), text

    @given(text=any_text)
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    def test_ids_of_any_text_agree_with_ik_llama(self, theirs: ik_llama.IkModel, text: str) -> None:
        """Where a byte is no token (21 are not), ik_llama.cpp merges nothing across it and `tokenizers` does."""
        known = self.known_bytes()
        text = "".join(c for c in text if {SPELLED[byte] for byte in c.encode()} <= known)
        assert self.ours()(text).input_ids == theirs.tokenize(text)

    def test_a_turn_ends_the_answer(self) -> None:
        meta = Metadata(read_header(shipped.smollm2()))
        assert end_ids(meta, 49152) == [2, 0]  # <|im_end|>, <|endoftext|>

    def test_chat(self) -> None:
        text = self.ours().apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.fixture(scope="module")
def every_byte(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return build(greedy_keys("smollm"), tmp_path_factory.mktemp("tokenizer"))


@given(text=any_text)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_every_text_survives(every_byte: PreTrainedTokenizerFast, text: str) -> None:
    assert every_byte.decode(every_byte(text).input_ids) == text


def test_no_pre_tokenizer_name_appears_twice() -> None:
    assert sum(len(record.names) for record in set(PRE_TOKENIZERS.values())) == len(PRE_TOKENIZERS)


def test_every_pre_tokenizer_splits_in_its_own_way(tmp_path: Path) -> None:
    """Else the comparison above could not tell them apart."""
    text = "".join(ODD) + heldout_text()
    names = {record.splits: record.names[0] for record in PRE_TOKENIZERS.values()}.values()
    ids = {name: tuple(build(greedy_keys(name), tmp_path)(text).input_ids) for name in names}
    assert len(set(ids.values())) == len(names)


@pytest.mark.parametrize(("pre", "cls"), [("qwen2", Qwen2Tokenizer), ("qwen35", Qwen3_5Tokenizer)])
def test_ids_are_those_of_transformers_own_classes(tmp_path: Path, pre: str, cls: Any) -> None:
    """Decomposed text too: these compose it first, which llama.cpp does not."""
    keys = greedy_keys(pre)
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    oracle = cls(
        vocab={str(token): index for index, token in enumerate(tokens)},
        merges=[tuple(str(merge).split(" ")) for merge in merges],
    )
    ours = build(keys, tmp_path)
    for text in (*ODD, "nai\u0308ve cafe\u0301", heldout_text()):
        assert ours(text).input_ids == oracle(text).input_ids, text


def test_added_tokens_are_matched_whole(tmp_path: Path) -> None:
    tokenizer = build(tokenizer_keys(), tmp_path)
    ids = tokenizer("<|begin|>in<think><|end|>").input_ids
    assert [tokenizer.convert_ids_to_tokens(index) for index in ids] == [
        "<|begin|>",
        "in",
        "<think>",
        "<|end|>",
    ]
    assert ids[0] == 256
    assert tokenizer.decode(ids, skip_special_tokens=True) == "in<think>"


def test_unused_and_empty_tokens_are_no_text(tmp_path: Path) -> None:
    keys = tokenizer_keys()
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens[-2:] = ["", ""]  # type: ignore[list-item]
    tokenizer = build(keys, tmp_path)
    vocab = tokenizer.get_vocab()
    assert len(vocab) == 268
    assert max(vocab.values()) == 267
    assert tokenizer.decode(tokenizer("[PAD3]").input_ids) == "[PAD3]"


@pytest.mark.parametrize(
    ("pre", "flags", "first", "last"),
    [
        ("gpt-2", {}, False, False),
        ("gpt-2", {"add_bos_token": True}, True, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("gpt-2", {"add_eos_token": True}, False, True),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    ],
)
def test_begin_and_end_tokens(tmp_path: Path, pre: str, flags: dict[str, bool], first: bool, last: bool) -> None:
    keys = tokenizer_keys(pre)
    del keys["tokenizer.ggml.add_bos_token"]
    keys |= {f"tokenizer.ggml.{flag}": value for flag, value in flags.items()}
    tokenizer = build(keys, tmp_path)
    plain = tokenizer("the", add_special_tokens=False).input_ids
    assert tokenizer("the").input_ids == [256] * first + plain + [257] * last
    assert tokenizer("the", "in").input_ids.count(256) == 2 * first


def test_whole_pieces_need_no_merges(tmp_path: Path) -> None:
    """llama-bpe takes a piece that is a token as it is; gpt-2 would cut it for want of merges."""
    keys = tokenizer_keys()
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    types = keys["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    tokens[-1], types[-1] = "zebra", 1  # type: ignore[call-overload]
    assert len(build(keys, tmp_path)("zebra").input_ids) == 5
    keys["tokenizer.ggml.pre"] = "llama-bpe"
    assert build(keys, tmp_path)("zebra", add_special_tokens=False).input_ids == [287]


def test_padding_is_on_the_left(tmp_path: Path) -> None:
    batch = build(tokenizer_keys(), tmp_path)(["in", "in the"], padding=True)
    assert batch.input_ids[0][0] == 256
    assert batch.attention_mask[0][0] == 0


def test_chat_template(tmp_path: Path) -> None:
    keys = tokenizer_keys()
    keys["tokenizer.chat_template"] = "{% for m in messages %}<|begin|>{{ m.content }}{% endfor %}"
    tokenizer = build(keys, tmp_path)
    chat = [{"role": "user", "content": "in"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|begin|>in"
    assert build(tokenizer_keys(), tmp_path).chat_template is None


def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    from jinja2.exceptions import SecurityError

    keys = tokenizer_keys()
    keys["tokenizer.chat_template"] = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(SecurityError):
        build(keys, tmp_path).apply_chat_template([{"role": "user", "content": ""}], tokenize=False)


DEFECTS: dict[str, tuple[str, Key | None, str]] = {
    "kind": ("tokenizer.ggml.model", "bert", "unknown tokenizer 'bert' .* known: gpt2, llama"),
    "kind is a number": ("tokenizer.ggml.model", 3, "'tokenizer.ggml.model' is 3; expected a text"),
    "pre-tokenizer": ("tokenizer.ggml.pre", "new", "unknown pre-tokenizer 'new' .* known: gpt-2, .*qwen35"),
    "no tokens": ("tokenizer.ggml.tokens", None, "'tokenizer.ggml.tokens' is missing"),
    "tokens are numbers": ("tokenizer.ggml.tokens", [1, 2], "expected an array of texts"),
    "no merges": ("tokenizer.ggml.merges", None, "'tokenizer.ggml.merges' is missing"),
    "merge of unknown parts": ("tokenizer.ggml.merges", ["in the"], "'in the' does not join two tokens"),
    "merge into no token": ("tokenizer.ggml.merges", ["t h"], "'t h' does not join two tokens into a third"),
    "merge without space": ("tokenizer.ggml.merges", ["th"], "'th' does not join"),
    "types too few": ("tokenizer.ggml.token_type", [1, 1], "expected 288 whole numbers"),
    "types are texts": ("tokenizer.ggml.token_type", ["1"], "expected 288 whole numbers"),
    "bos out of range": ("tokenizer.ggml.bos_token_id", 288, "is 288; expected a whole number from 0 to 287"),
    "bos is a text": ("tokenizer.ggml.bos_token_id", "x", "is 'x'; expected a whole number"),
    "flag is a number": ("tokenizer.ggml.add_bos_token", 1, "is 1; expected true or false"),
    "template is a flag": ("tokenizer.chat_template", True, "is True; expected a text"),
    "token twice": ("tokenizer.ggml.tokens", ["a"] * 288, "tokens 0 and 1 .* are both 'a'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects(tmp_path: Path, name: str) -> None:
    key, value, message = DEFECTS[name]
    keys = tokenizer_keys()
    if value is None:
        del keys[key]
    else:
        keys[key] = value
    with pytest.raises(ModelFileError, match=message):
        build(keys, tmp_path)


def test_a_begin_token_is_asked_for_and_not_named(tmp_path: Path) -> None:
    keys = tokenizer_keys()
    del keys["tokenizer.ggml.bos_token_id"]
    keys["tokenizer.ggml.add_bos_token"] = True
    with pytest.raises(ModelFileError, match="bos_token_id' is missing; expected the token that"):
        build(keys, tmp_path)
    keys["tokenizer.ggml.add_bos_token"] = False
    assert build(keys, tmp_path).bos_token is None
