from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from hybridkv.errors import ModelFileError
from hybridkv.gguf.metadata import Metadata
from hybridkv.gguf.pretokenizers import PRE_TOKENIZERS
from hybridkv.gguf.reader import read_header
from hybridkv.gguf.tokenizer import load_tokenizer
from tests.gguf.reference import REFERENCE, heldout_text, original_tokenizer_json
from tests.gguf.write_qwen35 import Draft, Key, draft, tiny_model, tokenizer_keys
from tests.oracles import ik_llama

COMBINING_MARKS = "नमस्ते दुनिया, வணக்கம்"
# ik_llama.cpp's adapted patterns of these leave out the original's `\p{M}`.
WITHOUT_MARKS = ("tekken", "gpt-4o", "llama4")
ODD = (
    "",
    " ",
    "   \n\n  \t x",
    "a\r\nb\r\n\r\n  c",
    "I'll we'RE they'd can't IT'S",
    "1234567 12.5e-3 x1y22z333",
    "naïve café — “quotes” … ½ ² Ⅷ",
    COMBINING_MARKS,
    "中文字符和日本語テキスト",
    "emoji 👩‍👩‍👧 🇩🇪 ✨",
    "/* a */ x+=y**2; //end\n\tif (a&&b) {",
    "CamelCaseAndUPPERCase lower",
    "nul \0 and \x7f",
    "trailing   ",
)


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
    "kind": ("tokenizer.ggml.model", "llama", "unknown tokenizer 'llama' .* known: gpt2"),
    "kind is a number": ("tokenizer.ggml.model", 3, "'tokenizer.ggml.model' is 3; expected a text"),
    "pre-tokenizer": ("tokenizer.ggml.pre", "new", "unknown pre-tokenizer 'new' .* known: gpt-2, .*qwen35"),
    "no pre-tokenizer": ("tokenizer.ggml.pre", None, "'tokenizer.ggml.pre' is missing"),
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
