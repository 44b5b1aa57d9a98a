"""`--spec`, `-md` and the others: the text is the same, and what cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridkv.cli import spec_options
from hybridkv.engine.load import bundled_model
from hybridkv.engine.speculation import DRAFT_MAX
from hybridkv.kernels import cpu_native
from tests.cli.conftest import Cli

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

PROMPT = "one two three four five six. one two three four five six. one two three"


@pytest.mark.parametrize("more", [(), ("--spec", "ngram", "--draft-max", 3), ("-md", str(bundled_model()), "-n", 20)])
def test_the_text_is_the_same(cli: Cli, more: tuple[object, ...]) -> None:
    asked = ("run", "-p", PROMPT, "-n", 40, "--temp", 0.6, "-s", 3, "-ctk", "q8_0", "-ctv", "q8_0")
    without = cli(*asked, *(more[-2:] if "-n" in more else ()), "--spec", "off")
    done = cli(*asked, *more)
    assert (done.code, done.out) == (0, without.out)
    assert "guesses:" in done.err
    assert "guesses:" not in without.err
    assert ("draft model: " in done.err) == ("-md" in more)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--spec", "mtp"], "error: --spec mtp: the model has no head of multi-token prediction; allowed: auto, ngram"),
        (["--spec", "mtp", "-md", "small.gguf"], "error: -md with --spec mtp, which needs no other model"),
        (["--spec", "eagle"], "error: --spec 'eagle'; allowed: auto, ngram, mtp, draft, off"),
        (["--spec", "draft"], "error: --spec draft without a draft model"),
        (["--spec", "ngram", "-md", "small.gguf"], "error: -md with --spec ngram"),
        (["-md", "small.gguf"], "error: -md small.gguf: there is no such file"),
        (["--draft-max", "0"], "error: --draft-max 0; allowed: 1 to 63"),
        (["--draft-min", "9"], "error: --draft-min 9; allowed: 0 to --draft-max 7"),
    ],
)
@pytest.mark.parametrize("command", ["run", "serve"])
def test_what_cannot_be_meant_is_refused(cli: Cli, command: str, argv: list[str], said: str) -> None:
    prompt = ["-p", "x"] if command == "run" else []
    done = cli(command, *prompt, *argv)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_the_default_that_help_names_is_the_engine_s() -> None:
    """The parser is built without importing the engine."""
    assert spec_options._DEFAULT_MAX == DRAFT_MAX


def test_an_option_without_effect_says_so(cli: Cli, gguf: Path) -> None:
    eager = cli("run", "-m", gguf, "-p", "the", "-n", 3, "--backend", "eager", "--spec", "ngram")
    assert "note: --spec ngram: nothing is guessed: " in eager.err
    assert "a recurrent state cannot go back there" in eager.err
    several = cli("run", "-m", gguf, "-p", "the", "-n", 3, "-np", 2, "--draft-max", 4)
    assert "nothing is guessed: -np 2 sequences of one prompt run in step" in several.err
    off = cli("run", "-m", gguf, "-p", "the", "-n", 3, "--spec", "off", "--draft", 4)
    assert "note: --draft-max: no effect with --spec off" in off.err
    assert "nothing is guessed" not in cli("run", "-m", gguf, "-p", "the", "-n", 3, "--backend", "eager").err
