"""A template has its time, in whatever thread it is rendered."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from hybridkv.errors import ModelFileError
from hybridkv.text import chat


def tokenizer(render: Any) -> Any:
    return SimpleNamespace(chat_template="x", apply_chat_template=lambda messages, **_: render(messages))


def endless(messages: Any) -> str:
    for _ in iter(int, 1):
        messages = [*messages]
    return ""


def test_an_endless_template_ends_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.1)
    with pytest.raises(ModelFileError, match="takes more than"):
        chat.chat_text(tokenizer(endless), [])
    with ThreadPoolExecutor(1) as pool, pytest.raises(ModelFileError, match="takes more than"):
        pool.submit(chat.chat_text, tokenizer(endless), []).result()


def test_one_that_ends_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the time runs out just as it ends: nothing reaches what the thread does next."""
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.002)

    def near_the_limit(_: Any) -> str:
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass
        return "said"

    def work() -> set[str]:
        seen = set()
        for _ in range(200):
            try:
                seen.add(chat.chat_text(tokenizer(near_the_limit), []))
            except ModelFileError:
                seen.add("late")
        return seen

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(work), pool.submit(work)
        assert first.result() | second.result() <= {"said", "late"}
    assert threading.active_count() < 20
