"""Embeddings of a model whose file has a pooling type are the pooled rows; any other model refuses them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridkv.cli import serve
from hybridkv.cli.main import main
from hybridkv.cli.model_options import open_model
from hybridkv.cli.serve_embeddings import load_embedder
from hybridkv.engine.load import bundled_model
from hybridkv.gguf.load import load_gguf
from tests.families import build
from tests.server.conftest import Running, Scripter, running

TEXTS = ["Hello world", "The kernel reads packed rows.", "日本語 <|im_end|>"]


def options(*said: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args([*said, "-c", "64"])


def in_file(pooling: int) -> tuple[str, str]:
    return ("--override-kv", f"qwen35.pooling_type=int:{pooling}")


def served_with(*said: str) -> Any:
    a = options(*said)
    serve.check(a)
    opened = open_model(a, pooling=a.pooling or "of the file")
    return load_embedder(a, opened)[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(served_with(*in_file(3))) as server:
        yield server


@pytest.fixture(scope="module")
def rows() -> Any:
    """The last layer's output, in double precision."""
    loaded = load_gguf(bundled_model())
    model = loaded.model.double()

    @torch.inference_mode()
    def rows_of(ids: list[int]) -> np.ndarray[Any, Any]:
        return model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[-1][0].numpy()

    return rows_of


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return vector / np.linalg.norm(vector)


def embed(server: Running, **body: Any) -> Any:
    with server.client as client:
        return client.embeddings.create(**body)


def test_the_last_row(server: Running, rows: Any, tokenizer: Any) -> None:
    reply = embed(server, model="m", input=TEXTS)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert [data.index for data in reply.data] == [0, 1, 2]
    for data, text in zip(reply.data[:2], ids[:2], strict=True):
        np.testing.assert_allclose(data.embedding, unit(rows(text)[-1]), atol=2e-5)
    assert reply.usage.prompt_tokens == sum(map(len, ids[:2])) + len(server_ids(server, TEXTS[2]))
    floats = embed(server, model="m", input=ids[0], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(floats, reply.data[0].embedding, atol=1e-6)


def server_ids(server: Running, text: str) -> list[int]:
    with server.http as http:
        body = {"content": text, "add_special": True, "parse_special": False}
        return list(http.post("/tokenize", json=body).json()["tokens"])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (in_file(1), "mean"),
        (in_file(2), "cls"),
        (("--pooling", "cls"), "cls"),
        ((*in_file(2), "--pooling", "mean"), "mean"),
    ],
)
def test_other_ways_to_pool(said: tuple[str, ...], kind: str, rows: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS[1]).input_ids
    expected = rows(ids).mean(0) if kind == "mean" else rows(ids)[0]
    found = served_with(*said).embedder.embed(ids).numpy()
    np.testing.assert_allclose(found, unit(expected), atol=2e-5)


def test_fewer_dimensions_have_length_1_again(server: Running) -> None:
    whole = embed(server, model="m", input="Hello").data[0].embedding
    part = embed(server, model="m", input="Hello", dimensions=16).data[0].embedding
    np.testing.assert_allclose(part, unit(np.array(whole[:16])), atol=1e-6)


def message_of(server: Running, path: str, body: bytes) -> str:
    with server.http as http:
        reply = http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["message"])


def test_what_is_wrong(server: Running) -> None:
    for body, part in (
        ({"input": []}, "input"),
        ({"input": [""]}, "input.0: the text has no tokens"),
        ({"input": [[10**6]]}, "this model's tokens are 0 to"),
        ({"input": "x", "dimensions": 10**6}, "dimensions: 1000000; allowed: 1 to"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": ["a", "word " * 100]}, "exceeds the available context size: input.1 has 1"),
    ):
        assert part in message_of(server, "/v1/embeddings", json.dumps(body).encode()), body
    assert "half of a surrogate pair" in message_of(server, "/v1/embeddings", b'{"input": "\\ud800"}')
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        said = message_of(server, path, json.dumps(body).encode())
        assert "is an embedding model; allowed: /v1/embeddings" in said


def test_a_generator_refuses(scripted: Scripter) -> None:
    said = message_of(scripted(5), "/v1/embeddings", b'{"input": "x"}')
    assert "names no pooling" in said
    assert "hint: serve a GGUF file whose metadata has a pooling_type" in said


@pytest.mark.parametrize("command", ["run", "chat"])
def test_commands_that_generate_say_which_one_embeds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *in_file(3), "-p", "x"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "this is an embedding model, with which `hybridkv serve` answers /v1/embeddings" in said


def test_pairs_of_texts_are_not_ranked() -> None:
    from hybridkv.errors import ModelFileError

    with pytest.raises(ModelFileError, match="pooling_type' is 4; expected 0 or -1"):
        open_model(options(*in_file(4)), pooling="of the file")


def test_where_no_pooling_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("qwen3_5_text").save_pretrained(tmp_path)
    for line, said in (
        (["-m", str(tmp_path)], "--pooling last with a model directory; allowed: with a GGUF file"),
        (["--ray"], "--pooling last with --ray: replicas generate text"),
    ):
        assert main(["serve", "--port", "0", "--pooling", "last", *line]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_may_generate_all_the_same() -> None:
    assert open_model(options(*in_file(3), "--pooling", "none"), pooling="none").description.pooling is None
