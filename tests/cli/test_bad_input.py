"""Bad input: one clear error, exit code 2, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridkv.cli.added import GROUP, LAB
from hybridkv.cli.main import main
from hybridkv.formats import FORMATS
from tests.cli.conftest import Cli, Outcome
from tests.cli.models import ModelStore, with_config, with_weights
from tests.gguf.raw import gguf as gguf_bytes
from tests.gguf.raw import tensor
from tests.gguf.write_qwen35 import Draft
from tests.with_lab import WITH_LAB


def one_error(done: Outcome) -> str:
    """The message, with its reasons and hint, after checking that it is all there is."""
    assert done.code == 2, (done.out, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1
    message = done.err[done.err.index("error: ") :]
    assert message.splitlines()[0] != "error: "
    assert "hint: None" not in message
    return message


COMMANDS = "run, chat, serve, classify, plan, convert, models, doctor" + ", eval, tune, report, bench" * WITH_LAB
USAGE: dict[str, tuple[list[object], str]] = {
    "no command": (
        [],
        f"no command was given; allowed: {COMMANDS}",
    ),
    "mistyped command": (
        ["rnu", "-p", "x"],
        f"unknown command 'rnu'; allowed: {COMMANDS}\nhint: did you mean 'run'",
    ),
    "command of ollama's": (["pull", "qwen3"], "unknown command 'pull'; allowed: .*\nhint: -hf OWNER/NAME downloads"),
    "prompt without command": (["-p", "x"], "unknown command .-p.*\nhint: try hybridkv run -p"),
    "another program's name": (
        ["llama-server", "-m", "x"],
        "unknown command.*\nhint: `hybridkv serve` is llama-server",
    ),
    "perplexity": (["perplexity", "-f", "x"], "unknown command.*\nhint: `hybridkv eval -m MODEL -f TEXT` measures"),
    "prompt without option": (
        ["run", "Hello"],
        'unrecognized arguments: Hello\nhint: a prompt needs its option: -p "Hello"; a model needs -m',
    ),
    "as ollama has it": (
        ["run", "llama3.2", "Why is the sky blue?"],
        "unrecognized arguments: llama3.2 Why is the sky blue\\?\n"
        'hint: a model and a prompt need their options: -m llama3.2 --chat -p "Why is the sky blue\\?"',
    ),
    "model without option": (
        ["run", "qwen3:0.6b"],
        "unrecognized arguments: qwen3:0.6b\nhint: a model needs its option: -m qwen3:0.6b; `hybridkv chat` talks",
    ),
    "model without option, prompt with": (["run", "q", "-p", "x"], "unrec.*\nhint: a model needs its option: -m q"),
    "model of a server": (["serve", "m"], "unrec.*\nhint: a model needs its option: -m m"),
    "prompt behind a model": (["run", "-m", "q", "a b"], 'unrec.*\nhint: a prompt needs its option: -p "a b"'),
    "option of ollama's": (["run", "--think=high", "-p", "x"], "unknown option '--think'\nhint: --reasoning on"),
    "ollama's JSON": (["run", "--format", "json", "-p", "x"], "unknown option '--format'\nhint: -j '\\{\\}' asks"),
    "mistyped option": (["run", "-ctkfirst", "q8_0,1"], "unknown option '-ctkfirst'\nhint: did you mean '-ctk-first'"),
    "option of another program": (["run", "-zzz", "99"], "unknown option '-zzz'\nhint: .*--help"),
    "option without value": (["run", "-p"], "-p/--prompt: expected one argument\nhint: .*equals sign"),
    "no prompt": (["run"], "no prompt was given; allowed: one of -p TEXT, -f FILE, --ids"),
    "two prompts": (["run", "-p", "x", "--ids", "1"], "-p and --ids were given together"),
    "chat of ids": (["run", "--ids", "1", "--chat"], "--chat and --ids were given together"),
    "empty prompt": (["run", "-p", ""], "-p: the prompt is empty\nhint: "),
    "empty ids": (["run", "--ids", ","], "--ids: the prompt is empty"),
    "ids that are words": (["run", "--ids", "1,x"], "--ids '1,x'; allowed: token ids, separated by commas"),
    "ids that look like digits": (["run", "--ids", "²"], "--ids '²'; allowed: token ids"),
    "ids of thousands of digits": (["run", "--ids", "9" * 5000], "allowed: token ids"),
    "prompt that is not UTF-8": (["run", "-p", "a\udcff"], r"-p: not UTF-8 text \(character 1\)"),
    "no tokens to predict": (["run", "-p", "x", "-n", 0], "-n 0; allowed: 1 or more, or -1 .*\nhint: try -n 64"),
    "negative count": (["run", "-p", "x", "-n", -3], "-n -3; allowed: 1 or more"),
    "count that is a word": (
        ["run", "-p", "x", "-n", "many"],
        "-n/--n-predict/--predict: invalid int value: 'many'\nhint: give a whole number",
    ),
    "no sequences": (["run", "-p", "x", "-np", 0], "-np 0; allowed: 1 to 1024"),
    "10^12 sequences": (["run", "-p", "x", "-np", 10**12], "-np 1000000000000; allowed: 1 to 1024"),
    "no threads": (["run", "-p", "x", "-t", 0], "-t 0; allowed: 1 to 1024"),
    "10^20 threads": (["run", "-p", "x", "-t", 10**20], "-t 1.*; allowed: 1 to 1024"),
    "negative context": (["run", "-p", "x", "-c", -1], "-c -1; allowed: 0 to 1099511627776"),
    "context beyond 64 bits": (["run", "-p", "x", "-c", 10**21], "-c 1.*; allowed: 0 to 1099511627776"),
    "unknown type": (["run", "-p", "x", "-ctk", "q9"], f"unknown KV cache type 'q9'; allowed: {', '.join(FORMATS)}"),
    "upper case": (["run", "-p", "x", "-ctv", "Q4_0"], "unknown KV cache type 'Q4_0'; .*\nhint: did you mean 'q4_0'"),
    "type of no layer": (
        ["run", "-p", "x", "-ctk-first", "q8_0,0"],
        "-ctk-first 'q8_0,0'; allowed: TYPE,N with N at least 1",
    ),
    "override without count": (["run", "-p", "x", "-ctv-last", "q8_0"], "-ctv-last 'q8_0'; allowed: TYPE,N"),
    "override of unknown type": (["run", "-p", "x", "-ctv-first", "zz,1"], "unknown KV cache type 'zz'"),
    "negative tail": (["run", "-p", "x", "--kv-tail", "-1"], "--kv-tail -1; allowed: 0 to"),
    "sink that is no number": (["run", "-p", "x", "--kv-sink", "four"], "--kv-sink: invalid int value: 'four'"),
    "center without a tail": (["run", "-p", "x", "--kv-center"], "--kv-center with --kv-tail 0; allowed: a tail of"),
    "scale rule": (["run", "-p", "x", "--kv-scale", "best"], "unknown scale rule 'best'; allowed: absmax, refit"),
    "guard mode": (
        ["run", "-p", "x", "--kv-guard", "on"],
        "unknown guard mode 'on'; allowed: check, upgrade, warn, strict, off",
    ),
    "device": (["run", "-p", "x", "--device", "tpu"], "--device 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
    "device that is not there": (["run", "-p", "x", "--device", "cuda:97"], "--device cuda:97: this machine has"),
    "activations": (
        ["run", "-p", "x", "--activations", "int4"],
        "--activations 'int4'; allowed: int16, int8\nhint: int16",
    ),
    "activations of eager": (
        ["run", "-p", "x", "--activations", "int8", "--backend", "eager"],
        "--activations int8(: .* no products with 8-bit activations| is for the native backend on the CPU)",
    ),
    "seed that is a word": (["run", "-p", "x", "--seed", "x"], "-s/--seed: invalid int value: 'x'"),
    "seed beyond 64 bits": (["run", "-p", "x", "--seed", 2**64], "--seed 18446744073709551616; allowed: 0 to"),
    "negative seed": (["run", "-p", "x", "--seed", -2], "--seed -2; allowed: 0 to .*, or -1"),
    "negative temperature": (
        ["run", "-p", "x", "--temp", -1],
        "--temp -1.0; allowed: 0 \\(greedy\\), or 0.001 to 1000",
    ),
    "no temperature": (["run", "-p", "x", "--temp", "nan"], "--temp nan; allowed: "),
    "boundless temperature": (["run", "-p", "x", "--temp", "inf"], "--temp inf; allowed: "),
    "temperature below float32": (["run", "-p", "x", "--temp", "1e-40"], "--temp 1e-40; allowed: "),
    "top-k": (["run", "-p", "x", "--top-k", -1], r"--top-k -1; allowed: 0 \(keeps all\) or more"),
    "top-p": (["run", "-p", "x", "--top-p", 0], "--top-p 0.0; allowed: more than 0, at most 1"),
    "min-p": (["run", "-p", "x", "--min-p", 1.5], r"--min-p 1.5; allowed: 0 \(keeps all\) to 1"),
    "flash attention": (["run", "-p", "x", "-fa", "maybe"], "-fa 'maybe'; allowed: on, off, auto"),
    "cuda option": (["run", "-p", "x", "-cuda", "graphs=1"], "-cuda 'graphs=1'; allowed: fa-offset=X"),
    "plan: memory": (["plan", "--memory", "lots"], "--memory 'lots'; allowed: a positive number and one of KB MB"),
    "plan: no memory": (["plan", "--memory", "0GiB"], "--memory '0GiB'; allowed: a positive number"),
    "plan: negative memory": (["plan", "--memory=-1GiB"], "--memory '-1GiB'; allowed: a positive number"),
    "plan: types": (["plan", "--types", "q4_0/zz"], "unknown KV cache type 'zz'"),
    "plan: no types": (["plan", "--types", ","], "--types is empty; allowed: "),
    "plan: context": (["plan", "-c", -5], "-c -5; allowed: 0 to"),
    "plan: sequences": (["plan", "-np", 0], "-np 0; allowed: 1 to"),
    "plan: dtype": (["plan", "--dtype", "q4"], "--dtype: invalid choice: 'q4'"),
    "doctor: head dim": (["doctor", "--head-dim", 0], "--head-dim 0; allowed: 1 or more"),
    "doctor: device": (["doctor", "--device", "tpu"], "--device 'tpu'; allowed: cpu, cuda"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(cli: Cli, capfd: pytest.CaptureFixture[str], name: str) -> None:
    argv, message = USAGE[name]
    done = cli(*argv) if argv else _bare(capfd)
    assert re.search(message, one_error(done)), done.err
    assert "layers," not in done.err  # found before any model was looked at


def test_variables_of_llama_cpp_that_have_no_effect_are_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "warning: environment variables without effect here: "
    assert said not in cli("doctor").err
    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "q8_0")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_CACHE", "/tmp")
    done = cli("doctor")
    assert (done.code, done.err.count(said)) == (0, 1)
    assert f"{said}LLAMA_API_KEY, LLAMA_ARG_CACHE_TYPE_K\n" in done.err
    assert "secret" not in done.err + done.out


def _bare(capfd: pytest.CaptureFixture[str]) -> Outcome:
    from hybridkv.cli.main import main

    code = main([])
    seen = capfd.readouterr()
    return Outcome(code, seen.out, seen.err)


def refused(cli: Cli, model: object, *options: object, message: str) -> str:
    """`run` on token ids must refuse with `message`."""
    error = one_error(cli("run", "-m", model, "--ids", "3,4,5", "-n", 4, *options))
    assert message in error, error
    return error


# Prompts and contexts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
        (b"ab\xff", "not UTF-8 text (byte 2)"),
    ],
)
def test_prompt_files(cli: Cli, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in one_error(cli("run", "-f", path))
    assert "Is a directory" in one_error(cli("run", "-f", tmp_path))


def test_a_prompt_longer_than_the_context(cli: Cli, gguf: Path) -> None:
    for n_ctx in (1, 4):  # 4 tokens leave no room for an answer
        error = one_error(cli("run", "-m", gguf, "-p", "the in", "-c", n_ctx))
        assert f"the prompt has 4 tokens and the context holds {n_ctx}, answer included" in error
        assert "hint: try -c 8" in error


@pytest.mark.parametrize("model", ["qwen3_5_text", "qwen3"])
def test_a_context_that_memory_cannot_hold(cli: Cli, models: ModelStore, model: str) -> None:
    error = refused(cli, models.family(model), "-c", 10**12, message="not enough memory: this takes ")
    assert "KV of 1 x 1000000000000 tokens at f16" in error
    assert "TiB" in error
    assert re.search(r"hint: -c \d+ fits; --memory SIZE", error)
    error = refused(
        cli, models.family(model), "-c", 10**12, "--memory", 2**60,
        message="not enough memory: the KV cache of 1 x 1000000000000",
    )  # fmt: skip
    assert "hint: take a smaller -c" in error


def test_more_layers_than_the_model_has_and_unknown_ids(cli: Cli, hybrid: Path) -> None:
    error = refused(cli, hybrid, "-ctk-first", "q8_0,3", message="the first 3 K layers; this model has 2 KV layers")
    assert "counted among the layers that have a KV cache" in error
    done = cli("run", "-m", hybrid, "--ids", "1,97")
    assert "--ids: 97; this model's tokens are 0 to 96" in one_error(done)
    assert "this model has no tokenizer\nhint: " in one_error(cli("run", "-m", hybrid, "-p", "x"))


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.rejects(20)])
def test_a_head_dim_that_no_block_divides(cli: Cli, models: ModelStore, name: str) -> None:
    model = models.family("qwen3_5_text", head_dim=20)
    error = refused(cli, model, "-ctk", name, message=f"{name} needs a head dim that is a multiple of 16, not 20")
    assert "no kernel for prefill on cpu" in error
    refused(cli, model, "-khad", message="Hadamard rotation of head dim 20; allowed: multiples of 16")


@pytest.mark.parametrize("head_dim", [24, 40])
def test_the_refusal_of_a_head_dim_says_which_work(cli: Cli, models: ModelStore, head_dim: int) -> None:
    model = models.family("qwen3", head_dim=head_dim)
    message = f"q8_0 needs a head dim that is a multiple of 16, not {head_dim}"
    error = refused(cli, model, "-ctk", "q8_0", message=message)
    hint = "quantized types work with head dims 16, 32, 48, 64 and every other multiple of 16; f32, f16, bf16 and q8_KV"
    assert f"hint: {hint} with any (-ctk f16 -ctv f16)" in error
    for name in ("f32", "f16", "bf16", "q8_KV"):
        assert cli("run", "-m", model, "--ids", "3,4,5", "-n", 4, "-ctk", name, "-ctv", name).code == 0


# Files


def test_paths(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    refused(cli, tmp_path / "no.gguf", message="no model at ")
    refused(cli, "", message="-m is empty; allowed: a .gguf file or a model directory")
    refused(cli, tmp_path, message="holds no config.json\nhint: give a .gguf file or")
    refused(cli, hybrid / "model.safetensors", message=f"hint: give its directory: -m {hybrid}")
    assert "no model at " in one_error(cli("plan", "-m", tmp_path / "no.gguf"))


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is empty"),
    "wrong magic": (lambda data: b"GGML" + data[4:], "not a GGUF file: starts with b'GGML', not b'GGUF'"),
    "truncated header": (lambda data: data[:300], "do not fit into the file"),
    "truncated data": (lambda data: data[:-5000], "reaches beyond the end of the file"),
    "corrupted header": (lambda data: data[:40] + b"\xff" * 20 + data[60:], "is not UTF-8"),
    "tensor out of bounds": (
        lambda data: gguf_bytes([], [tensor("x", [4, 4], offset=2**40)], data=bytes(64)),
        "reaches beyond",
    ),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(cli: Cli, gguf: Path, tmp_path: Path, name: str, command: str) -> None:
    spoil, message = GGUF[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(gguf.read_bytes()))
    prompt = ["--ids", 1] if command == "run" else []
    error = one_error(cli(command, "-m", path, *prompt))
    assert message in error
    assert str(path) in error
    assert "hint: " in error


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (Draft("clip", {"general.type": "mmproj"}), "is a multimodal projector (mmproj)"),
        (Draft("llama", {"general.type": "adapter"}), "is an adapter (LoRA)"),
        (Draft("qwen35", tensors={"blk.64.nextn.eh_proj.weight": np.ones((2, 2), np.float32)}), "is a draft head"),
    ],
    ids=lambda value: value.architecture if isinstance(value, Draft) else "",
)
def test_gguf_files_that_are_no_language_models(
    cli: Cli, tmp_path: Path, command: str, file: Draft, message: str
) -> None:
    path = file.write(tmp_path / "x.gguf")
    error = one_error(cli(command, "-m", path, *(["--ids", 1] if command == "run" else [])))
    assert f"{path} {message}" in error
    assert "hint: " in error


def test_a_directory_that_is_an_adapter(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    message = f"{tmp_path} is an adapter of 'someone/base'; allowed: a whole model\nhint: merge it into its base model"
    refused(cli, tmp_path, message=message)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few layer types": (
        "qwen3_5_text",
        {"layer_types": ["full_attention"]},
        "(4) must be equal to the number of `layer_types` (1)",
    ),
    "unknown layer type": ("qwen3_5_text", {"layer_types": ["magic"] * 4}, "`layer_types` entries must be in"),
    "layer types that are no list": ("qwen3_5_text", {"layer_types": "all"}, "expected a list"),
    "no layers, four types": ("qwen3_5_text", {"num_hidden_layers": 0}, "(0) must be equal to the number"),
    "no layers": (
        "qwen3_5_text",
        {"num_hidden_layers": 0, "layer_types": []},
        "the config has 0 layers; allowed: 1 to 10000",
    ),
    "no layers, dense": ("qwen3", {"num_hidden_layers": 0, "layer_types": []}, "the config has 0 layers"),
    "no model type": ("qwen3", {"model_type": None}, "`model_type`"),
    "unknown model type": ("qwen3", {"model_type": "frobnicate"}, "`frobnicate`"),
    "a word for a number": ("qwen3", {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    "interval of 0": (
        "qwen3_5_text",
        {"layer_types": None, "full_attention_interval": 0},
        "config.json cannot be read",
    ),
    "no heads": ("qwen3_5_text", {"num_attention_heads": 0}, "0 query heads, 2 KV heads"),
    "heads that do not divide": ("qwen3", {"num_key_value_heads": 4}, "6 query heads do not divide into 4 KV heads"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(cli: Cli, models: ModelStore, tmp_path: Path, name: str) -> None:
    family, changes, message = CONFIGS[name]
    model = with_config(models.family(family), tmp_path / "model", **changes)
    refused(cli, model, message=message)
    assert message in one_error(cli("plan", "-m", model))


@pytest.mark.parametrize("changes", [{"head_dim": 0}, {"num_key_value_heads": 0}, {"hidden_size": -4}], ids=str)
def test_configs_that_build_no_model(cli: Cli, hybrid: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    refused(cli, with_config(hybrid, tmp_path / "model", **changes), message="error: ")


@pytest.mark.parametrize("content", [b'{"model_type": ', b"[1, 2]", b"\xff\xfe\x00", b"{}", b""], ids=str)
def test_broken_config_files(cli: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    refused(cli, tmp_path, message=f"{tmp_path / 'config.json'} cannot be read: ")


def test_a_config_without_layer_types(cli: Cli, models: ModelStore, tmp_path: Path) -> None:
    """Where Transformers has a default for them, that default must be the model's own or its weights tell."""
    model = with_config(models.family("granitemoehybrid"), tmp_path / "model", layer_types=None, layers_block_type=None)
    refused(cli, model, message="tensors are missing")


# Weights


def drop_attention(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "layers.1.self_attn" in name]:
        del weights[name]


def cut_a_matrix(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"][:7].clone()


def test_weights_that_do_not_fit_the_config(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    missing = with_weights(hybrid, tmp_path / "missing", drop_attention)
    error = refused(cli, missing, message="6 tensors are missing in ")
    assert "model.layers.1.self_attn.k_norm.weight" in error
    cut = with_weights(hybrid, tmp_path / "cut", cut_a_matrix)
    error = refused(cli, cut, message="model.layers.2.mlp.up_proj.weight has shape [7, 64] in ")
    assert "; the config asks for [96, 64]" in error
    refused(cli, cut, "--backend", "eager", message="model.layers.2.mlp.up_proj.weight [7, 64] for [96, 64]")


def test_weights_that_are_no_floats(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    model = with_weights(
        hybrid, tmp_path / "model", lambda weights: weights.update({name: weights[name].to(torch.int8)})
    )
    refused(cli, model, message=f"tensor '{name}' in {model / 'model.safetensors'} has dtype I8; allowed: F64, F32")


@pytest.mark.parametrize("size", [0, 7, 100, -4000, None], ids=str)
def test_weight_files_that_are_cut_short_or_gone(cli: Cli, hybrid: Path, tmp_path: Path, size: int | None) -> None:
    model = with_config(hybrid, tmp_path / "model")
    file = model / "model.safetensors"
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    refused(cli, model, message=f"the weights in {model} cannot be loaded: ")


@pytest.mark.parametrize("mode", ["check", "upgrade", "warn", "strict", "off"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(cli: Cli, hybrid: Path, tmp_path: Path, mode: str, value: float) -> None:
    """Whatever the guard's mode: no type can help, and the tensor is named."""
    name = "model.layers.1.self_attn.v_proj.weight"
    model = with_weights(hybrid, tmp_path / "model", lambda weights: weights[name][3].fill_(value))
    error = refused(cli, model, "-ctk", "q8_0", "--kv-guard", mode, message=f"{name} holds NaN or infinity")
    assert "no cache type can help" in error


def test_weights_that_are_not_finite_in_a_model_without_attention(cli: Cli, models: ModelStore, tmp_path: Path) -> None:
    linear = models.family("qwen3_5_text", layer_types=["linear_attention"] * 4)
    name = "model.layers.2.mlp.down_proj.weight"
    model = with_weights(linear, tmp_path / "model", lambda weights: weights[name][0, 0].fill_(torch.nan))
    refused(cli, model, message=f"{name} holds NaN or infinity")


@pytest.mark.parametrize("content", ['{"broken', "{}", json.dumps({"model": {"type": "???"}})])
def test_damaged_tokenizers(cli: Cli, hybrid: Path, tmp_path: Path, content: str) -> None:
    model = with_config(hybrid, tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    assert "the tokenizer in " in one_error(cli("run", "-m", model, "-p", "x"))


@pytest.mark.parametrize("command", LAB)
def test_what_measures_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    said = one_error(cli(command, "-o", "x"))
    assert said == (
        f'error: `hybridkv {command}` is in hybridkv-lab, which is not installed\nhint: pip install "hybridkv[lab]"\n'
    )


def test_help_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.endswith('\neval, tune, report, bench: pip install "hybridkv[lab]"\n')


def test_commands_of_another_release_are_one_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    old = EntryPoint("eval", "hybridkv.cli.no_longer_there", GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: (old,))
    said = one_error(cli("eval"))
    assert "an installed command does not load: No module named 'hybridkv.cli.no_longer_there'" in said
    assert cli("plan", "-c", 32).code == 0


def test_other_distributions_add_commands(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    added = ModuleType("added")
    added.__dict__.update(NAME="hello", HELP="say hello", add_arguments=lambda _: None, main=lambda _: 7)
    monkeypatch.setitem(sys.modules, "added", added)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: (EntryPoint("hello", "added", GROUP),))
    assert cli("hello").code == 7
