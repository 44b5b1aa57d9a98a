"""A model on two ranks is the model: its logits, and half of its KV cache each. Gloo on the CPU, NCCL on two cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv import ModelError, ModelFileError
from hybridkv.engine.load import bundled_model, describe
from hybridkv.hf.load import load_weights
from hybridkv.hf.ranks import check_plan, n_ranks, rank
from hybridkv.model import kv_facts, layer_facts
from hybridkv.model.ranks import shards_heads
from tests.families import HYBRIDS, build
from tests.hf.cut_model import VOCABULARY
from tests.torchrun import ROOT, needs_accelerate, torchrun

CUT = ("qwen3", "llama_unbiased", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
"""Families whose plan gives each rank its own KV heads."""

WHOLE = ("olmo_hybrid", "jamba", "granitemoehybrid", "nemotron_h", "lfm2", "lfm2_moe", "bamba", "falcon_h1")
"""Those whose plan leaves each rank all of them."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cut")
    for family in (*CUT, *WHOLE):
        build(family, vocab_size=VOCABULARY).save_pretrained(root / family)
    return {family: root / family for family in (*CUT, *WHOLE)}


@pytest.fixture(scope="module")
def found(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank says of each family."""
    out = tmp_path_factory.mktemp("ranks") / "rank"
    done = torchrun("tests.hf.cut_model", str(out), *map(str, directories.values()))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(Path(f"{out}-{r}.json").read_text()) for r in range(2)]
    return {family: [said[family] for said in ranks] for family in directories}


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("family", [*CUT, *WHOLE])
def test_logits_are_those_of_one_process(found: dict[str, list[Any]], family: str) -> None:
    for said in found[family]:
        exact, quantized = said["pairs"]
        assert exact["logits"] < 3e-5 * exact["largest"]
        assert exact["keys"] < 1e-5
        # A value on the edge between two codes may fall to either side.
        assert quantized["logits"] < 3e-2 * quantized["largest"]
        assert quantized["keys"] < 3e-3


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("family", [*CUT, *WHOLE])
def test_a_rank_holds_what_is_planned(found: dict[str, list[Any]], family: str) -> None:
    for said in found[family]:
        for pair in said["pairs"]:
            whole, own = pair["kv_bytes"]
            assert own == (whole // 2 if family in CUT else whole)
            assert pair["state_bytes"][0] == pair["state_bytes"][1]
            assert [own, pair["state_bytes"][1]] == pair["planned"]
        held, planned = said["weights"]
        assert held <= planned < said["all_weights"]
    assert max(said["weights"][0] for said in found[family]) == found[family][0]["weights"][1]


@pytest.mark.slow
@needs_accelerate
def test_all_go_on_from_what_the_first_has_drawn(found: dict[str, list[Any]]) -> None:
    assert [said["agreed"] for said in found["qwen3"]] == [[5], [5]]


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some other launcher
    monkeypatch.delenv("RANK", raising=False)
    assert (n_ranks(), rank()) == (1, 0)


@pytest.mark.parametrize("family", sorted({*CUT, *WHOLE}))
def test_facts_of_a_rank(family: str) -> None:
    config = build(family).config
    whole, own = kv_facts(layer_facts(config)), kv_facts(layer_facts(config, n_ranks=2))
    assert shards_heads(config) == (family in CUT)
    by = 2 if family in CUT else 1
    assert own == tuple(replace(f, n_heads=f.n_heads // by, n_kv_heads=f.n_kv_heads // by) for f in whole)


def test_every_hybrid_is_known_here() -> None:
    assert set(HYBRIDS) <= {*CUT, *WHOLE, "zamba2"}


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="layer 1: 2 KV heads do not divide among 3 ranks") as raised:
        layer_facts(build("qwen3_5_text").config, n_ranks=3)
    assert raised.value.hint == "use 2 ranks"
    with pytest.raises(ModelError, match="1 KV heads do not divide") as raised:
        layer_facts(build("llama").config, n_ranks=2)
    assert raised.value.hint == "run it in one process"


def test_a_family_without_a_plan_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensor-parallel plan for 'zamba2'"):
        check_plan(build("zamba2").config)
    with pytest.raises(ModelError, match="GGUF"):
        describe(bundled_model(), n_ranks=2)


@pytest.mark.slow
@needs_accelerate
def test_what_transformers_cannot_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.17 refuses a head of 97 outputs; the weights are as they should be then."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("The output size of `lm_head` (97) must be divisible")

    build("qwen3_5_text").save_pretrained(tmp_path)
    monkeypatch.setattr("hybridkv.hf.load.AutoModelForCausalLM.from_pretrained", refuse)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attn_implementation": "hybridkv"}
    for n, said in (
        (2, "it cannot be sharded over 2 ranks: try another number, or one process"),
        (1, "of another model"),
    ):
        with pytest.raises(ModelFileError, match="must be divisible") as raised:
            load_weights(tmp_path, **options, n_ranks=n)
        assert str(raised.value.hint).endswith(said)


@pytest.mark.slow
def test_a_rank_that_is_done_does_not_take_the_interpreter_down() -> None:
    """Threads of gloo's still run then, and one that asks for the interpreter too late aborts the process."""
    program = (
        "import atexit; from hybridkv.hf.ranks import exit_rank; "
        "atexit.register(print, 'taken down'); print('said', end=''); exit_rank(3)"
    )
    for ranks, said in (("1", "saidtaken down\n"), ("2", "said")):
        environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (done.stdout, done.returncode) == (said, 0 if ranks == "1" else 3), done.stderr
