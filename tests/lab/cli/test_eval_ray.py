"""`hybridkv eval --ray`: the same figures, wherever they are measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybridkv.errors import UsageError
from hybridkv_lab.results import Result, read_jsonl
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_error

OPTIONS = ("-c", "64", "--windows", "2", "-n", "4", "-t", "1", "--mode", "decode")

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='ray is not installed: pip install "hybridkv[ray]"')


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that ends with the test, in a directory with a name short enough for its sockets."""
    import ray

    directory = tempfile.mkdtemp(prefix="hkv-", dir="/tmp")
    for name, value in (("RAY_TMPDIR", directory), ("RAY_AUTH_MODE", "disabled"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    yield
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def figures(path: Path) -> list[Result]:
    """Everything but what a clock says."""
    return [replace(r, prefill_tok_s=None, decode_tok_s=None) for r in read_jsonl(path)[1]]


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # Ray's
@pytest.mark.usefixtures("own_ray")
def test_figures_are_those_without_ray(cli: Cli, tmp_path: Path) -> None:
    """To the last digit; and a run that was begun without Ray goes on with it."""
    alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
    assert cli("eval", *OPTIONS, "--types", "q8_0,q4_0+kv", "-o", alone).code == 0
    assert cli("eval", *OPTIONS, "--types", "q8_0", "-o", spread).code == 0
    begun = spread.with_suffix(".npz").read_bytes()
    done = cli("eval", *OPTIONS, "--types", "q8_0,q4_0+kv", "-o", spread, "--resume", "--ray")
    assert done.code == 0, done.err
    assert figures(spread) == figures(alone)
    assert spread.with_suffix(".npz").read_bytes() != begun
    conditions, results = read_jsonl(spread)
    assert conditions.complete
    assert next(r for r in results if r.label == "q4_0+kv").decode_tok_s


def test_what_one_machine_alone_has_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ("-o", tmp_path / "run.jsonl")
    if find_spec("ray") is not None:
        assert "--device cuda:1 with --ray" in one_error(cli("eval", "--ray", "--device", "cuda:1", *output))
    monkeypatch.setattr("hybridkv.cli.ray_options.find_spec", lambda _: None)
    for words in (("eval", *output), ("serve",)):
        said = one_error(cli(*words, "--ray"))
        assert 'not installed: ray\nhint: pip install "hybridkv[ray]"' in said
    assert "--replicas 2 without --ray" in one_error(cli("serve", "--replicas", "2"))


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_what_a_served_cluster_cannot_do_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert "--session-dir with --ray" in one_error(cli("serve", "--ray", "--session-dir", tmp_path))
    assert "--device cuda:1 with --ray" in one_error(cli("serve", "--ray", "--device", "cuda:1"))
    assert "no Ray is found there" in one_error(cli("serve", "--ray", "127.0.0.1:1", "--replicas", "1"))


@pytest.mark.slow
@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_what_rays_own_tools_import(capfd: pytest.CaptureFixture[str]) -> None:
    from hybridkv.cli.ray_app import app

    built = app({"options": "-ctk q8_0 --replicas 1 -t 1 --api-key k"})
    assert type(built).__name__ == "Application"
    assert "q8_0   f16" in capfd.readouterr().err
    with pytest.raises(UsageError, match="argument 'replicas'; allowed: options"):
        app({"replicas": "2"})
    with pytest.raises(UsageError, match="unknown option '--replica'"):
        app({"options": "--replica 2"})
