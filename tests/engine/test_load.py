"""A chat from a Hugging Face directory ends where one from a GGUF file does: at every end of a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv.engine.load import Loaded, describe, load
from tests.chat_models import CHATML, CONTROL, byte_level
from tests.families import build


def directory(path: Path, tokenizer: Any | None, eos: str | None) -> Loaded:
    n_vocab = 512 if tokenizer is None else len(tokenizer)
    end = None if tokenizer is None or eos is None else tokenizer.convert_tokens_to_ids(eos)
    build("qwen3_5_text", vocab_size=n_vocab, eos_token_id=end).save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return load(describe(path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("eos", "turn_end"),
    [
        ("<|endoftext|>", "<|im_end|>"),
        ("<eos>", "<end_of_turn>"),
        ("<|end_of_text|>", "<|eot_id|>"),
        ("<|endoftext|>", "<|end|>"),
        ("</s>", "<|im_end|>"),
        (None, "<|im_end|>"),
    ],
)
def test_every_turn_end_of_the_vocabulary_ends(tmp_path: Path, eos: str | None, turn_end: str) -> None:
    words = ("<bos>", "<|im_start|>", *filter(None, [eos]), turn_end)
    tokenizer = byte_level(CHATML, control=words)
    loaded = directory(tmp_path, tokenizer, eos)
    ends = [tokenizer.convert_tokens_to_ids(word) for word in words[2:]]
    assert sorted(loaded.end_ids) == ends
    assert sorted(loaded.model.generation_config.eos_token_id) == ends


def test_also_where_the_file_does_not_mark_it_as_special(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML, control=("<bos>", "<|endoftext|>"), plain=("<|im_end|>", "<think>"))
    loaded = directory(tmp_path, tokenizer, "<|endoftext|>")
    assert sorted(loaded.end_ids) == [tokenizer.convert_tokens_to_ids(w) for w in ("<|endoftext|>", "<|im_end|>")]


def test_what_the_directory_says_itself_is_kept(tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML, control=("<bos>", "<stop>"))
    assert directory(tmp_path, tokenizer, "<stop>").end_ids == (tokenizer.convert_tokens_to_ids("<stop>"),)
    assert len(CONTROL) > 2
    assert directory(tmp_path / "none", None, None).end_ids == ()
