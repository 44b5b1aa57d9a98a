"""`hybridkv chat`: the conversation, and a terminal that is driven and looked at."""

from __future__ import annotations

import fcntl
import os
import pty
import secrets
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from hybridkv.cache import KVTypes
from hybridkv.cli.main import main
from hybridkv.cli.talk.commands import COMMANDS, Leave, command
from hybridkv.cli.talk.loop import read_message
from hybridkv.cli.talk.screen import Screen
from hybridkv.cli.talk.talk import Habits, Talk
from hybridkv.cli.talk.thoughts import Thoughts
from hybridkv.engine import SamplingParams, Scheduler
from hybridkv.engine.load import Loaded, describe, load
from hybridkv.engine.session import load_session
from hybridkv.errors import ContextError, UsageError
from hybridkv.model import kv_facts
from hybridkv.policy import Guard, Policy
from tests.cli.conftest import Cli
from tests.gguf.write_qwen35 import draft, tiny_model

pyte = pytest.importorskip("pyte", reason="pyte is not installed: no terminal to look at")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = TEMPLATE
    return file.write(tmp_path_factory.mktemp("chat") / "chat.gguf")


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load(describe(model), dtype=torch.float32, device="cpu", weights="auto")


@pytest.fixture(autouse=True)
def same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second answers draw seeds of their own: by chance one would end within a character, and the next not resume."""
    seeds = count(2)
    monkeypatch.setattr(secrets, "randbits", lambda n_bits: next(seeds))


def talk_with(loaded: Loaded, *, n_predict: int = 6, n_ctx: int = 256, system: str | None = None) -> Talk:
    facts = kv_facts(loaded.description.facts)
    scheduler = Scheduler(
        loaded.model,
        Policy(KVTypes("q8_0", "q8_0")).resolve(facts),
        n_parallel=1,
        n_ctx=n_ctx,
        guard=Guard(mode="off"),
        notify=lambda text: None,
        prefix_bytes=1 << 24,
        prefill_chunk=16,
    )
    habits = Habits(SamplingParams(temp=0.8, seed=1), n_predict)
    return Talk(scheduler, loaded.model, loaded.tokenizer, habits, KVTypes("q8_0", "q8_0"), system)


def said(pieces: Iterator[tuple[str, str]]) -> str:
    return "".join(text for kind, text in pieces if kind == "answer")


def test_a_turn_resumes_behind_the_last_one(loaded: Loaded) -> None:
    talk = talk_with(loaded)
    first = said(talk.ask("the first question"))
    assert talk.messages == [
        {"role": "user", "content": "the first question"},
        {"role": "assistant", "content": first},
    ]
    assert talk.last is not None
    assert (talk.last.n_tokens, talk.last.ended, talk.last.n_cached) == (6, "n", 0)
    whole = talk.last.n_prompt + talk.last.n_tokens
    said(talk.ask("and the second"))
    assert talk.last.n_cached in (whole - 1, whole)
    assert talk.last.kv_bytes > 0


def test_an_answer_is_made_anew_from_the_same_prompt(loaded: Loaded) -> None:
    talk = talk_with(loaded, n_predict=12)
    said(talk.ask("the first question, which is long enough for a checkpoint"))
    assert talk.last is not None
    first, n_prompt = talk.last.text, talk.last.n_prompt
    said(talk.regenerate())
    assert (talk.last.n_prompt, len(talk.messages)) == (n_prompt, 2)
    assert talk.last.n_cached >= 16
    assert talk.last.text != first  # drawn with a seed of its own
    with pytest.raises(UsageError, match="nothing was asked yet"):
        talk_with(loaded).regenerate()


def test_what_a_tool_has_answered_is_a_message_of_its_own(loaded: Loaded) -> None:
    talk, screen = talk_with(loaded), Screen()
    with pytest.raises(UsageError, match="no tool was called"):
        command("/tool 21 C", talk, screen)
    asked = said(talk.ask("the weather"))
    pieces = command("/tool <|im_end|>21 C", talk, screen)
    assert pieces is not None
    answer = said(pieces)
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
    assert talk.handle is not None
    prompt = talk.tokenizer.decode(talk.handle.request.prompt_ids)
    assert prompt.endswith(f"<user>the weather<assistant>{asked}<tool><|im_end|>21 C<assistant>")
    again = said(talk.regenerate())
    assert talk.messages[-1]["content"] == again != answer
    with pytest.raises(UsageError, match="/tool needs what the tool has answered"):
        command("/tool", talk, screen)
    talk.tokenizer.chat_template = TEMPLATE.replace("messages", "messages if m.role != 'tool'")
    try:
        with pytest.raises(UsageError, match="the chat template leaves out what tools answer"):
            command("/tool 22 C", talk, screen)
        assert talk.messages[-1]["content"] == again
    finally:
        talk.tokenizer.chat_template = TEMPLATE


def test_types_change_between_turns_and_all_is_processed_again(loaded: Loaded) -> None:
    talk = talk_with(loaded)
    said(talk.ask("the first question"))
    assert talk.last is not None
    before = talk.last.kv_bytes
    talk.set_types("q4_0")
    said(talk.ask("and the second"))
    assert talk.last.n_cached == 0
    assert talk.types == KVTypes("q4_0", "q4_0")
    assert talk.last.kv_bytes / (talk.last.n_prompt + 5) < before / 23 * 0.6
    talk.set_types("q8_0/f16")
    assert (talk.types.type_k, talk.types.type_v) == ("q8_0", "f16")
    with pytest.raises(UsageError, match="unknown KV cache type 'q9'"):
        talk.set_types("q9")


def test_a_conversation_is_saved_and_loaded_with_its_cache(loaded: Loaded, tmp_path: Path) -> None:
    talk = talk_with(loaded, system="be brief")
    with pytest.raises(UsageError, match="nothing was answered yet"):
        talk.save(tmp_path / "talk")
    said(talk.ask("the first question"))
    n_saved = talk.save(tmp_path / "talk")
    other = talk_with(loaded)
    other.load(tmp_path / "talk")
    assert other.messages == talk.messages
    assert other.system == "be brief"
    said(other.ask("and the second"))
    assert other.last is not None
    assert other.last.n_cached == n_saved


def test_a_conversation_keeps_its_types_when_another_is_loaded(loaded: Loaded, tmp_path: Path) -> None:
    talk = talk_with(loaded)
    said(talk.ask("the first question"))
    talk.set_types("q6_0")
    said(talk.ask("and the second"))
    n_saved = talk.save(tmp_path / "talk")
    talk.forget()
    talk.load(tmp_path / "talk")
    assert talk.types == KVTypes("q6_0", "q6_0")
    said(talk.ask("and the third"))
    assert talk.last is not None
    assert talk.last.n_cached == n_saved


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one line"""'], "one line"),
        (['say """x"""'], 'say """x"""'),
    ],
)
def test_triple_quotes_hold_several_lines(lines: list[str], message: str) -> None:
    typed = iter(lines)
    assert read_message(lambda _: next(typed)) == message
    assert next(typed, None) is None


def test_words_of_other_programs_are_known(loaded: Loaded) -> None:
    talk, screen = talk_with(loaded), Screen()
    for word in ("/bye", "/exit", "/quit"):
        with pytest.raises(Leave):
            command(word, talk, screen)
    said(talk.ask("the first question"))
    assert command("/clear", talk, screen) is None
    assert talk.messages == []
    assert command("/?", talk, screen) is None
    words = [word for c in COMMANDS for word in (c.name, *c.others)]
    assert len(set(words)) == len(words)


def test_a_session_of_run_goes_on_in_a_chat_and_the_other_way_round(
    cli: Cli, model: Path, loaded: Loaded, tmp_path: Path
) -> None:
    path = tmp_path / "talk"
    options = ("run", "-m", model, "--chat", "--session", path, "-n", 4, "-ctk", "q8_0", "-ctv", "q8_0")
    assert cli(*options, "-p", "the first question").code == 0
    talk = talk_with(loaded)
    talk.load(path)
    said(talk.ask("and the second"))
    assert talk.last is not None
    assert talk.last.n_cached > 10
    talk.save(path)
    assert cli(*options, "-p", "the third").code == 0
    roles = [message["role"] for message in load_session(path, loaded.model).messages]
    assert roles == ["user", "assistant"] * 3


def test_a_full_context_ends_an_answer_and_the_next_question_says_so(loaded: Loaded) -> None:
    talk = talk_with(loaded, n_predict=-1, n_ctx=48)
    said(talk.ask("the first question"))
    assert talk.last is not None
    assert talk.last.ended == "context full"
    with pytest.raises(ContextError, match="the context holds 48"):
        said(talk.ask("and the second"))
    assert len(talk.messages) == 2
    talk.forget()
    assert said(talk.ask("anew"))


def test_stopping_keeps_what_was_said(loaded: Loaded) -> None:
    talk = talk_with(loaded, n_predict=60)
    pieces = talk.ask("the first question")
    for _ in range(5):
        next(pieces)
    talk.stop()
    list(pieces)
    assert talk.last is not None
    assert talk.last.ended == "interrupted"
    assert talk.last.n_tokens < 60
    assert talk.messages[-1] == {"role": "assistant", "content": talk.last.text}


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("prompt", "text", "thought", "answer"),
    [
        ("", "<think>\nhm</think>\n\nyes", "\nhm", "yes"),
        ("<think>\n", "hm</thin</think>yes", "hm</thin", "yes"),
        ("", "yes <think> no", "", "yes <think> no"),
        ("", "  <thin air", "", "  <thin air"),
        ("<think>", "never closed", "never closed", ""),
        ("", "[THINK]a[/THINK]b", "a", "b"),
        ("", "", "", ""),
    ],
)
def test_thoughts_are_told_from_the_answer(prompt: str, text: str, thought: str, answer: str, step: int) -> None:
    thoughts = Thoughts(prompt)
    pieces = [piece for at in range(0, len(text), step) for piece in thoughts.push(text[at : at + step])]
    pieces += thoughts.close()
    assert "".join(text for kind, text in pieces if kind == "thought") == thought
    assert "".join(text for kind, text in pieces if kind == "answer") == answer


def test_commands(loaded: Loaded, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    talk, screen = talk_with(loaded), Screen()

    def do(line: str) -> str:
        pieces = command(line, talk, screen)
        assert pieces is None
        return capsys.readouterr().out

    assert all(c.name in do("/help") for c in COMMANDS)
    assert "no system message" in do("/system")
    assert "system: be brief" in do("/system be brief")
    assert "nothing was answered yet" in do("/stats")
    said(talk.ask("the first"))
    assert "6 tokens" in do("/stats")
    assert "K q4_0, V q4_0; all is processed again" in do("/type q4_0")
    assert "no thoughts" in do("/think")
    assert "tokens saved in" in do(f"/save {tmp_path / 'talk'}")
    assert "begun anew" in do("/reset")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    assert "user: the first" in do(f"/load {tmp_path / 'talk'}")
    assert "no system message" in do("/system -")
    for wrong in ("/nonsense", "/save", "/type q9"):
        with pytest.raises(UsageError):
            command(wrong, talk, screen)
    with pytest.raises(Leave):
        command("/quit", talk, screen)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ids", "1"], "--ids in a conversation"),
        (["--json"], "--json in a conversation"),
        (["-np", "2"], "-np 2 in a conversation"),
    ],
)
def test_what_a_conversation_cannot_have(cli: Cli, model: Path, argv: list[str], message: str) -> None:
    assert message in cli("chat", "-m", model, "-p", "x", *argv).err


def test_a_model_without_a_template_says_so(cli: Cli, gguf: Path) -> None:
    done = cli("chat", "-m", gguf, "-p", "x")
    assert (done.code, done.out) == (2, "")
    assert "this model has no chat template: it continues text and cannot chat" in done.err


def test_without_a_terminal_one_message_is_answered(cli: Cli, model: Path) -> None:
    done = cli("chat", "-m", model, "-p", "the", "-n", 3, "-c", 128)
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "loading" not in done.err
    assert main(["run", "-cnv", "-m", str(model), "-p", "the", "-n", "3", "-c", "128"]) == 0


class Terminal:
    """A process on a pseudo-terminal of 80 x 40, and what one sees there."""

    def __init__(self, argv: list[str], home: Path) -> None:
        self.screen = pyte.Screen(80, 40)
        self._stream = pyte.ByteStream(self.screen)
        self._main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "hybridkv.cli", *argv]
        self.process = subprocess.Popen(  # its controlling terminal turns Ctrl-C into a signal
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no thread holds a lock here
        )
        os.close(side)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).strip()

    def wait_for(self, text: str, *, busy: bool = False, seconds: float = 90) -> None:
        """Wait for a text, and for the prompt behind it: keys typed earlier are edited by the system."""
        end = time.monotonic() + seconds
        while text not in self.text or not (busy or self.text.endswith("\n>")):
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"{text!r} never came:\n{self.text}")
            if select.select([self._main], [], [], 0.2)[0]:
                try:
                    self._stream.feed(os.read(self._main, 4096))
                except OSError as error:  # the other end is closed
                    raise AssertionError(f"{text!r} never came:\n{self.text}") from error

    def close(self) -> int:
        end = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self._main], [], [], 0.2)[0]:
                try:
                    os.read(self._main, 4096)
                except OSError:
                    break
        code = self.process.wait(60)
        os.close(self._main)
        return code


def test_a_terminal_is_driven(model: Path, tmp_path: Path) -> None:
    terminal = Terminal(["chat", "-m", str(model), "-c", "512", "-t", "1", "-n", "40", "--ignore-eos"], tmp_path)
    terminal.wait_for("/help lists commands")
    terminal.type("/system be brief\r")
    terminal.wait_for("system: be brief")
    terminal.type("one line\x1b\ranother\r")  # Alt-Enter between them
    terminal.wait_for("note: -n ends the answer here")
    terminal.type("/stats\r")
    terminal.wait_for("answer: 40 tokens")
    terminal.type("half a li\x03")  # Ctrl-C clears a line and leaves nobody
    terminal.type("/think\r")
    terminal.wait_for("no thoughts")
    terminal.type("/quit\r")
    assert terminal.close() == 0
    history = (tmp_path / "hybridkv" / "history").read_text()
    assert "+one line\n+another\n" in history


def test_control_c_stops_the_answer_and_not_the_program(model: Path, tmp_path: Path) -> None:
    terminal = Terminal(["chat", "-m", str(model), "-c", "200000", "-t", "1", "--ignore-eos"], tmp_path)
    terminal.wait_for("/help lists commands")
    terminal.type("go on for ever\r")
    terminal.wait_for("go on for ever\n", busy=True)
    time.sleep(1.0)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.type("/reset\r")
    terminal.wait_for("begun anew")
    terminal.type("\x04")
    assert terminal.close() == 0
