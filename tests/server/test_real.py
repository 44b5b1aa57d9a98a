"""The bundled model behind the real client: what many ask at once is what each would be told alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine, SamplingParams, Scheduler
from hybridkv.engine.draft_model import DraftModel
from hybridkv.engine.load import Loaded
from hybridkv.engine.pace import Costs
from hybridkv.engine.speculation import Speculation
from hybridkv.kernels import cpu_native
from hybridkv.model import kv_facts, layer_facts, vocab_size_of
from hybridkv.native import NativeStep
from hybridkv.policy import Guard, Policy
from hybridkv.server.request_handler import Served
from tests.server.conftest import Running, running

N_CTX = 512
TYPES = KVTypes("q8_0", "q8_0")
PROMPTS = [
    "Hello world",
    "The open() function returns",
    "In Python, a list",
    "To configure the server, edit",
    "SELECT name FROM",
    "The kernel " * 40,
    "x",
    "日本語 😀",
]


def specs_of(loaded: Loaded) -> Any:
    return Policy(TYPES).resolve(kv_facts(layer_facts(loaded.model.config)))


@contextmanager
def real_server(
    reference: Loaded, session_dir: Path | None = None, speculation: Speculation | None = None
) -> Iterator[Running]:
    scheduler = Scheduler(
        reference.model,
        specs_of(reference),
        n_parallel=4,
        n_ctx=N_CTX,
        guard=Guard(mode="warn"),
        notify=print,
        prefix_bytes=2**25,
        prefill_chunk=64,
        max_waiting=16,
        speculation=speculation,
    )
    thread = threading.Thread(target=scheduler.run_forever)
    thread.start()
    served = Served(
        runner=scheduler,
        tokenizer=reference.tokenizer,
        name="reference",
        types=TYPES,
        types_label=TYPES.label,
        n_ctx=N_CTX,
        parallel=4,
        n_vocab=vocab_size_of(reference.model.config),
        end_ids=reference.end_ids,
        fingerprint="test",
        session_dir=session_dir,
    )
    try:
        with running(served) as server:
            yield server
    finally:
        scheduler.shutdown(drain=False)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(reference: Loaded) -> Iterator[Running]:
    with real_server(reference) as server:
        yield server


def ids_alone(loaded: Loaded, prompt_ids: list[int], n: int) -> list[int]:
    """The oracle: the single-sequence engine, greedy."""
    engine = Engine(loaded.model, specs_of(loaded), n_ctx=N_CTX, guard=Guard(mode="warn"), notify=print)
    return [token for (token,) in engine.generate(prompt_ids, SamplingParams(temp=0), n_predict=n)]


def alone(loaded: Loaded, prompt: str, n: int) -> str:
    """What it says, up to the end token."""
    assert loaded.tokenizer is not None
    prompt_ids = loaded.tokenizer.encode(prompt)
    ids = list(itertools.takewhile(lambda token: token not in loaded.end_ids, ids_alone(loaded, prompt_ids, n)))
    whole: str = loaded.tokenizer.decode(prompt_ids + ids)
    return whole[len(loaded.tokenizer.decode(prompt_ids)) :]


def test_many_at_once_are_each_as_alone(reference: Loaded, server: Running) -> None:
    expected = [alone(reference, prompt, 24) for prompt in PROMPTS]
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    async def ask(prompt: str, stream: bool) -> str:
        if not stream:
            reply = await client.completions.create(model="reference", prompt=prompt, max_tokens=24, temperature=0)
            return reply.choices[0].text
        chunks = await client.completions.create(
            model="reference", prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].text async for chunk in chunks]
        assert len(pieces) > 3
        return "".join(pieces)

    async def ask_all() -> Sequence[str]:
        try:
            return await asyncio.gather(*(ask(prompt, stream) for stream in (False, True) for prompt in PROMPTS))
        finally:
            await client.close()

    assert list(asyncio.run(ask_all())) == expected * 2


def drafts_of(reference: Loaded, how: str) -> Speculation:
    """Guesses by prompt lookup, or by the model itself as its own draft model, which is right."""
    if how == "ngram":
        return Speculation(costs=Free())
    draft = DraftModel(reference.model, NativeStep(reference.model), n_ctx=N_CTX)
    return Speculation(draft.guesser, n_max=3, costs=Free(), sequence_bytes=draft.sequence_bytes)


class Free(Costs):
    """Runs that cost the same whatever their rows, and much: any guess pays."""

    def of(self, n_rows: int) -> float:
        del n_rows
        return 1000.0

    def knows(self, n_rows: int) -> bool:
        del n_rows
        return True


def value_of(metrics: str, name: str) -> float:
    return float(next(line.split()[-1] for line in metrics.splitlines() if line.startswith(f"{name} ")))


@pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")
@pytest.mark.parametrize("how", ["ngram", "draft model"])
def test_guesses_change_no_text_and_are_counted(reference: Loaded, how: str) -> None:
    """Two streams at once; usage and metrics say how many guesses were right."""
    prompts = ["one two three four five six. " * 4, "The kernel " * 20]
    expected = [alone(reference, prompt, 20) for prompt in prompts]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> tuple[str, Any]:
        chunks = await client.completions.create(
            model="reference",
            prompt=prompt,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        got = [chunk async for chunk in chunks]
        return "".join(chunk.choices[0].text for chunk in got if chunk.choices), got[-1].usage

    async def ask_all(url: str) -> list[tuple[str, Any]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    with real_server(reference, speculation=drafts_of(reference, how)) as server:
        replies = asyncio.run(ask_all(server.url))
        with server.http as http:
            metrics = http.get("/metrics").text
    assert [text for text, _ in replies] == expected
    details = [usage.completion_tokens_details for _, usage in replies]
    n_right = [each.accepted_prediction_tokens for each in details]
    assert min(n_right) >= 1, details
    assert sum(n_right) >= 8, details
    assert all(n < usage.completion_tokens for n, (_, usage) in zip(n_right, replies, strict=True))
    assert value_of(metrics, "hybridkv_right_guesses_total") == sum(n_right)
    wrong = sum(each.rejected_prediction_tokens for each in details)
    assert value_of(metrics, "hybridkv_guessed_tokens_total") == sum(n_right) + wrong


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt(reference: Loaded, server: Running, max_tokens: int) -> None:
    """As lm-eval asks for likelihoods; the oracle is the single-sequence engine behind each beginning."""
    assert reference.tokenizer is not None
    prompt = "In Python, a list is a"
    ids = reference.tokenizer.encode(prompt)
    reply = server.client.completions.create(
        model="reference", prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0
    )
    choice, logprobs = reply.choices[0], reply.choices[0].logprobs
    assert logprobs is not None
    assert choice.text.startswith(prompt)
    assert (choice.text == prompt) is (max_tokens == 0)
    scores = logprobs.token_logprobs
    assert (len(scores), scores[0]) == (len(ids) + max_tokens, None)
    for n in range(1, len(ids)):
        engine = Engine(reference.model, specs_of(reference), n_ctx=N_CTX, guard=Guard(mode="warn"), notify=print)
        expected = torch.log_softmax(engine.prefill(ids[:n])[0].float(), -1)
        assert scores[n] == pytest.approx(float(expected[ids[n]]), abs=5e-3)
        assert max(logprobs.top_logprobs[n].values()) == pytest.approx(float(expected.max()), abs=5e-3)


def test_a_seed_gives_the_same_draw(server: Running) -> None:
    def draw(seed: int) -> str:
        reply = server.client.completions.create(model="reference", prompt="The", max_tokens=12, seed=seed)
        return reply.choices[0].text

    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_a_stored_prefix_is_counted(server: Running) -> None:
    prompt = "A long beginning that two requests have in common. " * 20
    for cached in (False, True):
        reply = server.client.completions.create(model="reference", prompt=prompt, max_tokens=1, temperature=0)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        n_cached = reply.usage.prompt_tokens_details.cached_tokens or 0
        assert reply.usage.prompt_tokens > n_cached
        assert n_cached > 100 if cached else n_cached == 0


def test_logprobs_are_the_models(reference: Loaded, server: Running) -> None:
    reply = server.client.completions.create(model="reference", prompt="Hello", max_tokens=5, temperature=0, logprobs=3)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    for token, own, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(top.values()) == top[token] == pytest.approx(own)
        assert own < 0


def test_a_vanished_client_stops_its_sequence(server: Running) -> None:
    stats = server.served.runner.stats
    for stream in (True, False):
        before = stats()
        # One that streams goes after its first piece, however long that takes; the other by its timeout.
        patience = 60 if stream else 0.5
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=patience)
        body: dict[str, Any] = {"model": "reference", "prompt": "The", "max_tokens": 500, "temperature": 1.5}
        if stream:
            with client.completions.create(**body, stream=True, extra_body={"ignore_eos": True}) as chunks:
                next(iter(chunks))
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**body, extra_body={"ignore_eos": True})
        client.close()
        wait_for(lambda before=before: stats().n_cancelled == before.n_cancelled + 1)
        assert stats().generated_tokens - before.generated_tokens < 450


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_prompt_that_does_not_fit_says_by_how_much(server: Running) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.completions.create(model="reference", prompt="word " * 200_000, max_tokens=1)
    assert caught.value.status_code == 400
    assert "200001 prompt tokens" in str(caught.value) or "do not fit a context of 512 tokens" in str(caught.value)
    body: Any = caught.value.body
    assert body["numbers"]["most_tokens"] == N_CTX
    assert body["numbers"]["n_tokens"] > 200_000
    assert body["numbers"]["planned_bytes"] > 1e8


def test_a_full_queue_says_when_to_come_back(server: Running) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    async def ask() -> int:
        try:
            await client.completions.create(model="reference", prompt="The", max_tokens=20, temperature=0)
        except openai.RateLimitError as refused:
            return int(refused.response.headers["Retry-After"])
        return 0

    async def ask_all() -> list[int]:
        try:
            return list(await asyncio.gather(*(ask() for _ in range(40))))
        finally:
            await client.close()

    waits = asyncio.run(ask_all())
    assert set(waits) == {0, 1}
    assert waits.count(0) >= 16


def test_types_of_a_request(server: Running) -> None:
    def say(**kv_types: Any) -> list[float]:
        extra = {"kv_types": kv_types} if kv_types else {}
        reply = server.client.completions.create(
            model="reference", prompt=PROMPTS[5], max_tokens=4, temperature=0, logprobs=0, extra_body=extra
        )
        assert reply.choices[0].logprobs is not None
        return list(reply.choices[0].logprobs.token_logprobs)

    assert say() != say(type_k="q4_0", type_v="q4_0")
    assert say() == say(type_k="q8_0", type_v="q8_0")
    with pytest.raises(openai.BadRequestError, match="q9_9"):
        say(type_k="q9_9", type_v="q4_0")


def test_a_session_is_saved_and_restored(reference: Loaded, tmp_path: Path) -> None:
    """Another server goes on from the file: the same answer, and what was said before is not processed again."""
    assert reference.tokenizer is not None
    prompt = reference.tokenizer.encode("A conversation that goes on for a while. " * 12)
    longer = prompt + ids_alone(reference, prompt, 12) + reference.tokenizer.encode(" And")
    told: list[str] = []
    for life in ("first", "second"):
        left = tmp_path / f".talk-1.safetensors.{os.getpid()}.part"
        left.write_bytes(b"what a killed server of the same process id left")
        with real_server(reference, session_dir=tmp_path) as server, server.http as http:
            assert not left.exists()
            ask: dict[str, Any] = {"model": "reference", "max_tokens": 12, "temperature": 0}
            ask["extra_body"] = {"session": "talk-1", "ignore_eos": True}
            if life == "first":
                assert http.post("/v1/sessions/talk-1/save", json={}).status_code == 404
                first = server.client.completions.create(prompt=prompt, **ask)
                saved = http.post("/v1/sessions/talk-1/save", json={})
                assert saved.status_code == 200, saved.text
                assert saved.json()["n_tokens"] == first.usage.total_tokens  # type: ignore[union-attr]
                assert [file.name for file in tmp_path.iterdir()] == ["talk-1.safetensors"]
                server.client.completions.create(prompt=prompt, stop=" ", **ask | {"extra_body": {"session": "cut"}})
                assert http.post("/v1/sessions/cut/save", json={}).status_code == 200
                (tmp_path / "cut.safetensors").unlink()
            else:
                assert http.post("/v1/sessions/never/restore", json={}).status_code == 404
                restored = http.post("/v1/sessions/talk-1/restore", json={})
                assert restored.status_code == 200, restored.text
                assert restored.json()["n_tokens"] == saved.json()["n_tokens"]
                again = server.client.completions.create(prompt=prompt, **ask)
                assert again.choices[0].text == first.choices[0].text
                assert again.usage is not None
                assert again.usage.prompt_tokens_details is not None
                assert again.usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 64 * 64 > 0
            reply = server.client.completions.create(prompt=longer, **ask)
            told.append(reply.choices[0].text)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens_details is not None
            assert (reply.usage.prompt_tokens_details.cached_tokens or 0) >= len(prompt)
    assert told[0] == told[1]


def test_names_of_sessions(server: Running, reference: Loaded, tmp_path: Path) -> None:
    with server.http as http:
        off = http.post("/v1/sessions/x/save", json={})
        assert (off.status_code, off.json()["error"]["code"]) == (404, "no_sessions")
    with pytest.raises(openai.NotFoundError, match="--session-dir"):
        server.client.completions.create(model="reference", prompt="x", extra_body={"session": "x"})
    with real_server(reference, session_dir=tmp_path / "in") as kept, kept.http as http:
        (tmp_path / "in").mkdir()
        for name in ("..", "%2e%2e", "a.b", "a%2Fb", "..%2Fx", "a b", "ä", "x" * 65, "a%00", "a%0A"):
            for verb in ("save", "restore"):
                assert http.post(f"/v1/sessions/{name}/{verb}", json={}).status_code in (400, 404), name
        with pytest.raises(openai.BadRequestError, match="allowed: 1 to 64 letters"):
            kept.client.completions.create(model="reference", prompt="x", extra_body={"session": "/".join(("..", "x"))})
        (tmp_path / "in" / "torn.safetensors").write_bytes(b"not a session")
        torn = http.post("/v1/sessions/torn/restore", json={})
        assert torn.status_code == 409
        assert str(tmp_path) not in torn.text
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
