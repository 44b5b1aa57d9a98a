"""Servers on loopback, each in a thread of its own: one that says what a test wrote, one with the bundled model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn

from hybridkv.cache import KVTypes
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.server.app import create_app
from hybridkv.server.gate import GateOptions, GateState
from hybridkv.server.listen import bind, url_of
from hybridkv.server.request_handler import Served
from tests.server.scripted import Scripted

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"


@dataclass
class Running:
    """A server that runs."""

    url: str
    served: Served
    state: GateState
    key: str = "none"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    @property
    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60)


@contextmanager
def running(
    served: Served, options: GateOptions | None = None, around: Callable[[Any], Any] = lambda app: app
) -> Iterator[Running]:
    state = GateState()
    listener = bind("127.0.0.1", 0)
    app = around(create_app(served, options or GateOptions(), state))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    url = url_of(listener)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(url, served, state)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def reference() -> Loaded:
    return load(describe(bundled_model()), dtype=torch.float32, device="cpu", weights="auto")


@pytest.fixture(scope="session")
def tokenizer(reference: Loaded) -> Any:
    return reference.tokenizer


Scripter = Callable[..., Running]


@pytest.fixture
def scripted(tokenizer: Any) -> Iterator[Scripter]:
    """Start a server that answers with a script, or a text and an end; `served` and `options` change what it is."""
    contexts = []

    def start(
        *script: Any,
        says: str | None = None,
        wait_s: float = 0.0,
        options: GateOptions | None = None,
        chat: bool = False,
        around: Callable[[Any], Any] = lambda app: app,
        **served: Any,
    ) -> Running:
        import copy

        if says is not None:
            script = (*tokenizer.backend_tokenizer.encode(says, add_special_tokens=False).ids, 0)

        words = copy.deepcopy(tokenizer)
        words.chat_template = TEMPLATE if chat else None
        what = Served(
            runner=Scripted(script, wait_s),
            tokenizer=words,
            name="scripted",
            types=KVTypes("q4_0", "q4_0"),
            types_label="q4_0",
            n_ctx=64,
            parallel=2,
            n_vocab=8192,
            end_ids=(0,),
            fingerprint="test",
        )
        context = running(replace(what, **served), options, around)
        contexts.append(context)
        return context.__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)
