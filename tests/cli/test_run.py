"""`hybridkv run`: the main job, every pair of types, and every option shown to do what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.cli.main import main
from hybridkv.cli.show import layers_words
from hybridkv.cli.stream import Streams
from hybridkv.engine import Engine, SamplingParams
from hybridkv.engine.load import Loaded, bundled_model, describe, load
from hybridkv.engine.steps import resolve_step
from hybridkv.formats import FORMATS, get_format
from hybridkv.gguf.load import load_gguf
from hybridkv.kernels.cuda import compiling
from hybridkv.model import kv_facts
from hybridkv.options import TYPES
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import Step
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore, with_weights
from tests.gguf.write_qwen35 import draft, tiny_model
from tests.models import smollm2
from tests.thin import mostly_long, pairs_in_turn

PROMPT = "Hello world"
SEED_COMMAND = ["run", "-np", "1", "-fa", "on", "-t", "2", "-ctk", "q4_0", "-ctv", "q4_0", "-khad", "-vhad"]
SEED_COMMAND += ["-p", PROMPT, "-n", "64", "--temp", "0"]


@pytest.fixture(scope="module")
def reference() -> Loaded:
    return load(describe(bundled_model()), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def step(reference: Loaded) -> Step:
    """Its weights packed once."""
    return resolve_step(reference.model.config, "cpu")(reference.model)


def hybridkv(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hybridkv.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_main_job_as_a_process() -> None:
    done = hybridkv(*SEED_COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    # Coherent: the same model in plain Transformers finds the text likely. Noise would cost 9 nats a token.
    plain = load_gguf(bundled_model())
    assert plain.tokenizer is not None
    ids = torch.tensor([plain.tokenizer.encode(done.stdout.removesuffix("\n"))])
    assert ids.shape[1] > 50
    with torch.inference_mode():
        logits = plain.model(ids, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits[0, 1:-1], ids[0, 2:]).item()
    assert nats < 2.0, (nats, done.stdout)
    lines = done.stderr.splitlines()
    assert lines[0].endswith("12 layers, 3 with a KV cache, 9 with a recurrent state")
    table = [line.split() for line in lines if "q4_0" in line]
    assert [row[:5] for row in table] == [[layer, "q4_0", "q4_0", "K", "V"] for layer in ("3", "7", "11")]
    assert all(row[-1] == "576" for row in table)  # 2 KV heads x 256 values x 9 / 16 bytes
    for figure in ("prompt:     2 tokens", "generation: 64 tokens", "memory:", "guard:"):
        assert figure in done.stderr


def answer(reference: Loaded, step: Step, k: str, v: str) -> list[int]:
    """Six tokens, with nothing raised or said by the guard."""
    ids = reference.tokenizer.encode(PROMPT)  # type: ignore[union-attr]
    specs = Policy(KVTypes(k, v)).resolve(kv_facts(reference.description.facts))
    guard = Guard(limit=0.5) if "hq2_nl" in (k, v) else Guard()  # two bits err more than the guard lets pass
    engine = Engine(reference.model, specs, n_ctx=16, guard=guard, notify=pytest.fail, step=step)
    tokens = [drawn[0] for drawn in engine.generate(ids, SamplingParams(temp=0), n_predict=6)]
    assert {s.types.label for s in engine.cache.specs} == {KVTypes(k, v).label}
    assert len(engine.cache.errors) == 3
    return tokens


@pytest.fixture(scope="module")
def exact(reference: Loaded, step: Step) -> list[int]:
    return answer(reference, step, "f32", "f32")


@pytest.mark.parametrize(("k", "v"), mostly_long(product(FORMATS, FORMATS), pairs_in_turn(FORMATS), step=6))
def test_every_pair_of_types_answers(reference: Loaded, step: Step, exact: list[int], k: str, v: str) -> None:
    """As asked for to the end; with 8 bits and up as with f32."""
    tokens = answer(reference, step, k, v)
    if min(get_format(k).bits_per_value(256), get_format(v).bits_per_value(256)) >= 8:
        assert tokens == exact


@pytest.mark.parametrize("name", FORMATS)
def test_each_type_through_the_command(cli: Cli, name: str) -> None:
    done = cli("run", "-ctk", name, "-ctv", name, "-p", PROMPT, "-n", 6, "--temp", 0)
    assert done.code == 0
    assert done.out == "Hello world.\n\nThe following example\n"
    assert done.err[: done.err.index("weights: ")].count(f" {name} ") == 6


class Run:
    """Runs of one model with `--json`, greedy unless a test says otherwise."""

    def __init__(self, cli: Cli, model: Path, prompt: tuple[str, str]) -> None:
        self._cli, self._base = cli, ["run", "-m", str(model), *prompt, "--json"]
        self.err = ""

    def __call__(self, *options: object) -> dict[str, Any]:
        greedy = [] if "--temp" in options else ["--temp", 0]
        done = self._cli(*self._base, *greedy, *options)
        assert done.code == 0, done.err
        self.err = done.err
        answer: dict[str, Any] = json.loads(done.out)
        return answer


@pytest.fixture
def run(cli: Cli, hybrid: Path) -> Run:
    return Run(cli, hybrid, ("--ids", "3,14,15,92,65,35,89,79,32,38"))


def errors(answer: dict[str, Any]) -> list[float]:
    """How far each KV layer's attention was from float attention: moves with whatever moves the numbers."""
    return [layer["guard_error"] for layer in answer["layers"]]


def types(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(layer["type_k"], layer["type_v"]) for layer in answer["layers"]]


def test_exact_rows_change_the_numbers_and_are_shown(cli: Cli, run: Run, hybrid: Path) -> None:
    q4 = ("-ctk", "q4_0", "-ctv", "q4_0", "-n", 80)
    options = ((), ("--kv-sink", 4), ("--kv-tail", 32), ("--kv-tail", 32, "--kv-sink", 4))
    options = (*options, (*options[-1], "--kv-center"))
    measured = [errors(run(*q4, *o)) for o in options]
    assert len({tuple(e) for e in measured}) == len(options)
    answer = run(*q4, *options[-1])
    assert {(layer["tail"], layer["sink"], layer["center"]) for layer in answer["layers"]} == {(32, 4, True)}
    assert errors(run("-ctk", "q4_0", "-n", 2, "--kv-tail", 32)) == [None, None]  # nothing was packed
    done = cli("run", "-m", hybrid, "--ids", "3,4", "-ctk", "q4_0", "-n", 2, *options[-1])
    assert done.err.count(" tail 32, sink 4, centred ") == 2


def test_types_change_the_numbers(run: Run) -> None:
    base, k4, v4 = (errors(run("-n", 2, *o)) for o in ((), ("-ctk", "q4_0"), ("-ctv", "q4_0")))
    assert all(e < 1e-3 for e in base)
    assert all(0.01 < e < 0.25 for e in (*k4, *v4))
    assert k4 != v4


def test_help_names_every_type() -> None:
    assert TYPES.split() == list(FORMATS)


@pytest.mark.parametrize("option", ["-khad", "-vhad", "--k-cache-hadamard", "--v-cache-hadamard"])
def test_rotation_changes_the_numbers_and_is_shown(run: Run, option: str) -> None:
    types = ("-n", 2, "-ctk", "q4_0", "-ctv", "q4_0")
    plain, rotated = run(*types), run(*types, option)
    assert all(a != b for a, b in zip(errors(plain), errors(rotated), strict=True))
    side = "K" if "k" in option else "V"
    shown = [line.split()[3] for line in run.err.splitlines() if "q4_0" in line]
    assert shown == [side, side]
    assert all(layer[f"rotate_{side.lower()}"] for layer in rotated["layers"])


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("-ctk-first", [("q8_0", "q4_0"), ("q4_0", "q4_0")]),
        ("-ctk-last", [("q4_0", "q4_0"), ("q8_0", "q4_0")]),
        ("-ctv-first", [("q4_0", "q8_0"), ("q4_0", "q4_0")]),
        ("-ctv-last", [("q4_0", "q4_0"), ("q4_0", "q8_0")]),
    ],
)
def test_first_and_last_count_kv_layers_and_are_echoed(run: Run, option: str, expected: list[tuple[str, str]]) -> None:
    base = ("-n", 2, "-ctk", "q4_0", "-ctv", "q4_0")
    before, after = run(*base), run(*base, option, "q8_0,1")
    assert types(after) == expected
    assert [tuple(line.split()[1:3]) for line in run.err.splitlines() if "q4_0" in line] == expected
    changed = 0 if "first" in option else 1
    assert errors(after)[changed] != errors(before)[changed]


def test_scale_rules_change_the_numbers(run: Run) -> None:
    base = ("-n", 2, "-ctk", "q4_0", "-ctv", "q4_0", "--kv-scale")
    assert errors(run(*base, "absmax")) != errors(run(*base, "refit"))
    run("-n", 2, "--kv-scale", "refit")
    assert "note: --kv-scale refit has no effect: f16 have no scale to fit" in run.err


def test_guard_modes(run: Run) -> None:
    low = ("-n", 2, "-ctk", "q4_0", "-ctv", "q4_0", "--kv-guard")
    checked = run(*low, "check")
    assert types(checked) == [("q4_0", "q4_0")] * 2
    assert None not in errors(checked)
    assert errors(run(*low, "strict")) == errors(checked)
    assert errors(run(*low, "off")) == [None, None]
    assert "warning" not in run.err
    assert types(run(*low, "upgrade")) == [("q8_0", "q8_0")] * 2
    # 2 layers x 2 heads x 2 x 64 values x 4 bits x 4096 tokens
    assert "warning: KV layers 1, 3 upgraded from q4_0 to q8_0 on this hybrid model: +1.0 MiB" in run.err
    assert types(run(*low, "warn")) == [("q4_0", "q4_0")] * 2
    assert "warning: KV layers 1, 3 stay at q4_0, under 8 bits" in run.err


def test_check_raises_a_layer_that_fails_and_strict_stops(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    def loud_channels(weights: dict[str, torch.Tensor]) -> None:
        # One in each block of K, that Q does not read: its scale drowns the channels that matter.
        for channel in (20, 40):
            weights["model.layers.3.self_attn.k_norm.weight"][channel] = 100.0
            weights["model.layers.3.self_attn.q_norm.weight"][channel] = -1.0

    loud = with_weights(hybrid, tmp_path / "loud", loud_channels)
    run = Run(cli, loud, ("--ids", "3,14,15,92,65,35,89,79,32,38"))
    answer = run("-n", 2, "-ctk", "q4_0", "-ctv", "q4_0", "--kv-guard", "check")
    assert types(answer) == [("q4_0", "q4_0"), ("q8_0", "q8_0")]
    assert "warning: layer 3: q4_0, error " in run.err
    stopped = cli("run", "-m", loud, "--ids", "3,14,15,92,65,35,89,79,32,38", "-ctk", "q4_0", "--kv-guard", "strict")
    assert stopped.code == 2
    assert stopped.out == ""
    assert "error: the guard stopped at layer 3: q4_0/f16, error " in stopped.err


def test_seed_and_filters_change_the_draw(run: Run) -> None:
    def ids(*options: object) -> list[int]:
        ids: list[int] = run("-n", 12, "--ignore-eos", "--temp", 1.5, *options)["sequences"][0]["ids"]
        return ids

    wide = ("--top-k", 0, "--top-p", 1, "--min-p", 0)
    base = ids("--seed", 1, *wide)
    assert len(base) == 12
    assert base == ids("--seed", 1, *wide)
    assert base != ids("--seed", 2, *wide)
    greedy = run("-n", 12, "--ignore-eos")["sequences"][0]["ids"]
    assert base != greedy
    # Each filter, turned up to where it leaves one token, gives the greedy answer.
    for filtered in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        options = dict(zip(wide[::2], wide[1::2], strict=True)) | dict([filtered])
        assert ids("--seed", 1, *(word for option in options.items() for word in option)) == greedy, filtered


def test_a_fresh_seed_is_told_and_gives_the_same_draw_again(run: Run, cli: Cli, hybrid: Path) -> None:
    for fresh in ((), ("--seed", -1)):
        first = run("-n", 8, "--temp", 1, *fresh)
        again = run("-n", 8, "--temp", 1, "--seed", first["seed"])
        assert again["sequences"] == first["sequences"]
    assert run("-n", 2)["seed"] is None
    assert "seed:       5\n" in cli("run", "-m", hybrid, "--ids", 1, "-n", 2, "--seed", 5).err


def test_filters_under_a_greedy_draw_are_told(run: Run) -> None:
    run("-n", 2, "--seed", 3, "--top-k", 5)
    assert "note: --temp 0 always takes the most likely token; without effect: --top-k, --seed" in run.err
    run("-n", 2, "-np", 2)
    assert "note: --temp 0 is greedy: all 2 sequences will be the same" in run.err


def test_context_and_length(run: Run) -> None:
    assert [len(run("-n", n, "--ignore-eos")["sequences"][0]["ids"]) for n in (1, 5)] == [1, 5]
    full = run("-n", -1, "-c", 14, "--ignore-eos")
    assert (full["stopped"], full["generated_tokens"]) == ("context full", 4)
    assert "note: stopped: the context is full at 14 tokens" in run.err
    for n, n_seqs, stopped in ((4, 1, "n"), (4, 2, "n"), (5, 2, "context full")):
        assert run("-n", n, "-c", 14, "-np", n_seqs, "--ignore-eos")["stopped"] == stopped
    small, large = (run("-n", 1, "-c", n)["kv_bytes"] for n in (100, 200))
    assert large == 2 * small
    run("-n", 1, "-c", 5000)
    assert "note: -c 5000 is more than the 4096 tokens that the model was trained for" in run.err


def test_default_context_is_the_trained_one_if_less_and_an_explicit_one_is_kept(cli: Cli, gguf: Path) -> None:
    run = Run(cli, gguf, ("-p", "the in"))
    per_token = run("-n", 1)["layers"][0]["bytes_per_token"]
    rows = {asked: run("-n", 1, *asked)["kv_bytes"] // per_token for asked in ((), ("-c", 0), ("-c", 4096))}
    assert rows == {(): 512, ("-c", 0): 512, ("-c", 4096): 4096}
    assert "note: -c 4096 is more than the 512 tokens" in run.err


def test_parallel_sequences(cli: Cli, run: Run, hybrid: Path) -> None:
    answer = run("-n", 6, "-np", 3, "--temp", 1.5, "--seed", 1, "--ignore-eos")
    texts = [tuple(s["ids"]) for s in answer["sequences"]]
    assert len(set(texts)) == 3
    assert answer["generated_tokens"] == 18
    done = cli("run", "-m", hybrid, "--ids", "3,4", "-n", 3, "-np", 2, "--seed", 1, "--ignore-eos")
    first, second = done.out.split("\n--- sequence 2 of 2\n")
    assert len(first.split()) == len(second.split()) == 3


def test_threads(cli: Cli, hybrid: Path) -> None:
    assert cli("run", "-m", hybrid, "--ids", 1, "-n", 1, "-t", 2).code == 0
    assert torch.get_num_threads() == 2
    threads = torch.get_num_threads()
    try:
        err = cli("run", "-m", hybrid, "--ids", 1, "-n", 1, "-t", 999).err
        assert f"note: -t 999: this machine has {os.cpu_count()} cores" in err
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(threads)


def test_prompt_from_a_file(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("\ufeffthe in ☃\n", encoding="utf-8")
    answers = [Run(cli, gguf, prompt)("-n", 4) for prompt in (("-f", str(path)), ("-p", "the in ☃"))]
    assert answers[0]["prompt_ids"] == answers[1]["prompt_ids"]
    assert answers[0]["sequences"] == answers[1]["sequences"]
    assert answers[0]["prompt"] == "the in ☃"


def test_ids_in_ids_out(cli: Cli, gguf: Path) -> None:
    text = Run(cli, gguf, ("-p", "the in"))("-n", 4, "--ignore-eos")
    prompt = ",".join(map(str, text["prompt_ids"]))
    done = cli("run", "-m", gguf, "--ids", prompt, "-n", 4, "--temp", 0, "--ignore-eos")
    assert [int(word) for word in done.out.split()] == text["sequences"][0]["ids"]


def test_chat_wraps_the_prompt_in_the_template(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    refused = cli("run", "-m", gguf, "-p", "the", "--chat")
    assert (refused.code, refused.out) == (2, "")
    assert "error: --chat: this model has no chat template" in refused.err
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    run = Run(cli, file.write(tmp_path / "chat.gguf"), ("-p", "the"))
    plain, chat = run("-n", 2), run("-n", 2, "--chat")
    assert (plain["prompt"], chat["prompt"]) == ("the", "<user>the:")
    assert len(chat["prompt_ids"]) > len(plain["prompt_ids"])


def test_control_words_are_text_in_a_chat_and_control_words_in_a_prompt(cli: Cli, tmp_path: Path) -> None:
    """As in llama-cli, whose plain prompts may name them; the beginning of text is there once."""
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    file.keys["tokenizer.ggml.add_bos_token"] = True
    run = Run(cli, file.write(tmp_path / "chat.gguf"), ("-p", "<|begin|>a<|end|>"))
    plain, chat = run("-n", 1), run("-n", 1, "--chat")
    assert (plain["prompt_ids"][0], plain["prompt_ids"][-1], len(plain["prompt_ids"])) == (256, 257, 3)
    assert (chat["prompt_ids"][0], chat["prompt_ids"][-1]) == (256, 257)
    assert len(chat["prompt_ids"]) == 2 + len("<|begin|>a<|end|>") - 1  # `in` is one token
    assert not {256, 257} & set(chat["prompt_ids"][1:-1])


def test_end_of_text_ends_unless_ignored(cli: Cli, hybrid: Path) -> None:
    run = Run(cli, hybrid, ("--ids", "3,4,5"))  # greedily answers 73 51 31 1, and 1 is the end token
    ended, ignored = run("-n", 10), run("-n", 10, "--ignore-eos")
    assert (ended["stopped"], ignored["stopped"]) == ("end of text", "n")
    assert len(ignored["sequences"][0]["ids"]) == 10
    assert ignored["sequences"][0]["ids"][:4] == [*ended["sequences"][0]["ids"], 1]


@pytest.mark.parametrize(
    ("options", "notice"),
    [
        (("-fa", "off", "-ctv", "q8_0"), "note: -fa off has no effect: "),
        (("-cuda", "fa-offset=x"), "note: -cuda fa-offset=x is not needed: "),
        (("-fa",), None),
        (("-fa", "auto"), None),
    ],
)
def test_options_taken_over_from_llama_cli(run: Run, options: tuple[str, ...], notice: str | None) -> None:
    run("-n", 1, *options)
    assert ("note:" in run.err) == (notice is not None)
    assert (notice or "") in run.err


def test_what_was_compiled_meanwhile_is_said(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a first run on a CUDA device would look slow."""
    words = ("run", "-m", gguf, "-p", "the in", "-n", 2, "--temp", 0)
    assert "kernels: " not in cli(*words).err
    monkeypatch.setattr(compiling, "watch_compilation", lambda device: nullcontext(compiling.Compiled(9, 8.25)))
    assert "kernels:    9 compiled in 8.2 s of that, kept for the next run\n" in cli(*words).err
    answer = json.loads(cli(*words, "--json").out)
    assert (answer["compiled_kernels"], answer["compile_s"]) == (9, 8.25)


def test_json_is_all_of_stdout(cli: Cli, gguf: Path) -> None:
    done = cli("run", "-m", gguf, "-p", "the in", "-n", 3, "--json", "-ctk", "q8_0", "--ignore-eos")
    answer = json.loads(done.out)
    assert answer["model"] == "tiny"
    assert answer["prompt_tokens"] == len(answer["prompt_ids"]) == 4
    assert answer["layers"][0]["kernel_decode"] in done.err
    assert answer["kv_bytes_used"] == 6 * answer["layers"][0]["bytes_per_token"]  # the last token is never stored
    assert answer["state_bytes"] > 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda m: m.family("qwen3"), "this model is not a hybrid: it has no recurrent state"),
        (lambda m: m.family("qwen3_5_text", layer_types=["linear_attention"] * 4), "no layer has a KV cache"),
        (lambda m: m.mamba2(), "no layer has a KV cache"),
    ],
    ids=["dense", "linear attention alone", "mamba2"],
)
def test_models_that_are_not_hybrid_work_and_it_is_said(
    cli: Cli, models: ModelStore, model: Callable[[ModelStore], Path], said: str
) -> None:
    done = cli("run", "-m", model(models), "--ids", "3,4,5", "-n", 4, "--temp", 0, "-ctk", "q8_0", "--ignore-eos")
    assert done.code == 0
    assert len(done.out.split()) == 4
    assert f"note: {said}" in done.err
    assert ("the KV cache options have no effect" in done.err) == ("no layer" in said)


def test_a_head_dim_of_20_runs_with_f16(cli: Cli, models: ModelStore) -> None:
    model = models.family("qwen3_5_text", head_dim=20)
    assert cli("run", "-m", model, "--ids", "3,4,5", "-n", 2).code == 0


def test_home_directory_in_a_quoted_path(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(gguf.parent))
    assert cli("run", "-m", f"~/{gguf.name}", "-p", "the", "-n", 1).code == 0


def test_ctrl_c_ends_calmly_with_the_figures(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push, seen = Streams.push, []

    def interrupted(self: Streams, tokens: tuple[int, ...]) -> None:
        push(self, tokens)
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Streams, "push", interrupted)
    done = cli("run", "-m", gguf, "--ids", "83,260", "-n", 50, "--temp", 0, "--ignore-eos")
    assert done.code == 130
    assert len(done.out.split()) == 3
    assert "generation: 3 tokens" in done.err


def test_whole_characters_reach_stdout_as_they_come(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A token may be one byte of a character: nothing is written until the character is whole."""
    tokenizer = load_gguf(gguf).tokenizer
    assert tokenizer is not None
    text = " the ☃ is 🎉!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    streams = Streams(tokenizer, tokenizer.encode("in"), 1, set(), prompt="in", live=True)
    pieces = []
    for token in ids:
        streams.push((token,))
        pieces.append(capfd.readouterr().out)
    assert "".join(pieces) == f"in{text}"
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces  # some byte had to wait


@pytest.mark.parametrize("prompt", ["in", "in \ufffd"])
def test_nothing_is_said_twice_and_nothing_lost(gguf: Path, capfd: pytest.CaptureFixture[str], prompt: str) -> None:
    """A prompt may end as an unfinished character does; an answer may end in one."""
    tokenizer = load_gguf(gguf).tokenizer
    assert tokenizer is not None
    streams = Streams(tokenizer, tokenizer.encode(prompt), 1, set(), prompt=prompt, live=True)
    for token in tokenizer.encode(" 🎉☃")[:-1]:
        streams.push((token,))
    streams.close()
    assert capfd.readouterr().out == f"{prompt} 🎉\ufffd\n"
    assert streams.sequences[0].text == " 🎉\ufffd"


def test_a_terminal_without_the_character_gets_a_question_mark(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["run", "-m", str(gguf), "-p", "the ☃", "-n", "1", "--temp", "0"]) == 0
    ascii_only.seek(0)
    assert ascii_only.read().startswith("the ?")


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_both_backends_say_the_same(cli: Cli, backend: str) -> None:
    done = cli("run", "--ids", "83,260,7", "-n", 12, "--temp", 0, "--backend", backend, "--json")
    answer = json.loads(done.out)
    assert answer["backend"].startswith(backend)
    assert f"backend: {answer['backend']}" in done.err
    automatic = json.loads(cli("run", "--ids", "83,260,7", "-n", 12, "--temp", 0, "--json").out)
    assert answer["sequences"] == automatic["sequences"]


def test_the_native_engine_refuses_what_it_does_not_know(cli: Cli, models: ModelStore) -> None:
    done = cli("run", "-m", models.family("gemma2"), "--ids", "3,4", "-n", 1, "--backend", "native")
    assert done.code == 2
    assert "error: the native step cannot run this model: knows no gemma2 layers; it knows qwen3_5_text" in done.err
    assert "hint: use --backend eager, or auto" in done.err
    assert cli("run", "-m", models.family("gemma2"), "--ids", "3,4", "-n", 1).code == 0


def test_unknown_engine(cli: Cli) -> None:
    done = cli("run", "--ids", "3", "-n", 1, "--backend", "fast")
    assert done.code == 2
    assert "allowed: auto, native, eager" in done.err


@pytest.mark.parametrize(
    ("backend", "weights", "said"),
    [("auto", "bf16", "bf16"), ("eager", "int8", "q8_0"), ("auto", "int4", "q4_0 + q8_0")],
)
def test_weights_as_asked(cli: Cli, backend: str, weights: str, said: str) -> None:
    done = cli("run", "--ids", "3,4", "-n", 1, "--backend", backend, "--weights", weights)
    assert done.code == 0
    assert f"weights {said}" in done.err


def test_unknown_weights(cli: Cli) -> None:
    done = cli("run", "--ids", "3", "-n", 1, "--weights", "int3")
    assert done.code == 2
    assert "allowed: auto, plain, f32, bf16, int8, int4" in done.err


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "3"),
        ([3, 7, 11], "3, 7, 11"),
        (list(range(30)), "0-29"),
        (list(range(3, 40, 4)), "3, 7, ... 39"),
        ([0, 1, 2, 9], "0, 1, 2, 9"),
    ],
)
def test_layers_are_named_shortly(numbers: list[int], words: str) -> None:
    assert layers_words(numbers) == words


def test_many_layers_that_are_alike_share_a_line(cli: Cli) -> None:
    done = cli("run", "-m", smollm2(), "-p", "the", "-n", 1, "-ctk-last", "f16,2", "-ctk", "q8_0", "-ctv", "q8_0")
    lines = [line.split() for line in done.err.splitlines() if " q8_0 " in line and "cpu-" in line]
    assert [(line[0], line[1:3], line[-3:]) for line in lines] == [
        ("0-27", ["q8_0", "q8_0"], ["28", "x", "408"]),
        ("28,", ["29", "f16"], ["2", "x", "588"]),
    ]
