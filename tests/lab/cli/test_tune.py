"""`hybridkv tune` as its user sees it, and its file in every command that takes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv import quantized_cache
from hybridkv.cache import KVSpec, KVTypes
from hybridkv.errors import UsageError
from hybridkv.model import kv_facts, layer_facts
from hybridkv.policy import config_of, format_config, read_config
from hybridkv_lab.results import read_jsonl
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.cli.test_bad_input import one_error
from tests.families import build, remembering

TEXT = Path(__file__).parents[2] / "data" / "heldout_excerpt.txt"
SMALL = ("-f", TEXT, "--window", 64, "--calibrate", 1, "--verify", 2, "-t", 1)


def test_a_budget_is_kept_and_the_file_is_used(cli: Cli, tmp_path: Path) -> None:
    """The bundled hybrid, 3 KV layers: tables, kv.toml, JSON, then `run` prints the types of each layer."""
    output = tmp_path / "kv.toml"
    options = ("--types", "q8_0,hq4_nl,hq2_nl", "--rounds", 1)
    done = cli("tune", *SMALL, *options, "--budget", "5.0bpv", "-o", output)
    assert done.code == 0, done.err
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["tuned"]["bits"] <= 5.0
    assert all(row["bits"] <= 5.0 for row in numbers["uniform"])
    assert [layer["layer"] for layer in numbers["layers"]] == [3, 7, 11]
    for layer in numbers["layers"]:
        for side in "kv":
            losses = layer["sensitivity"][side]
            assert 0 < losses["q8_0"] < losses["hq4_nl"] < losses["hq2_nl"]
        assert 0 < layer["guard_error"] < 1
    assert numbers["verdict"] in done.out
    assert numbers["verdict"] in output.read_text()
    assert "On 128 held-out tokens:" in done.out
    found = read_config(output)
    chosen = [f"{row.type_k}/{row.type_v}" for row in found.layers]
    assert chosen == [f"{layer['type_k']}/{layer['type_v']}" for layer in numbers["layers"]]
    ran = cli("run", "-p", "Hello", "-n", 2, "--temp", 0, "--kv-config", output, "--kv-guard", "off")
    assert ran.code == 0, ran.err
    table = [line.split() for line in ran.err.splitlines() if line.split()[:1] in (["3"], ["7"], ["11"])]
    assert [f"{words[1]}/{words[2]}" for words in table] == chosen

    resumed = cli("tune", *SMALL, *options, "--budget", "8.5bpv", "-o", output, "--resume")
    assert resumed.code == 0, resumed.err
    again = json.loads(output.with_suffix(".json").read_text())
    assert [layer["sensitivity"] for layer in again["layers"]] == [layer["sensitivity"] for layer in numbers["layers"]]
    assert {row.type_k for row in read_config(output).layers} == {"q8_0"}  # all that fits
    assert "layer by layer" not in resumed.err  # nothing of it was measured again
    other = cli("tune", *SMALL, *options, "--budget", "5.0bpv", "--rotate", "none", "-o", output, "--resume")
    assert "is of another run: rotate 'kv' then, 'none' now" in one_error(other)


@pytest.mark.parametrize(
    ("goal", "key", "most"),
    [(("--memory", "60KiB", "-c", 512), "kv_bytes", 60 * 1024), (("--max-kld", 1e-3), "kld_mean", 1e-3)],
    ids=["memory", "kld"],
)
def test_other_goals(cli: Cli, gguf: Path, tmp_path: Path, goal: tuple[object, ...], key: str, most: float) -> None:
    output = tmp_path / "kv.toml"
    done = cli("tune", "-m", gguf, *SMALL, *goal, "--types", "f16,q8_0,q4_0,hq2_nl", "--measure", "q4_0", "-o", output)
    assert done.code == 0, done.err
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert 0 < numbers["tuned"][key] <= most or numbers["tuned"]["types"] == ["f16/f16"]
    assert numbers["measured_by_layer"] == ["q4_0"]
    assert len(read_config(output).layers) == 1


def test_newest_tokens_kept_exact_leave_something_to_measure(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "kv.toml"
    exact = ("--kv-tail", 32, "--kv-sink", 4, "--kv-center")
    done = cli(
        "tune",
        *SMALL,
        "--window",
        160,
        *exact,
        "--types",
        "q8_0,hq2_nl",
        "--budget",
        "4bpv",
        "--rounds",
        0,
        "-o",
        output,
    )
    assert done.code == 0, done.err
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert all(layer["sensitivity"]["k"]["hq2_nl"] > 1e-6 for layer in numbers["layers"])
    assert numbers["conditions"]["exact"] == "tail32+sink4+center"
    common = read_config(output).common
    assert (common.tail, common.sink, common.center) == (32, 4, True)


def test_ctrl_c_keeps_what_is_measured(cli: Cli, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "kv.toml"
    options = ("-m", gguf, *SMALL, "--types", "q8_0,q4_0", "--budget", "9bpv", "-o", output)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridkv_lab.tuner.Tuner.solve", stop)
    done = cli("tune", *options)
    assert done.code == 130
    assert "interrupted: the measurements are kept; --resume continues" in done.err
    assert output.with_suffix(".npz").exists()
    assert not output.exists()
    monkeypatch.undo()
    assert "exists\nhint: --resume" in one_error(cli("tune", *options))
    done = cli("tune", *options, "--resume")
    assert done.code == 0, done.err
    assert "layer by layer" not in done.err
    assert output.exists()


BAD: dict[str, tuple[list[object], str]] = {
    "no goal": ([], "a goal is one of --budget, --memory, --max-kld; given: none"),
    "two goals": (["--budget", "5", "--memory", "1GiB"], "given: --budget and --memory"),
    "budget that is none": (["--budget", "five"], "--budget 'five'; allowed: bits per value"),
    "budget of nothing": (["--budget", "0bpv"], "--budget '0bpv'"),
    "absurd budget": (["--budget", "99bpv"], "--budget '99bpv'"),
    "memory": (["--memory", "much"], "--memory 'much'; allowed: a positive number"),
    "divergence": (["--max-kld", "-1"], "--max-kld -1.0; allowed: more than 0"),
    "divergence that is none": (["--max-kld", "nan"], "--max-kld nan; allowed: more than 0"),
    "too small a budget": (
        ["--budget", "2bpv", "--window", "16", "--types", "q8_0,q4_0"],
        "2.0 bits per value is less than the smallest types need: ",
    ),
    "unknown type": (["--budget", "5", "--types", "q9_0"], "unknown KV cache type 'q9_0'"),
    "no types": (["--budget", "5", "--types", ","], "--types is empty"),
    "nothing to measure": (["--budget", "5", "--types", "f16"], "nothing to measure beside f16"),
    "measure": (["--budget", "5", "--measure", "q4_1"], "--measure: not among --types: 'q4_1'; allowed: f16, q8_0"),
    "rotation": (["--budget", "5", "--rotate", "both"], "--rotate 'both'; allowed: none, k, v, kv"),
    "scale": (["--budget", "5", "--kv-scale", "best"], "unknown scale rule 'best'"),
    "center": (["--budget", "5", "--kv-center"], "--kv-center with --kv-tail 0"),
    "mode": (["--budget", "5", "--mode", "both"], "--mode 'both'; allowed: prefill, decode"),
    "window": (["--budget", "5", "--window", "1"], "--window 1; allowed: 2 to"),
    "window of exact rows": (
        ["--budget", "5", "--window", "196", "--kv-tail", "128", "--kv-sink", "4"],
        "allowed: more than 196",
    ),
    "windows": (["--budget", "5", "--verify", "0"], "--verify 0; allowed: 1 to"),
    "rounds": (["--budget", "5", "--rounds", "-1"], "--rounds -1; allowed: 0 to 100"),
    "short text": (["--budget", "5", "-f", TEXT, "--window", "500000"], "2 windows of 500000 need 1000002"),
    "text": (["--budget", "5", "-f", "/nowhere/text.txt"], "No such file or directory"),
    "output's name": (["--budget", "5", "-o", "kv.json"], "-o 'kv.json'; allowed: a file name that ends in .toml"),
    "output's directory": (["--budget", "5", "-o", "/nowhere/kv.toml"], "there is no directory /nowhere"),
    "nothing to resume": (["--budget", "5", "--resume"], "--resume: there is no "),
    "model": (["--budget", "5", "-m", "/nowhere.gguf"], "no model at /nowhere.gguf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli: Cli, gguf: Path, tmp_path: Path, case: str) -> None:
    options, message = BAD[case]
    fixed: list[object] = ["--calibrate", 1, *([] if "--verify" in options else ["--verify", 1])]
    fixed += [] if "-o" in options else ["-o", tmp_path / "kv.toml"]
    fixed += [] if "-m" in options else ["-m", gguf]
    fixed += [] if "-f" in options else ["-f", TEXT]
    assert message in one_error(cli("tune", *fixed, *options)).removeprefix("error: ")
    assert not (tmp_path / "kv.toml").exists()


def test_a_model_without_a_kv_cache(cli: Cli, models: ModelStore, tmp_path: Path) -> None:
    done = cli("tune", "-m", models.mamba2(), *SMALL, "--budget", "5", "-o", tmp_path / "kv.toml")
    assert "has no KV cache, so there is nothing to tune" in one_error(done)


def saved(path: Path, *types: KVTypes) -> Path:
    """A config of the `hybrid` fixture's model."""
    facts = kv_facts(layer_facts(build("qwen3_5_text").config))
    specs = [KVSpec(f, t) for f, t in zip(facts, types, strict=True)]
    path.write_text(format_config(config_of(path.name, "tiny", specs)))
    return path


MIXED = (KVTypes("q8_0", "q4_0", rotate_k=True), KVTypes("hq2_nl", "q5_0", rotate_k=True, rotate_v=True))
RUN = ("--ids", "5,6,7,8", "-n", 2, "--temp", 0, "--kv-guard", "off")


def test_run_prints_the_types_of_each_layer(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    config = saved(tmp_path / "kv.toml", *MIXED)
    done = cli("run", "-m", hybrid, *RUN, "--kv-config", config, "--json")
    assert done.code == 0, done.err
    found = [
        (x["layer"], x["type_k"], x["type_v"], x["rotate_k"], x["rotate_v"]) for x in json.loads(done.out)["layers"]
    ]
    assert found == [(1, "q8_0", "q4_0", True, False), (3, "hq2_nl", "q5_0", True, True)]
    rows = [line.split()[:3] for line in done.err.splitlines() if line.split()[:1] in (["1"], ["3"])]
    assert rows == [["1", "q8_0", "q4_0"], ["3", "hq2_nl", "q5_0"]]


@pytest.mark.parametrize(
    "options",
    [
        ["-ctk", "q8_0"],
        ["-ctv", "f16"],
        ["-khad"],
        ["-vhad"],
        ["-ctk-first", "q8_0,1"],
        ["-ctv-last", "q8_0,1"],
        ["--kv-scale", "refit"],
        ["--kv-tail", "0"],
        ["--kv-sink", "4"],
        ["--kv-center"],
        ["-ctk", "f16", "-vhad"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_pictures")
def test_what_the_file_says_itself_is_not_said_twice(
    cli: Cli, hybrid: Path, tmp_path: Path, options: list[str]
) -> None:
    config = saved(tmp_path / "kv.toml", *MIXED)
    error = one_error(cli("run", "-m", hybrid, *RUN, "--kv-config", config, *options))
    given = ", ".join(word for word in options if word.startswith("-"))
    assert f"--kv-config was given together with {given}, which the file already sets" in error
    assert f"hint: leave {given} out" in error


def test_a_file_of_another_model(cli: Cli, hybrid: Path, gguf: Path, tmp_path: Path) -> None:
    config = saved(tmp_path / "kv.toml", *MIXED)
    for command in (["run", *RUN], ["plan"], ["eval", "-c", 32, "-o", tmp_path / "x.jsonl"]):
        error = one_error(cli(*command, "-m", gguf, "--kv-config", config))
        assert "kv.toml has types for 2 KV layers (it was made for tiny); this model has 1" in error
    config.write_text("nothing")
    assert "is not TOML" in one_error(cli("run", "-m", hybrid, *RUN, "--kv-config", config))
    assert "No such file" in one_error(cli("plan", "-m", hybrid, "--kv-config", tmp_path / "none.toml"))


def test_plan_counts_it(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    config = saved(tmp_path / "kv.toml", *MIXED)
    done = cli("plan", "-m", hybrid, "-c", 4096, "--types", "q8_0", "--kv-config", config, "--json")
    assert done.code == 0, done.err
    uniform, mixed = json.loads(done.out)["plans"]
    assert (uniform["config"], mixed["config"]) == (None, "kv.toml")
    facts = kv_facts(layer_facts(build("qwen3_5_text").config))
    per_token = sum(KVSpec(f, t).bytes_per_token for f, t in zip(facts, MIXED, strict=True))
    assert mixed["bytes_per_token"] == per_token
    assert mixed["kv_bytes"] == 4096 * per_token
    assert "kv.toml" in cli("plan", "-m", hybrid, "-c", 4096, "--kv-config", config).out


@pytest.mark.usefixtures("no_pictures")
def test_eval_takes_it_as_a_candidate(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "kv.toml"
    assert cli("tune", "-m", gguf, *SMALL, "--types", "q8_0,q4_0", "--budget", 9, "-o", tuned).code == 0
    output = tmp_path / "run.jsonl"
    options = ("-f", TEXT, "-c", 64, "-n", 0, "-t", 1, "--types", "q8_0+kv", "--kv-config", tuned)
    done = cli("eval", "-m", gguf, *options, "-o", output)
    assert done.code == 0, done.err
    found = {r.label: r for r in read_jsonl(output)[1]}
    assert found["kv.toml"].config == "kv.toml"
    assert found["kv.toml"].kld_mean == found["q8_0+kv"].kld_mean > 0  # 9 bits are enough for q8_0 everywhere
    assert found["kv.toml"].bits_per_value == 8.5


def test_classify_takes_it(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "kv.toml"
    assert cli("tune", "-m", gguf, *SMALL, "--types", "q8_0,q4_0", "--budget", 9, "-o", tuned).code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n{"text": "bad"}\n')
    options = ("-m", gguf, "-f", rows, "--labels", "yes,no", "-t", 1, "--json")
    lines = [cli("classify", *options, *more).out.splitlines() for more in ((), ("--kv-config", tuned))]
    plain, packed = (json.loads(found[-1])["summary"] for found in lines)
    assert (plain["type"], packed["type"]) == ("f16", "kv.toml")
    assert packed["bytes_per_token"] < plain["bytes_per_token"]


class TestInTransformers:
    def logits(self, **options: Any) -> torch.Tensor:
        model = build("qwen3_5_text", attention="hybridkv")
        ids = torch.arange(5, 45).unsqueeze(0)
        with torch.inference_mode():
            found: torch.Tensor = model(ids, **remembering(quantized_cache(model, guard="off", **options))).logits
        return found

    def test_the_file_is_what_it_says(self, tmp_path: Path) -> None:
        same = KVTypes("q4_0", "q8_0", rotate_k=True)
        config = saved(tmp_path / "a.toml", same, same)
        expected = self.logits(type_k="q4_0", type_v="q8_0", rotate_k=True)
        assert torch.equal(self.logits(config=config), expected)
        assert not torch.equal(self.logits(config=saved(tmp_path / "b.toml", *MIXED)), expected)

    def test_a_change_in_the_file_changes_the_numbers(self, tmp_path: Path) -> None:
        config = saved(tmp_path / "a.toml", *MIXED)
        text = config.read_text()
        before = self.logits(config=str(config))
        for old, new in (
            ('"q8_0"', '"q6_0"'),
            ('"q5_0"', '"q4_1"'),
            ("rotate_v = false", "rotate_v = true"),
            ('scale = "auto"', 'scale = "absmax"'),
            ("tail = 0", "tail = 8"),
            ("sink = 0", "sink = 4"),
        ):
            assert old in text
            config.write_text(text.replace(old, new))
            assert not torch.equal(self.logits(config=config), before), new

    def test_together_with_what_it_says_itself(self, tmp_path: Path) -> None:
        config = saved(tmp_path / "a.toml", *MIXED)
        for option in ({"type_k": "q8_0"}, {"rotate_v": False}, {"tail": 0}, {"scale": "refit"}, {"k_first": "q8_0,1"}):
            with pytest.raises(UsageError, match=f"config was given together with {next(iter(option))}"):
                self.logits(config=config, **option)
