"""`hybridkv run` on several ranks: one speaks, all say the same, and the rest is refused."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.torchrun import needs_accelerate, torchrun


@pytest.mark.slow
@needs_accelerate
def test_run_speaks_once_and_says_the_same(models: ModelStore, cli: Cli) -> None:
    options = ("--ids", "5,6,7,8,9,10,11,12", "-n", "12", "--ignore-eos", "-ctk", "q8_0", "-ctv", "q8_0", "-c", "64")
    model = ("-m", str(models.family("qwen3_5_text")))
    alone = cli("run", *model, *options, "--temp", "0", "--backend", "eager", "--weights", "plain")
    done = torchrun("hybridkv.cli", "run", *model, *options, "--temp", "0", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert " ".join(map(str, said["sequences"][0]["ids"])) == alone.out.split("\n")[0].strip()
    assert done.stderr.count("qwen3_5_text: 4 layers") == 1
    assert [layer["bytes_per_token"] for layer in said["layers"]] == [136, 136]
    drawn = torchrun("hybridkv.cli", "run", *model, *options, "--temp", "1.5")
    assert drawn.returncode == 0, drawn.stderr  # each rank has a seed of its own, and they stay together


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("serve",), "torchrun started 2 processes, but this command"),
        (("run", "--ids", "5", "--session", "talk"), "--session on several ranks"),
        (("run", "--ids", "5", "--backend", "native"), "--backend native on 2 ranks"),
        (("run", "--ids", "5", "--weights", "int8"), "--weights int8 on 2 ranks"),
        (("run", "--ids", "5"), "a GGUF model runs in one process, not on 2 ranks"),
    ],
    ids=["serve", "session", "native", "weights", "gguf"],
)
def test_what_ranks_cannot_do_is_refused(
    words: tuple[str, ...], wrong: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them, before any rank waits for another."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    done = cli(*words)
    assert done.code == 2
    assert wrong in done.err
