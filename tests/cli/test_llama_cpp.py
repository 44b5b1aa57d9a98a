"""Command lines of llama.cpp and ik_llama.cpp: every option of theirs is taken, and said to be what it is here."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path

import pytest

from hybridkv.cli import serve
from hybridkv.cli.chat_options import unescape
from hybridkv.cli.llama_cpp import LLAMA_OPTIONS, accepted_names, llama_option, options_from_variables
from hybridkv.cli.main import build_parser
from hybridkv.cli.serve_answers import answers_from
from hybridkv.server.sampler_fields import SamplerFields
from tests.cli.conftest import Cli
from tests.gguf.write_qwen35 import draft, tiny_model

DATA = Path(__file__).parent.parent / "data/options"
LLAMA = [line.split("\t") for line in (DATA / "llama.cpp.txt").read_text().splitlines() if not line.startswith("#")]
IK = [line.split("\t") for line in (DATA / "ik_llama.cpp.txt").read_text().splitlines() if not line.startswith("#")]
NAMES = {name for _, names, *_ in LLAMA for name in names.split()} | {name for names, _ in IK for name in names.split()}
COMMANDS = build_parser()[1]


def test_every_option_of_both_engines_has_one_row() -> None:
    rows = [name for row in LLAMA_OPTIONS for name in row.names]
    assert len(rows) == len(set(rows))
    assert not NAMES - set(rows)
    assert len(NAMES) > 550


def test_values_are_taken_as_there() -> None:
    """An option with a value swallows it, a switch leaves the next word alone."""
    both_ways = {"-co", "--color", "--fit", "--webui", "-dr", "--context-shift"}  # differ between the two
    takes = {name: value != "-" for _, names, value, _ in LLAMA for name in names.split()}
    takes = {name: value != "-" for names, value in IK for name in names.split()} | takes
    for name in NAMES - both_ways:
        row = llama_option(name)
        assert row is not None
        assert (row.takes != "") == takes[name] or row.takes == "[N]", name


def test_variables_are_those_of_llama_cpp() -> None:
    theirs = {(name, variable) for _, names, _, variable in LLAMA for name in names.split()[:1] if variable != "-"}
    for name, variable in theirs:
        row = llama_option(name)
        assert row is not None
        if variable.startswith(("LLAMA_", "HF_")):
            assert row.env == variable, name


def test_a_row_that_says_same_is_an_option_of_a_command() -> None:
    own = {c: COMMANDS[c]._option_string_actions.keys() - accepted_names(COMMANDS[c]) for c in ("run", "serve")}
    for row in LLAMA_OPTIONS:
        for name in row.names:
            assert row.fate != "same" or name in own["run"] | own["serve"], name


@pytest.mark.parametrize("command", ["run", "chat", "serve", "plan"])
def test_no_option_of_theirs_is_unknown(command: str) -> None:
    assert not NAMES - COMMANDS[command]._option_string_actions.keys()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-ngl", "99"], "note: -ngl: no effect on cpu"),
        (["-gfm", "9", "-ncffn", "3"], "note: -gfm, -ncffn: what fits lies on the card"),
        (["-b", "2048", "-ub", "512"], "note: -b, -ub: prompts are processed whole"),
        (["-ot", r"\.ffn_.*_exps\.=CPU"], "note: -ot: no effect on cpu"),
        (
            ["--host", "0.0.0.0", "--port", "80"],
            "note: --host, --port: it is an option of `hybridkv serve`, and has no",
        ),
        (["--jinja"], "note: --jinja: chat templates are always rendered with Jinja"),
        (["-fa", "1"], ""),
        (["-fa"], ""),
        (["--mirostat", "0", "--dry-multiplier", "0.0", "--repeat-penalty", "1"], ""),
        (["-dev", "none"], ""),
        (
            ["--threads", "-1", "--top_k", "20", "--min_p=0"],
            "note: --temp 0 always takes the most likely token; without effect: --top-k, --min-p",
        ),
        (["-rtr", "-no-fmoe", "--merge-qkv"], "note: -rtr: --no-mmap reads"),
        (["--mmap"], ""),
        (["--samplers", "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature"], ""),
        (["--reasoning", "on"], "note: -rea: no effect on a plain prompt; --chat puts it"),
        (
            ["-okv", "qwen3moe.expert_used_count=int:4"],
            "note: --override-kv qwen3moe.expert_used_count: no effect, for",
        ),
    ],
)
def test_accepted(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    plain = cli("run", "-m", gguf, "-p", "the", "-n", 3, "--temp", 0)
    done = cli("run", "-m", gguf, "-p", "the", "-n", 3, "--temp", 0, *argv)
    assert (done.code, done.out) == (0, plain.out)
    assert said in done.err
    assert ("note: -" in done.err) == said.startswith("note")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mirostat", "2"], "error: --mirostat: this sampler is not here"),
        (["--lora", "a.gguf"], "error: --lora: adapters are not applied"),
        (["--lora-scaled", "a.gguf", "0.5"], "error: --lora-scaled: adapters are not applied"),
        (["-gan", "4"], "error: -gan: self-extend is not computed"),
        (["--image", "cat.png"], "error: --image: this reads text"),
        (["-mu", "https://example.org/a.gguf"], "error: -mu: "),
    ],
)
def test_refused_because_the_answer_would_be_another(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    done = cli("run", "-m", gguf, "-p", "the", "-n", 3, *argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "layers," not in done.err


def test_a_server_says_what_requests_say(cli: Cli, gguf: Path) -> None:
    done = cli("serve", "-m", gguf, "--temp", "0.6", "--top-p", "0.95", "-fa", "on", "-p", "x", "--port", "70000")
    assert "--temp" not in done.err
    assert "note: -p: it is an option of `hybridkv run`, and has no effect here\n" in done.err
    assert "error: --port 70000" in done.err
    for option, value, said in (("-sys", "x", "clients send system messages"), ("-r", "x", "their `stop`")):
        assert f"error: {option}: requests say this: {said}" in cli("serve", "-m", gguf, option, value).err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--repeat-penalty", "0"], "error: --repeat-penalty 0.0; allowed: more than 0, at most 100"),
        (["--temp", "-1"], "error: --temp -1.0; allowed: 0 (greedy), or 0.001 to 1000"),
        (["-l", "5"], "error: --logit-bias '5'; allowed: a token id"),
        (["-s", "-5"], "error: --seed -5; allowed: 0 to "),
        (["-n", "-3"], "error: -n -3; allowed: 0 or more"),
        (["--dry-base", "0"], "error: --dry-base 0.0; allowed: 1 to 100"),
    ],
)
def test_bad_defaults_of_a_server(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    done = cli("serve", "-m", gguf, *argv)
    assert (done.code, said in done.err) == (2, True), done.err


def test_what_a_server_takes_where_a_request_does_not_say() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    line = "--temp 0.7 --top-k 20 --top-p 0.9 --repeat-penalty 1.3 -l 5+1 --dry-penalty-last-n 9 -s 3 -n 40"
    answers = answers_from(parser.parse_args([*line.split(), "--dry-sequence-breaker", "none"]))
    assert answers.sampling == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "repeat_penalty": 1.3,
        "logit_bias": {"5": 1.0},
        "dry_penalty_last_n": 9,
        "dry_sequence_breakers": [],
        "seed": 3,
    }
    assert answers.max_tokens == 40
    assert set(answers.sampling) <= set(SamplerFields.model_fields)
    thinks = answers_from(parser.parse_args(["--reasoning", "off", "--reasoning-effort", "low"]))
    assert thinks.variables == {"enable_thinking": False, "reasoning_effort": "low"}
    assert answers_from(parser.parse_args(["-rea", "auto"])).variables == {}
    nothing = answers_from(parser.parse_args([]))
    assert (nothing.sampling, nothing.max_tokens) == ({}, None)


def test_a_bias_bans_a_token_and_asks_for_one(cli: Cli, gguf: Path) -> None:
    line = ("run", "-m", gguf, "--ids", 1, "-n", 1, "--temp", 0, "--json", "--ignore-eos")
    likeliest = json.loads(cli(*line).out)["sequences"][0]["ids"][0]
    assert json.loads(cli(*line, "-l", f"{likeliest}-1000").out)["sequences"][0]["ids"] != [likeliest]
    assert json.loads(cli(*line, "-l", f"{likeliest}-inf").out)["sequences"][0]["ids"] != [likeliest]
    assert json.loads(cli(*line, "-l", f"{likeliest}+1e-3").out)["sequences"][0]["ids"] == [likeliest]
    other = likeliest + 1 if likeliest < 5 else likeliest - 1
    assert json.loads(cli(*line, "--logit-bias", f"{other}+1000").out)["sequences"][0]["ids"] == [other]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-l", "5+x"], "error: --logit-bias '5+x'; allowed: a token id, + or -, and a number\nhint: --logit-bias"),
        (["--samplers", "top_k;mirostat"], "error: --samplers: 'mirostat'; allowed: penalties, dry, top_n_sigma"),
        (["--sampler-seq", "kq"], "error: --sampler-seq 'kq': 'q'; allowed: e (penalties), d (dry), "),
        (["--samplers", "top_k", "--sampler-seq", "k"], "error: --samplers and --sampler-seq were given together"),
        (
            ["--samplers", "top_k;penalties", "--repeat-penalty", "1.2"],
            "error: --samplers: penalties behind top_k; allowed: penalties and dry before the others\nhint: put",
        ),
        (["--logit-bias", "99999+1"], "error: logit_bias 99999; allowed: 0 to "),
        (["--xtc-probability", "2"], "error: --xtc-probability 2.0; allowed: 0 (off) to 1"),
        (["--dry-base", "0.5"], "error: --dry-base 0.5; allowed: 1 to 100"),
        (["--repeat-penalty", "0"], "error: --repeat-penalty 0.0; allowed: more than 0"),
    ],
)
def test_bad_values_of_samplers(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    done = cli("run", "-m", gguf, "-p", "the", "-n", 3, *argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_filters_that_an_order_leaves_out_are_off(cli: Cli, gguf: Path) -> None:
    line = ("run", "-m", gguf, "-p", "the", "-n", 8, "-s", 5, "--ignore-eos")
    free = cli(*line, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--temp", 1).out
    assert cli(*line, "--samplers", "").out == cli(*line, "--sampler-seq", "").out == free
    done = cli(*line, "--samplers", "top-k;temp", "--top-k", 1, "--top-p", 0.3)
    assert done.out == cli(*line, "--temp", 0).out
    assert "note: --samplers leaves their filter out; without effect: --top-p" in done.err
    assert "--samplers" not in cli("serve", "-m", gguf, "--samplers", "top_k;top_p", "--port", 70000).err
    said = cli("serve", "-m", gguf, "--samplers", "top_p;top_k").err
    assert "error: --samplers in another order than penalties, dry" in said


def test_a_plan_takes_the_line_and_names_what_changes_nothing(cli: Cli, gguf: Path) -> None:
    done = cli("plan", "-m", gguf, "-c", 128, "-ctk", "q8_0", "-ngl", 99, "-fa", "on", "--lora", "x", "-t", 2)
    assert done.code == 0
    assert "note: no effect on a plan: -fa, -t, --lora" in done.err
    assert "note: -ngl: no effect on cpu\n" in done.err


def test_variables_are_options(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("LLAMA_ARG_CACHE_TYPE_K", "q8_0"),
        ("LLAMA_ARG_N_GPU_LAYERS", "99"),
        ("LLAMA_ARG_CTX_SIZE", "128"),
        ("LLAMA_ARG_NO_MMAP", "1"),
        ("LLAMA_ARG_MLOCK", "0"),
        ("LLAMA_ARG_UNHEARD_OF", "1"),
        ("LLAMA_API_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    done = cli("run", "-m", gguf, "-p", "the", "-n", 2, "--json", "-c", 256)
    assert json.loads(done.out)["layers"][0]["type_k"] == "q8_0"
    used = "LLAMA_ARG_CTX_SIZE, LLAMA_ARG_CACHE_TYPE_K, LLAMA_API_KEY, LLAMA_ARG_N_GPU_LAYERS, LLAMA_ARG_NO_MMAP"
    assert f"note: from the environment: {used}\n" in done.err
    assert "warning: environment variables without effect here: LLAMA_ARG_MLOCK, LLAMA_ARG_UNHEARD_OF\n" in done.err
    assert "note: -ngl: no effect on cpu\n" in done.err
    assert "secret" not in done.err
    monkeypatch.setenv("RANK", "1")
    assert "environment" not in cli("plan", "-m", gguf).err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"LLAMA_ARG_CTX_SIZE": "8192"}, ["-c=8192"]),
        ({"LLAMA_ARG_JINJA": "true"}, ["--jinja"]),
        ({"LLAMA_ARG_JINJA": "0"}, ["--no-jinja"]),
        ({"LLAMA_ARG_NO_JINJA": ""}, ["--no-jinja"]),
        ({"LLAMA_ARG_CONT_BATCHING": "off"}, ["-nocb"]),
        ({"LLAMA_ARG_NO_MMAP": "1"}, ["--no-mmap"]),
        ({"LLAMA_ARG_NO_MMAP": "0"}, []),
        ({"LLAMA_ARG_MLOCK": "maybe"}, []),
        ({"HF_TOKEN": "x", "PATH": "y"}, []),
    ],
)
def test_a_variable_is_the_option_that_llama_cpp_makes_of_it(environment: dict[str, str], words: list[str]) -> None:
    assert options_from_variables(environment, NAMES)[0] == words


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"a\nb", "a\nb"),
        (r"\t\r\'\"\\", "\t\r'\"\\"),
        (r"\x41\x4z\q", r"A\x4z\q"),
        (r"\xc3\xa9 é", "é é"),
        ("\\", "\\"),
        (r"C:\\new", r"C:\new"),
    ],
)
def test_escapes(text: str, read: str) -> None:
    assert unescape(text) == read


def test_prompts_read_escapes_unless_told_not_to(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    def prompt(*argv: object) -> str:
        return str(json.loads(cli("run", "-m", gguf, "-n", 1, "--json", *argv).out)["prompt"])

    assert prompt("-p", r"a\nb") == "a\nb"
    assert prompt("-p", r"a\nb", "-e") == "a\nb"
    assert prompt("-p", r"a\nb", "--no-escape") == r"a\nb"
    file = tmp_path / "code.py"
    file.write_text(r"print('\n')")
    assert prompt("-f", file) == r"print('\n')"


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_what_is_piped_in_is_the_prompt(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, "thé\nend\n".encode())
    assert json.loads(cli("run", "-m", gguf, "-n", 1, "--json").out)["prompt"] == "thé\nend"
    piped(monkeypatch, b"not read")
    assert json.loads(cli("run", "-m", gguf, "-n", 1, "--json", "-p", "the").out)["prompt"] == "the"
    piped(monkeypatch, b"\xff")
    assert "stdin: not UTF-8 text (byte 0)" in cli("run", "-m", gguf, "-n", 1).err
    piped(monkeypatch, b"")
    assert "no prompt was given" in cli("run", "-m", gguf, "-n", 1).err


def test_minus_two_is_until_the_context_is_full(cli: Cli, gguf: Path) -> None:
    done = cli("run", "-m", gguf, "-p", "the", "-n", -2, "-c", 16, "--ignore-eos")
    assert "stopped: the context is full at 16 tokens" in done.err


def test_an_answer_ends_before_a_reverse_prompt(cli: Cli, gguf: Path) -> None:
    options = ("run", "-m", gguf, "-p", "the", "-n", 12, "--temp", 0, "--json", "--ignore-eos")
    whole = json.loads(cli(*options).out)["sequences"][0]["text"]
    stop = whole[5:7]
    done = json.loads(cli(*options, "-r", stop).out)
    assert done["sequences"][0]["text"] == whole[: whole.index(stop)]
    assert done["stopped"] == "reverse prompt"
    assert json.loads(cli(*options, "-r", "nowhere to be found").out)["sequences"][0]["text"] == whole


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}:"
)


def chat(cli: Cli, model: Path, *argv: object) -> str:
    done = cli("run", "-m", model, "-p", "the", "-n", 1, "--json", *argv)
    assert done.code == 0, done.err
    return str(json.loads(done.out)["prompt"])


def test_options_of_a_chat(cli: Cli, tmp_path: Path) -> None:
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = TEMPLATE
    model = file.write(tmp_path / "chat.gguf")
    assert chat(cli, model, "-st") == "<user>the:"
    assert chat(cli, model, "-sys", r"be\nshort") == "<system>be\nshort<user>the:"
    said = tmp_path / "system.txt"
    said.write_text("from a file\n")
    assert chat(cli, model, "-sysf", said) == "<system>from a file<user>the:"
    assert chat(cli, model, "--chat", "-rea", "off") == "<user>the[False]:"
    assert chat(cli, model, "--chat", "--chat-template-kwargs", '{"enable_thinking": 3}') == "<user>the[3]:"
    assert chat(cli, model, "--chat", "--chat-template", "{{ messages[0].content }}!") == "the!"
    said.write_text("<{{ messages[0].content }}>")
    assert chat(cli, model, "--chat", "--chat-template-file", said) == "<the>"
    assert chat(cli, model, "--chat-template-file", said) == "<the>"
    assert chat(cli, model, "--chat-template-file", said, "-no-cnv") == "the"
    done = cli("run", "-m", model, "-p", "the", "-n", 1, "--chat", "--reasoning-effort", "low")
    assert "note: the chat template does not read reasoning_effort: no effect" in done.err
    assert done.out.count("the") == 0  # the answer alone
    assert cli("run", "-m", model, "-p", "the", "-n", 1, "--chat", "--display-prompt").out.startswith("<user>the:")
    assert not cli("run", "-m", model, "-p", "the", "-n", 1, "--no-display-prompt").out.startswith("the")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--chat-template", "yandex"], "--chat-template 'yandex'; allowed: bailing, "),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: Expecting property name"),
        (["--chat-template-kwargs", "[1]"], "--chat-template-kwargs: it is no JSON object"),
        (["--chat-template-kwargs", '{"tokenize": true}'], "--chat-template-kwargs: tokenize is not a variable"),
        (["-rea", "low"], "-rea 'low'; allowed: on, off, auto"),
        (["-sys", "a", "-sysf", "b"], "-sys and -sysf were given together"),
        (["-sysf", "/nowhere"], "-sysf /nowhere: No such file"),
        (["-sys", "a", "-no-cnv"], "-no-cnv and -sys were given together"),
        (["--chat-template", "{{", "--chat"], "the chat template fails: "),
    ],
)
def test_what_is_wrong_with_options_of_a_chat(cli: Cli, gguf: Path, argv: list[str], said: str) -> None:
    done = cli("run", "-m", gguf, "-p", "the", "-n", 1, *argv)
    assert done.code == 2
    assert said in done.err


def test_a_context_of_0_is_the_largest_that_fits(cli: Cli, gguf: Path) -> None:
    options = ("run", "-m", gguf, "-p", "the", "-n", 1, "-np", 16)
    whole = cli(*options, "-c", 0)
    assert "tokens fit in memory" not in whole.err
    needed = re.search(r"this takes ([\d.]+) MiB", cli(*options, "-c", 512, "--memory", "1MiB").err)
    assert needed
    less = f"{float(needed[1]) - 0.6:.1f}MiB"
    done = cli(*options, "-c", 0, "--memory", less)
    assert (done.code, "note: -c 0: 256 tokens fit in memory, not the 512 of training" in done.err) == (0, True)
    assert "not enough memory" in cli(*options, "-c", 512, "--memory", less).err
