"""Models by name, from a server that plays the hub and from its cache; and models that lie on the machine."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hybridkv.cli.model_source import model_of
from hybridkv.engine.hub import HubModel, choose_files, fetch_model, parse_model
from hybridkv.engine.local_models import local_models, model_named
from hybridkv.errors import ModelFileError, UsageError
from tests.engine.hub_server import Hub, running

FILES = {
    "a/quants": {
        "README.md": b"read me",
        "model-Q4_K_M.gguf": b"four" * 1000,
        "model-Q8_0.gguf": b"eight" * 1000,
        "mmproj-Q8_0.gguf": b"images",
    },
    "a/shards": {f"big-Q6_K-0000{n}-of-00003.gguf": bytes([n]) * 500 for n in (1, 2, 3)},
    "a/directory": {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "x.bin": b"no"},
    "a/closed": {"model.gguf": b"x"},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub({name: dict(files) for name, files in FILES.items()}, gated={"a/closed"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_the_default_quant_a_named_one_and_a_named_file(hub: Hub) -> None:
    assert fetch_model(parse_model("a/quants")).read_bytes() == b"four" * 1000
    assert fetch_model(parse_model("a/quants:q8_0")).name == "model-Q8_0.gguf"
    assert fetch_model(parse_model("a/quants", file="README.md")).read_bytes() == b"read me"
    with pytest.raises(UsageError, match=r"-hf a/quants:Q2_K; it has: model-Q4_K_M.gguf, model-Q8_0.gguf") as caught:
        fetch_model(parse_model("a/quants:Q2_K"))
    assert caught.value.hint == "name one of these with -hff, or by its type behind the colon"
    with pytest.raises(UsageError, match=r"-hff 'x.gguf'; a/quants has"):
        fetch_model(parse_model("a/quants", file="x.gguf"))


def asked(**options: object) -> argparse.Namespace:
    given = {"model": None, "hf_repo": None, "hf_file": None, "hf_token": None, "offline": False}
    return argparse.Namespace(**given | options)


def test_a_file_that_nobody_named_is(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_of(asked(hf_repo="a/shards")).name == "big-Q6_K-00001-of-00003.gguf"
    said = capsys.readouterr().err
    assert said == "note: -hf a/shards has no Q4_K_M: big-Q6_K-00001-of-00003.gguf was taken; :QUANT names another\n"
    for named in ("a/quants", "a/quants:Q8_0", "a/directory"):
        model_of(asked(hf_repo=named))
    model_of(asked(hf_repo="a/quants", hf_file="model-Q8_0.gguf"))
    assert capsys.readouterr().err == ""


def test_a_repository_given_as_a_path_names_the_option_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "owner/name:Q8_0", "hf.co/owner/name"):
        with pytest.raises(UsageError, match=f"no model at {name}") as caught:
            model_of(asked(model=name))
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(f"-hf {name} takes it from Hugging Face's hub")
    (tmp_path / "models").mkdir()
    for path in ("models/typo", str(Path(os.pardir) / "name"), "owner/name.gguf", "/owner/name", "name"):
        assert model_of(asked(model=path)) == Path(path)


def test_all_shards_come_and_the_first_is_the_model(hub: Hub) -> None:
    path = fetch_model(parse_model("a/shards:Q6_K"))
    assert path.name == "big-Q6_K-00001-of-00003.gguf"
    assert sorted(p.name[-19:-5] for p in path.parent.iterdir()) == [f"0000{n}-of-00003" for n in (1, 2, 3)]


def test_a_repository_without_gguf_is_a_directory(hub: Hub) -> None:
    path = fetch_model(parse_model("a/directory"))
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_what_is_not_there_or_not_open(hub: Hub) -> None:
    with pytest.raises(UsageError, match="-hf a/nothing: no such repository on the hub"):
        fetch_model(parse_model("a/nothing"))
    with pytest.raises(UsageError, match="-hf a/closed: its owner requires consent"):
        fetch_model(parse_model("a/closed"))
    assert parse_model("hf.co/a/quants:Q8_0") == parse_model("https://huggingface.co/a/quants:Q8_0")
    assert parse_model("huggingface.co/a/quants/").repository == "a/quants"
    for wrong in ("model", "a/b/c", "", "a/b c"):
        with pytest.raises(UsageError, match="allowed: owner/name"):
            parse_model(wrong)


def test_a_download_that_was_cut_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut_after = 1500
    try:
        path = fetch_model(parse_model("a/quants:Q8_0"))
    except ModelFileError:  # it gave up; the next run goes on
        path = fetch_model(parse_model("a/quants:Q8_0"))
    assert path.read_bytes() == b"eight" * 1000
    assert "bytes=1500-" in [asked for method, _, asked in hub.requests if method == "GET"]


def test_without_a_network_the_cache_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_model(parse_model("a/quants:Q8_0"))
    n_requests = len(hub.requests)
    assert fetch_model(parse_model("a/quants:Q8_0", network=False)) == first
    with pytest.raises(ModelFileError, match="no network is to be used, and the cache has no such model"):
        fetch_model(parse_model("a/shards", network=False))
    with pytest.raises(ModelFileError, match="the cache has no such model: -hf a/quants:Q2_K; it has: model-Q8_0"):
        fetch_model(parse_model("a/quants:Q2_K", network=False))
    assert len(hub.requests) == n_requests
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert fetch_model(parse_model("a/quants:Q8_0")) == first
    with pytest.raises(ModelFileError, match="the hub cannot be asked"):
        fetch_model(parse_model("a/shards"))
    assert time.monotonic() < start + 10  # not after a minute of trying again


@pytest.mark.parametrize(
    ("names", "quant", "chosen"),
    [
        (["m-Q4_K_S.gguf", "m-Q4_K_M.gguf"], None, "m-Q4_K_M.gguf"),
        (["m-Q5_0.gguf", "m-F16.gguf"], None, "m-F16.gguf"),
        (["m.Q8_0.gguf", "m.IQ4_XS.gguf"], "iq4_xs", "m.IQ4_XS.gguf"),
        (["UD/m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_XL", "UD/m-UD-Q4_K_XL.gguf"),
        (["Q4_K_M/m-00002-of-00002.gguf", "Q4_K_M/m-00001-of-00002.gguf"], None, "Q4_K_M/m-00001-of-00002.gguf"),
        (["mmproj-F16.gguf", "m-F16.gguf", "imatrix.gguf"], "f16", "m-F16.gguf"),
    ],
)
def test_which_file_is_meant(names: list[str], quant: str | None, chosen: str) -> None:
    assert choose_files(names, HubModel("a/b", quant))[0] == chosen


def test_models_of_other_programs_are_listed_by_the_name_that_opens_them(
    cache: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.delenv("LLAMA_CACHE", raising=False)
    fetch_model(parse_model("a/quants:Q8_0"))
    fetch_model(parse_model("a/directory"))
    ollama = tmp_path / "home/.ollama/models"
    manifest = ollama / "manifests/registry.ollama.ai/library/qwen3/0.6b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:abc"}
    manifest.write_text(json.dumps({"layers": [{"mediaType": "other", "digest": "sha256:no"}, layer]}))
    manifest.with_name("torn").write_text("{")
    (ollama / "blobs").mkdir()
    (ollama / "blobs/sha256-abc").write_bytes(b"GGUF" * 5)
    studio = tmp_path / "home/.lmstudio/models/lmstudio/gemma/gemma-Q4.gguf"
    studio.parent.mkdir(parents=True)
    studio.write_bytes(b"GGUF")
    (studio.parent / "mmproj.gguf").write_bytes(b"GGUF")
    found = {(model.owner, model.name): model.n_bytes for model in local_models()}
    assert found == {
        ("huggingface", "a/quants/model-Q8_0.gguf"): 5000,
        ("huggingface", "a/directory"): 7,
        ("ollama", "qwen3:0.6b"): 20,
        ("LM Studio", "lmstudio/gemma/gemma-Q4.gguf"): 4,
    }
    assert model_named("qwen3:0.6b") == ollama / "blobs/sha256-abc"
    assert model_named("qwen3") is None
    manifest.with_name("latest").write_text(manifest.read_text())
    assert model_named("qwen3") == ollama / "blobs/sha256-abc"
    assert model_named("qwen") is None
