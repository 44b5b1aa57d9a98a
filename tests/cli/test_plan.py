"""`hybridkv plan`: the figures that people choose a cache type by."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from hybridkv.cli import model_options, run
from hybridkv.cli.show import size
from hybridkv.engine.load import bundled_model
from hybridkv.engine.placed import CONTEXT_BYTES
from hybridkv.errors import UsageError
from hybridkv.formats import FORMATS
from hybridkv.model import facts
from hybridkv.placement import BESIDE_BYTES
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore
from tests.gguf.test_bad_metadata import copied
from tests.gguf.write_qwen35 import Draft, draft, tiny_model
from tests.thin import every_other

QWEN35_35B = Path(__file__).parents[1] / "data" / "qwen3.5-35b-a3b" / "config.json"
MIB = 2**20
EIGHTY = ("--memory", "80GiB", "--dtype", "bf16", "--device", "cuda")


def plans(cli: Cli, *options: object) -> dict[tuple[str, str], dict[str, Any]]:
    """What is planned for a CUDA device and bf16 weights, unless the options say otherwise."""
    card = [] if "--dtype" in options or "--device" in options else ["--dtype", "bf16", "--device", "cuda"]
    done = cli("plan", "--json", *card, *options)
    assert done.code == 0, done.err
    return {(row["type_k"], row["type_v"]): row for row in json.loads(done.out)["plans"]}


def test_the_35b_model_at_131072_tokens(cli: Cli) -> None:
    """From the config alone: 10 layers x 2 heads x 256 x (K and V) x 4 bits x 131072 tokens = 640 MiB."""
    start = time.monotonic()
    rows = plans(cli, "-m", QWEN35_35B, "-c", 131072)
    assert time.monotonic() - start < 30
    assert rows["q8_0", "q8_0"]["kv_bytes"] - rows["q4_0", "q4_0"]["kv_bytes"] == 640 * MIB
    assert rows["f16", "f16"]["kv_bytes"] == 10 * 2 * 256 * 2 * 2 * 131072
    # 30 layers: 32 heads of 128 x 128 in float32, and 4 inputs of 2 x 2048 + 4096 channels in bfloat16
    assert rows["f16", "f16"]["state_bytes"] == 30 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    assert 34e9 < rows["f16", "f16"]["weight_bytes"] / 2 < 36e9


def test_the_table_that_a_person_reads(cli: Cli) -> None:
    done = cli("plan", "-m", QWEN35_35B.parent, "-c", 131072, "--types", "q8_0,q4_0,q8_0/q4_0", *EIGHTY)
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == (
        "qwen3.5-35b-a3b: 40 layers, 10 with a KV cache, 30 with a recurrent state; 1 sequence of 131072 tokens"
    )
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.strip().startswith("q")][1:]
    assert [row[:4] for row in rows] == [
        ["q8_0", "q8_0", "10880", "1.33 GiB"],
        ["q4_0", "q4_0", "5760", "720.0 MiB"],
        ["q8_0", "q4_0", "8320", "1.02 GiB"],
    ]
    assert all(re.fullmatch(r"\d+ tokens", row[-1]) for row in rows)
    assert "largest context in 80GiB" in done.out


@pytest.mark.parametrize(("model", "n_seqs"), every_other((None, QWEN35_35B), (1, 3)))
def test_the_largest_context_fits_and_one_token_more_does_not(cli: Cli, model: Path | None, n_seqs: int) -> None:
    base = ["-np", n_seqs, *([] if model is None else ["-m", model])]
    memory = 80 * 2**30 if model else 100 * MIB
    most = {pair: row["largest_n_ctx"] for pair, row in plans(cli, *base, "--memory", memory).items()}
    assert len(set(most.values())) == len(most) == 5
    for (k, v), n_ctx in most.items():
        for tokens, fits in ((n_ctx, True), (n_ctx + 1, False)):
            row = plans(cli, *base, "--memory", memory, "-c", tokens, "--types", f"{k}/{v}")[k, v]
            assert row["fits"] is fits
            assert (row["total_bytes"] <= memory) is fits


def test_all_pairs_and_sequences(cli: Cli) -> None:
    one, four = plans(cli, "--types", "all", "-c", 1000), plans(cli, "--types", "all", "-c", 1000, "-np", 4)
    assert list(one) == [(k, v) for k in FORMATS for v in FORMATS]
    for pair, row in one.items():
        assert row["kv_bytes"] == 1000 * row["bytes_per_token"]
        assert four[pair]["kv_bytes"] == 4 * row["kv_bytes"]
        assert four[pair]["state_bytes"] == 4 * row["state_bytes"]
        assert four[pair]["weight_bytes"] == row["weight_bytes"]
        assert row["total_bytes"] == row["kv_bytes"] + row["state_bytes"] + row["weight_bytes"]


def test_weights_follow_the_dtype_and_are_read_by_nobody(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    f32, bf16 = (
        plans(cli, "--device", "cuda", "--dtype", dtype)["f16", "f16"]["weight_bytes"] for dtype in ("f32", "bf16")
    )
    assert f32 == 2 * bf16
    assert 28e6 < bf16 / 2 < 30e6
    header = tmp_path / "config.json"
    header.write_text(QWEN35_35B.read_text())
    assert plans(cli, "-m", header, "-c", 10) == plans(cli, "-m", QWEN35_35B, "-c", 10)


def test_too_little_memory_and_none_needed(cli: Cli, models: ModelStore) -> None:
    done = cli("plan", "--memory", "1KiB")
    assert done.code == 0
    assert done.out.count("does not fit") == 5
    linear = models.family("qwen3_5_text", layer_types=["linear_attention"] * 4)
    done = cli("plan", "-m", linear, "--memory", "1GiB")
    assert done.out.count("no limit") == 5


def test_what_cannot_run_is_left_out_and_said(cli: Cli, models: ModelStore) -> None:
    model = models.family("qwen3_5_text", head_dim=20)
    done = cli("plan", "-m", model, "--types", "f16,q4_0")
    assert [line.split()[0] for line in done.out.splitlines() if "iB" in line][1:] == ["f16"]
    assert done.err == "note: left out, no kernel: q4_0 needs a head dim that is a multiple of 16, not 20\n"
    assert (
        plans(cli, "-m", model)["q8_0", "q8_0"]["refused"] == "q8_0 needs a head dim that is a multiple of 16, not 20"
    )


def test_the_default_is_what_run_holds(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file has them, and the bundled one is q8_0; on a GPU rows are filled up to whole units of 256."""
    for has_gpu, device, dtype, held in (
        (False, "cpu", "auto", "29.5 MiB q8_0"),
        (True, "cuda", "auto", "36.8 MiB q8_0"),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (24 << 30, 24 << 30))
        planned = cli("plan", "--types", "q8_0").out
        assert f"weights on {device}: {held}" in planned
        assert cli("plan", "--types", "q8_0", "--dtype", dtype, "--device", device).out == planned
    said = cli("run", "--ids", 1, "-n", 1, "--device", "cpu").err
    assert "weights: 29.5 MiB q8_0 + 192.3 KiB f32 (vectors)\n" in said


def mixed_experts(folder: Path) -> tuple[Path, Draft]:
    """A file whose experts' gates and what they gate are of two types, which no packed kernel reads."""
    file = copied("qwen35moe")
    q8_0, q4_0 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
    return file.write(folder / "mixed.gguf", lambda name: q4_0 if "ffn_up_exps" in name else q8_0), file


def test_what_a_card_expands_is_said(cli: Cli, tmp_path: Path) -> None:
    """By the planner and by `run`, with what it costs; nobody is told what he asked for."""
    model, file = mixed_experts(tmp_path)
    matrices = {name: v for name, v in file.tensors.items() if v.ndim > 1 and "conv1d" not in name}
    n_q4 = sum("ffn_up_exps" in name for name in matrices)
    n_values = sum(v.size for v in matrices.values())
    in_file = sum(v.size // 32 * (18 if "ffn_up_exps" in name else 34) for name, v in matrices.items())
    base = ("plan", "-m", model, "-c", 100, "--types", "f16")
    said = cli(*base, "--device", "cuda").err
    assert f"note: on cuda {len(matrices)} quantized tensors (" in said
    assert f"q4_0 {n_q4}" in said
    assert (
        f"are expanded to bf16: {size(2 * n_values)} instead of {size(in_file)} in the file; reason: experts whose"
        in said
    )
    answer = json.loads(cli(*base, "--device", "cuda", "--json").out)
    assert answer["expanded"]["counts"] == {"q8_0": len(matrices) - n_q4, "q4_0": n_q4}
    assert (answer["expanded"]["file_bytes"], answer["expanded"]["held_bytes"]) == (in_file, 2 * n_values)
    for options in (("--device", "cpu"), ("--device", "cuda", "--weights", "bf16"), ("--backend", "eager")):
        assert "expanded" not in cli(*base, *options).err


def test_run_says_it_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = mixed_experts(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = argparse.ArgumentParser()
    run.add_arguments(arguments)
    cli_options = arguments.parse_args(["-m", str(model), "--device", "cuda", "--backend", "auto"])
    said: list[str] = []
    monkeypatch.setattr(model_options, "notice", said.append)
    model_options.open_model(cli_options)
    assert [line for line in said if "are expanded to bf16: " in line]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_experts_are_promised_what_run_holds(cli: Cli, models: ModelStore, backend: str) -> None:
    """`--weights` reaches them under the native backend; under the eager one both commands say float32."""
    model = models.family("qwen3_5_moe_text")
    for dtype, weights in (("auto", "auto"), ("q8_0", "int8"), ("q4_0", "int4"), ("bf16", "bf16")):
        options = ("-m", model, "--backend", backend, "--device", "cpu")
        planned = cli("plan", *options, "--dtype", dtype, "-c", 100)
        done = cli("run", *options, "--ids", 1, "-n", 1, "--weights", weights)
        (said,) = (line.removeprefix("weights: ") for line in done.err.splitlines() if line.startswith("weights: "))
        (promised,) = (line for line in planned.out.splitlines() if line.startswith("weights on cpu: "))
        assert promised.removeprefix("weights on cpu: ").split(";")[0] == said
        held = {"auto": "f32", "int8": "q8_0", "int4": "q4_0"}.get(weights, weights)
        if backend == "auto":
            assert re.match(rf"\d+\.\d KiB {held}( \+|$)", said), said
            assert "(experts)" not in said
            assert re.search(rf"backend: +native-\w+, weights {held}", done.err)
            assert "of experts are held as f32" not in done.err
        else:
            assert "KiB f32 (experts) + " in said
            expected = "backend: +eager\n" if weights == "auto" else r"backend: +eager, weights f32 \(experts\) \+ "
            assert re.search(expected, done.err)
            assert ("of experts are held as f32, regardless of --weights" in done.err) == (weights != "auto")


def test_runs_option_line_is_planned_as_it_stands(cli: Cli) -> None:
    line = "-c 4096 -ctk q8_0 -ctv q4_0 --kv-tail 128 -khad -vhad -t 2 -p hello -n 10 --temp 0 --top-k 4 -np 2"
    line += " --ignore-eos"
    done = cli("plan", *line.split())
    assert done.code == 0
    assert done.err == "note: no effect on a plan: -t, -p, -n, --temp, --top-k, --ignore-eos, -khad, -vhad\n"
    (row,) = [line.split() for line in done.out.splitlines() if " MiB" in line and line.strip().startswith("q")]
    assert row[:2] == ["q8_0", "q4_0"]
    ran = cli("run", *line.replace("-np 2", "-np 1").split())
    assert ran.code == 0
    (memory,) = [line for line in ran.err.splitlines() if line.startswith("memory:")]
    one = plans(cli, *line.replace("-np 2", "-np 1").split(), "--device", "cpu")["q8_0", "q4_0"]
    assert f"of {one['kv_bytes'] / 2**20:.1f} MiB, states {one['state_bytes'] / 2**20:.1f} MiB" in memory


def test_what_else_run_takes(cli: Cli, tmp_path: Path) -> None:
    """Options with a value that may be left out, with none, and those that both commands have."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello")
    done = cli("plan", "-fa", "-f", prompt, "--chat", "--graph", "on", "-s", 7, "--json", "--session", tmp_path / "s")
    assert done.code == 0
    assert len(json.loads(done.out)["plans"]) == 5
    said = done.err.splitlines()
    assert said[0] == "note: no effect on a plan: -fa, -f, --chat, --graph, -s, --session"
    assert said[1] == "note: counted for the 32768 tokens of training; `run` without -c takes 4096"
    assert cli("plan", "-fa", "on", "-p=-x", "-c", 10).err == "note: no effect on a plan: -fa, -p\n"
    typed = cli("plan", "--no-mmap", "--mlock", "--activations", "int8", "--threads", 2, "-c", 10)
    assert typed.err == "note: no effect on a plan: --no-mmap, --mlock, --activations, --threads\n"
    assert "unknown option '-zzz'" in cli("plan", "-zzz").err


def test_what_changes_the_model_changes_the_plan(cli: Cli, gguf: Path) -> None:
    def planned(*options: object) -> int:
        done = cli("plan", "-m", gguf, "--json", *options)
        assert done.code == 0, done.err
        assert "no effect" not in done.err
        return int(json.loads(done.out)["n_ctx"])

    assert planned() == 512
    assert planned("--rope-scale", 4) == 2048
    assert planned("--rope-freq-scale", 0.5) == 1024
    assert planned("--rope-scaling", "yarn", "--rope-scale", 4, "--yarn-orig-ctx", 256) == 1024
    assert planned("--override-kv", "qwen35.context_length=int:64") == 64
    assert planned("--rope-scale", 4, "-c", 1500) == 1500
    long = cli("plan", "-m", gguf, "-c", 1500)
    assert "note: -c 1500 is more than the 512 tokens that the model was trained for" in long.err
    assert "note: -c" not in cli("plan", "-m", gguf, "-c", 1500, "--rope-scale", 4).err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rope-scaling", "su"], "error: --rope-scaling 'su'; allowed: none, linear, yarn"),
        (["--rope-scale", "-2"], "error: --rope-scale -2; allowed: more than 0"),
        (["--override-kv", "x"], "error: --override-kv 'x'; allowed: KEY=TYPE:VALUE"),
        (["--yarn-ext-factor", "0.5", "--rope-scaling", "yarn", "--rope-scale", "2"], "yarn_ext_factor' is 0.5"),
    ],
)
def test_changes_that_run_refuses_are_refused(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    for command in (["plan"], ["run", "-p", "the"]):
        done = cli(*command, "-m", gguf, *argv)
        assert (done.code, said in done.err) == (2, True), done.err


def test_types_per_layer_and_the_guards_rule_are_planned(cli: Cli) -> None:
    done = cli("plan", "-c", 4096, "-ctk", "q4_0", "-ctv", "q8_0", "-ctk-first", "f16,1", "--device", "cpu")
    assert [line.split()[:2] for line in done.out.splitlines() if "MiB" in line][-1] == ["f16+q4_0", "q8_0"]
    raised = cli("plan", "-c", 4096, "-ctk", "q4_0", "-ctv", "q4_0", "--kv-guard", "upgrade", "--device", "cpu")
    assert [line.split()[:2] for line in raised.out.splitlines() if "MiB" in line][-1] == ["q8_0", "q8_0"]
    assert "warning: KV layers 3, 7, 11 upgraded from q4_0 to q8_0" in raised.err


def test_guesses_are_counted(cli: Cli) -> None:
    """States once more, and a draft model; they fit where `fits` says so."""
    line = ("plan", "-c", 4096, "--types", "q8_0", "--device", "cpu")
    table = cli(*line).out
    assert re.search(r"weights on cpu: .*; for guessed tokens, beside the total: states once more 2\.4 MiB\n", table)
    assert "guessed" not in cli(*line, "--spec", "off").out
    draft = cli(*line, "-md", bundled_model(), "-np", 2).out
    assert "states once more 4.8 MiB, caches of what guesses 57.6 MiB, a draft model 29.7 MiB\n" in draft
    found = json.loads(cli(*line, "--json").out)
    total = found["plans"][0]["total_bytes"] + found["guess_bytes"]
    for budget, fits in ((total, True), (total - 1, False)):
        (plan,) = json.loads(cli(*line, "--json", "--memory", budget).out)["plans"]
        assert (plan["fits"], plan["largest_n_ctx"] >= 4096) == (fits, fits)


def test_the_same_weights_by_two_names(cli: Cli) -> None:
    assert cli("plan", "--weights", "int4").out == cli("plan", "--dtype", "q4_0").out
    assert cli("plan", "--weights", "int4", "--dtype", "q4_0").code == 0
    done = cli("plan", "--weights", "int4", "--dtype", "q8_0")
    assert (done.code, "--dtype q8_0 and --weights int4 were given together" in done.err) == (2, True)
    for wrong in (("--weights", "int3"), ("--device", "tpu"), ("--backend", "fast"), ("--tp", 2, "--dtype", "q8_0")):
        assert cli("plan", *wrong).code == 2


def test_plain_weights_are_transformers_own(cli: Cli) -> None:
    """So that its forward pass runs them: once, whatever the file has."""
    planned = cli("plan", "--weights", "plain", "--device", "cpu").out
    done = cli("run", "--weights", "plain", "--ids", 1, "-n", 1, "--device", "cpu").err
    assert "weights on cpu: 111.3 MiB f32\n" in planned
    assert "weights: 111.3 MiB f32\n" in done
    assert re.search(r"backend: +eager\n", done)
    eager = cli("plan", "--backend", "eager", "--device", "cpu").out
    assert "weights on cpu: 111.3 MiB f32\n" in eager
    assert cli("plan", "--engine", "eager", "--device", "cpu").out == eager  # its older name


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_native_engine_takes_no_plain_weights(cli: Cli, command: str) -> None:
    ids = ("--ids", 1) if command == "run" else ()
    done = cli(command, "--weights", "plain", "--backend", "native", "--device", "cpu", *ids)
    assert done.code == 2
    assert "error: --weights plain with --backend native; allowed: auto, f32, bf16, int8, int4\nhint: " in done.err


def test_states_of_unknown_shape_are_said(cli: Cli, models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(facts.STATE_SHAPES, "mamba2")
    done = cli("plan", "-m", models.mamba2(), "-c", 100)
    assert done.code == 0
    assert done.err == "note: the state shapes of 'mamba2' are not known: states are not counted\n"


def test_names_from_files_are_text_and_nothing_else(cli: Cli, tmp_path: Path) -> None:
    """No markup, no emoji codes, no terminal escapes."""
    file = draft(tiny_model())
    file.keys["general.name"] = "[/x] :smile: \x1b[31m"
    model = file.write(tmp_path / "odd.gguf")
    for done in (cli("plan", "-m", model), cli("run", "-m", model, "--ids", 1, "-n", 1)):
        assert done.code == 0
        assert (done.err or done.out).startswith("[/x] :smile: ?[31m: 4 layers")


def test_no_number_is_cut_on_a_narrow_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = cli("plan", "-m", QWEN35_35B, "-c", 131072, "--memory", "80GiB")
    assert "…" not in done.out
    assert len({len(line) for line in done.out.splitlines()[2:]}) == 1


def test_exact_rows_are_counted(cli: Cli) -> None:
    base = ("-m", QWEN35_35B, "-c", 131072, "--types", "f16,q4_0")
    plain = plans(cli, *base)
    for options, packed, exact, center in (
        (("--kv-tail", 128), 131072 - 128, 128 + 32 + 32, 0),
        (("--kv-sink", 4), 131072 - 4, 4, 0),
        (("--kv-tail", 128, "--kv-sink", 4, "--kv-center"), 131072 - 132, 132 + 32 + 32, 10 * 2 * 256 * 4),
    ):
        rows = plans(cli, *base, *options)
        assert rows["f16", "f16"] == plain["f16", "f16"]
        assert rows["q4_0", "q4_0"]["kv_bytes"] == packed * 5760 + exact * 20480 + center


def test_exact_rows_without_effect_are_said(cli: Cli) -> None:
    base = ("plan", "-m", QWEN35_35B, "--kv-tail", 128)
    assert cli(*base, "--types", "f16,q4_0").err == ""  # of f16 among others it goes without saying
    assert cli(*base, "--types", "f16").err == "note: --kv-tail 128 has no effect: no layer's K or V is quantized\n"
    assert "all 100 tokens of the context stay f16" in cli(*base, "-c", 100).err
    refused = cli("plan", "-m", QWEN35_35B, "--kv-center")
    assert refused.code == 2
    assert "--kv-center with --kv-tail 0; allowed: a tail of at least 32 tokens" in refused.err


def sections(text: str) -> dict[str, list[str]]:
    """The lines of the placement table by their first cell."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.split("on the card with", 1)[1].splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 2}


def test_all_of_a_model_on_a_card(cli: Cli) -> None:
    """The bundled model: its weights, KV rows and states are those of the plan, to the byte."""
    base = ("plan", "--device", "cuda", "--types", "q8_0", "-c", 1000, "--memory", "8GiB")
    row = json.loads(cli(*base, "--json").out)["plans"][0]
    assert row["placement"]["host_bytes"] == 0
    assert row["placement"]["free_bytes"] == 8 * 2**30
    assert row["placement"]["card_bytes"] == row["total_bytes"] + BESIDE_BYTES
    assert row["placement"]["parts"]["KV"]["card_bytes"] == row["kv_bytes"]
    done = cli(*base)
    assert "\non the card with KV q8_0, 8.00 GiB free: all of it\n" in done.out
    assert sections(done.out)["KV"] == [size(row["kv_bytes"]), "3", "-", "-"]
    assert done.err == ""
    assert "does not fit; " in cli(*base[:-1], "400MiB").out
    assert "on the card" not in cli("plan", "--device", "cuda", "--types", "q8_0").out  # nobody says how large it is


def test_an_embedding_in_main_memory(cli: Cli, tmp_path: Path) -> None:
    """As a pattern says; the first one decides."""
    model = copied("qwen35moe").write(tmp_path / "experts.gguf", lambda _: GGMLQuantizationType.Q8_0)
    base = ("plan", "-m", model, "--device", "cuda", "--types", "q8_0", "-c", 100)
    done = cli(*base, "-ot", "token_embd=CPU")
    assert "\non the card with KV q8_0: as -ot say\n" in done.out
    assert sections(done.out)["embedding"][:2] == ["-", "-"]
    parts = json.loads(cli(*base, "-ot", "token_embd=CUDA0,token=CPU", "--json").out)["plans"][0]["placement"]["parts"]
    assert parts["embedding"]["host_bytes"] == 0
    assert done.err == ""
    assert cli(*base, "-ngl", "all").err == ""


def test_splits_that_are_refused(cli: Cli) -> None:
    for options, said in (
        (("-ngl", "few"), "-ngl 'few'; allowed: 0 or more layers, all, auto\nhint: this model has 12"),
        (("-ngl", 5), "-ngl 5: 8 whole layers would be in main memory, with their KV rows and states; allowed on a"),
        (("-ngl", 0), "-ngl 0: 12 whole layers would be in main memory"),
        (("-ot", "nothing=CPU"), "-ot 'nothing': no tensor of this model has such a name\nhint: names are like blk.0."),
        (("-ot", "attn_q.weight=CPU"), "-ot: blk.11.attn_q.weight would be in main memory, and 2 more tensors"),
        (("-ot", "token_embd=CPU"), "-ot: token_embd.weight would be in main memory; allowed there: routed"),
        (("-ot", "exps"), "-ot 'exps'; allowed: REGEX=CPU or REGEX=CUDA0"),
        (("-ncmoe", -1), "-ncmoe -1; allowed: 0 or more layers"),
        (("-cmoe", "--weights", "bf16"), "-cmoe: packed weights are those of a GGUF file"),
    ):
        done = cli("plan", "--device", "cuda", "--types", "q8_0", *options)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    done = cli("plan", "--device", "cpu", "-ngl", 3, "-cmoe", "--types", "q8_0", "--device-memory", "1GiB")
    assert done.err == "note: -ngl, -cmoe, --device-memory: no effect on cpu\n"
    assert "--device-memory 'some'" in cli("plan", "--device", "cpu", "--device-memory", "some").err


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A card of 24 GiB that is never reached, and the share of it that torch is kept within."""
    found: dict[str, float] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (20 << 30, 24 << 30))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share, _: found.setdefault("share", share))
    return found


def test_run_refuses_what_does_not_run(cli: Cli, card: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; what asks for the whole card, or for nothing, passes."""
    base = ("run", "--ids", 3, "-n", 1, "--device", "cuda")
    for options, said in (
        (("-ngl", 5), "-ngl 5: 8 whole layers would be in main memory"),
        (("-ot", "attn=CPU"), "-ot: blk.0.attn_norm.weight would be in main memory"),
        (("-ot", "_exps=CPU"), "-ot '_exps': no tensor of this model has such a name"),
        (("--n-cpu-moe", -1), "-ncmoe -1; allowed: 0 or more layers"),
        (("--no-kv-offload",), "--no-kv-offload on cuda: KV rows lie where their layer does"),
        (("--cpu-moe", "--weights", "bf16"), "-cmoe: packed weights are those of a GGUF file, as they are"),
        (("--cpu-moe", "--weights", "int8"), "-cmoe: weights that --weights int8 converts are all on the card"),
        (("--device-memory", "700MiB"), "not enough memory on the card: the least that a run needs there takes"),
    ):
        done = cli(*base, *options)
        assert done.code == 2, options
        assert f"error: {said}" in done.err
    assert "recurrent" in done.err
    assert "GiB, and 0.18 GiB are free" in done.err
    assert "hint: --device cpu keeps everything in main memory" in done.err
    assert cli("run", "--ids", 3, "-n", 1, "--device", "cpu", "-ngl", 5).code == 0
    assert card == {}


def test_what_a_run_keeps_in_main_memory(
    cli: Cli, card: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As options say, or as fits; the table is printed, torch kept within the cap, and the loader told."""
    told: list[frozenset[str]] = []

    def load(*_: object, hosted: frozenset[str], **__: object) -> None:
        told.append(hosted)
        raise UsageError("loading")

    monkeypatch.setattr("hybridkv.engine.load.load", load)
    monkeypatch.setattr("hybridkv.cli.model_options.compile_ahead", lambda *_: None)  # that starts a process
    model = copied("qwen35moe").write(tmp_path / "experts.gguf", lambda _: GGMLQuantizationType.Q8_0)
    base = ("run", "-m", model, "--ids", 3, "-n", 1, "--device", "cuda", "-c", 100)
    done = cli(*base, "--n-cpu-moe", 2)
    assert "loading" in done.err
    assert sections(done.err)["routed experts"][1::2] == ["2", "2"]
    assert told.pop() == {f"blk.{i}.ffn_{part}_exps.weight" for i in (0, 1) for part in ("gate", "up", "down")}
    assert "on the card" not in cli(*base).err
    assert told.pop() == frozenset()
    assert card == {}
    monkeypatch.setattr("hybridkv.placement.SPLIT_BYTES", 0)  # a model this small is not worth them
    plan = json.loads(cli("plan", *base[1:], "--types", "f16", "--cpu-moe", "--json").out)["plans"][0]["placement"]
    cap = plan["card_bytes"] + CONTEXT_BYTES
    done = cli(*base, "--device-memory", cap)
    assert "as with --n-cpu-moe 4" in done.err
    assert len(told.pop()) == 13  # experts of four layers, and the embedding
    assert card == {"share": pytest.approx((cap - CONTEXT_BYTES) / (24 << 30))}
    done = cli(*base, "--device-memory", cap, "--n-cpu-moe", 1)
    assert done.code == 2
    assert "what -ncmoe put there takes" in done.err
    assert "hint: --n-cpu-moe 4 fits, and is what is chosen without these options" in done.err


def test_routed_experts_of_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied("qwen35moe").write(tmp_path / "experts.gguf", lambda _: GGMLQuantizationType.Q8_0)
    base = ("plan", "-m", model, "--device", "cuda", "--types", "f16", "-c", 100)
    parts = json.loads(cli(*base, "--n-cpu-moe", 3, "--json").out)["plans"][0]["placement"]["parts"]
    assert parts["routed experts"]["host_layers"] == 3
    assert parts["shared experts"]["host_bytes"] == 0
    monkeypatch.setattr("hybridkv.placement.SPLIT_BYTES", 0)  # a model this small is not worth them
    moved = json.loads(cli(*base, "--n-cpu-moe", 3, "--json").out)["plans"][0]["placement"]
    found = json.loads(cli(*base, "--memory", moved["card_bytes"], "--json").out)["plans"][0]["placement"]
    assert found["n_cpu_moe"] in (2, 3)  # the embedding gives way first
    assert found["card_bytes"] <= moved["card_bytes"]
    assert "does not fit; " in cli(*base, "--memory", "300MiB").out
