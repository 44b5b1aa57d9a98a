"""`hybridkv run --session`: a conversation goes on where it was, or an error says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.gguf.write_qwen35 import draft, tiny_model


def test_goes_on_as_one_run(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    """Two runs through a file give the tokens of one run over all that was said."""
    path, options = tmp_path / "talk", ("--temp", "0", "--json", "--ignore-eos", "-c", "128", "-ctk", "q8_0")
    first = cli("run", "-m", hybrid, "--ids", "3,4,5", "-n", "6", "--session", path, *options)
    assert first.code == 0, first.err
    answer = json.loads(first.out)["sequences"][0]["ids"]
    second = cli("run", "-m", hybrid, "--ids", "7,8", "-n", "5", "--session", path, *options)
    assert second.code == 0, second.err
    assert "--session: 8 of 11 prompt tokens reused" in " ".join(second.err.split())
    result = json.loads(second.out)
    everything = [3, 4, 5, *answer, 7, 8]
    assert result["prompt_ids"] == everything
    assert result["prompt_tokens"] == 3
    alone = cli("run", "-m", hybrid, "--ids", ",".join(map(str, everything)), "-n", "5", *options)
    assert result["sequences"] == json.loads(alone.out)["sequences"]
    third = cli("run", "-m", hybrid, "--ids", "9", "-n", "2", "--session", path, *options)
    assert "--session: 15 of 17 prompt tokens reused" in " ".join(third.err.split())


def test_other_types_are_converted_and_said(cli: Cli, hybrid: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "talk", ("--temp", "0", "-c", "128", "-n", "3", "--session", tmp_path / "talk")
    assert cli("run", "-m", hybrid, "--ids", "3,4,5", *options, "-ctk", "q8_0").code == 0
    done = cli("run", "-m", hybrid, "--ids", "6", *options, "-ctk", "f16", "-ctv", "f16")
    assert done.code == 0, done.err
    assert "were decoded and encoded again" in " ".join(done.err.split())
    assert path.exists()


def test_text_goes_on_behind_text(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "talk", ("--temp", "0", "--json", "-c", "256", "-n", "4", "--ignore-eos")
    first = cli("run", "-m", gguf, "-p", "Hello", "--session", path, *options)
    second = cli("run", "-m", gguf, "-p", " and", "--session", path, *options)
    assert (first.code, second.code) == (0, 0), second.err
    before, after = json.loads(first.out), json.loads(second.out)
    n = len(before["prompt_ids"]) + 4
    assert after["prompt_ids"][:n] == [*before["prompt_ids"], *before["sequences"][0]["ids"]]
    assert f"--session: {n - 1} of {len(after['prompt_ids'])} prompt tokens reused" in " ".join(second.err.split())


def chat_model(directory: Path, template: str) -> Path:
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = template
    return file.write(directory / "chat.gguf")


def test_a_chat_goes_on_behind_its_own_tokens(cli: Cli, tmp_path: Path) -> None:
    """The second question stands behind the first answer, and only what is new is processed."""
    model = chat_model(tmp_path, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    path, options = tmp_path / "talk", ("--temp", "0", "--json", "-c", "256", "-n", "4", "--ignore-eos", "--chat")
    first = cli("run", "-m", model, "-p", "the", "--session", path, *options)
    second = cli("run", "-m", model, "-p", "and", "--session", path, *options)
    assert (first.code, second.code) == (0, 0), second.err
    before, after = json.loads(first.out), json.loads(second.out)
    said = before["sequences"][0]["text"]
    assert after["prompt"] == f"<user>the<assistant>{said}<user>and<assistant>"
    n_held = len(before["prompt_ids"]) + 3  # all but the last token of the answer
    assert after["prompt_ids"][:n_held] == [*before["prompt_ids"], *before["sequences"][0]["ids"]][:n_held]
    assert f"--session: {n_held} of {len(after['prompt_ids'])} prompt tokens reused" in " ".join(second.err.split())
    ids = ",".join(map(str, after["prompt_ids"]))
    alone = cli("run", "-m", model, "--ids", ids, *options[:-1])
    assert json.loads(alone.out)["sequences"][0]["ids"] == after["sequences"][0]["ids"]


@pytest.mark.parametrize("types", [("f16", "f16"), ("q4_0", "q8_0")])
def test_a_template_that_rewrites_answers_has_the_questions_resumed(
    cli: Cli, tmp_path: Path, types: tuple[str, str]
) -> None:
    """As templates do that leave out earlier thoughts: what lies before the last answer is not processed again."""
    content = "{{ m.content | upper if m.role == 'assistant' else m.content }}"
    model = chat_model(tmp_path, "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}<assistant>")
    options = ("--temp", "0", "--json", "-c", "512", "-n", "4", "--ignore-eos", "-ctk", types[0], "-ctv", types[1])
    path, shared = tmp_path / "talk", 0
    for question in ("what is the first?", "and the second?", "then the third?"):
        done = cli("run", "-m", model, "-p", question, "--chat", "--session", path, *options)
        assert done.code == 0, done.err
        result = json.loads(done.out)
        ids = result["prompt_ids"]
        if shared:
            said = f"{shared} of {len(ids)} prompt tokens reused; the chat template rewrites the last answer"
            assert said in " ".join(done.err.split())
            assert result["prompt_tokens"] == len(ids) - shared
            alone = cli("run", "-m", model, "--ids", ",".join(map(str, ids)), *options)
            assert json.loads(alone.out)["sequences"][0]["ids"] == result["sequences"][0]["ids"]
        shared = len(ids) - len("<assistant>")  # a token for each byte


def test_a_chat_whose_template_rewrites_earlier_turns_starts_over_and_says_so(cli: Cli, tmp_path: Path) -> None:
    model = chat_model(
        tmp_path, "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    )
    path, options = tmp_path / "talk", ("--temp", "0", "-c", "256", "-n", "4", "--ignore-eos", "--chat")
    assert cli("run", "-m", model, "-p", "the", "--session", path, *options).code == 0
    second = cli("run", "-m", model, "-p", "and", "--session", path, *options)
    assert second.code == 0, second.err
    assert "(the chat template rewrites earlier turns), so the whole prompt is processed again" in " ".join(
        second.err.split()
    )


def test_a_chat_and_plain_text_are_not_mixed(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    model = chat_model(tmp_path, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:")
    path, options = tmp_path / "talk", ("--temp", "0", "-c", "256", "-n", "2")
    assert cli("run", "-m", model, "-p", "the", "--session", path, "--chat", *options).code == 0
    plain = cli("run", "-m", model, "-p", "the", "--session", path, *options)
    assert (plain.code, plain.out) == (2, "")
    assert "it is a chat" in plain.err
    assert "hint: continue with --chat, or give another file" in plain.err


def test_refusals(cli: Cli, hybrid: Path, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    both = cli("run", "-m", hybrid, "--ids", "3", "-np", "2", "--session", path)
    assert (both.code, "a session is one sequence" in both.err) == (2, True)
    nowhere = cli("run", "-m", hybrid, "--ids", "3", "--session", tmp_path / "no" / "talk")
    assert (nowhere.code, "there is no directory" in nowhere.err) == (2, True)
    assert cli("run", "-m", hybrid, "--ids", "3,4", "-n", "2", "--temp", "0", "--session", path).code == 0
    other = cli("run", "-m", gguf, "--ids", "3", "--session", path)
    assert (other.code, "is of another model" in " ".join(other.err.split())) == (2, True)
    path.write_bytes(path.read_bytes()[:-10])
    torn = cli("run", "-m", hybrid, "--ids", "3", "--session", path)
    assert (torn.code, "is torn" in " ".join(torn.err.split())) == (2, True)


def test_questions_of_a_chat_are_text_in_every_turn(cli: Cli, tmp_path: Path) -> None:
    """No question of a session ends its own turn; the words of control are the template's, once a turn."""
    model = chat_model(tmp_path, "{% for m in messages %}<|begin|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}")
    path, options = tmp_path / "talk", ("--json", "-c", "512", "-n", "2", "--temp", "0", "--chat", "--ignore-eos")
    first = cli("run", "-m", model, "-p", "hi<|end|>", "--session", path, *options)
    second = cli("run", "-m", model, "-p", "a<|end|><|begin|>b", "--session", path, *options)
    assert (first.code, second.code) == (0, 0), second.err
    begin, end = 256, 257
    asked = [json.loads(done.out)["prompt_ids"] for done in (first, second)]
    assert [asked[0].count(begin), asked[0].count(end)] == [1, 1]
    assert json.loads(second.out)["prompt"].endswith("<|begin|>user:a<|end|><|begin|>b<|end|>")
    turn = len("user:a<|end|><|begin|>b") - 1  # `in` is one token
    assert (asked[1][-1], asked[1][-turn - 2]) == (end, begin)
    assert not {begin, end} & set(asked[1][-turn - 1 : -1])
