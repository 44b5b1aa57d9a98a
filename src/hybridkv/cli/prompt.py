"""The prompt of `hybridkv run`: its text, read and checked before a model is touched, and then its tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.chat_options import read_text, unescaped
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.model.protocols import LanguageModel
    from hybridkv.text.control_words import Covered


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-p`, `-f`, `--ids` and `--chat`."""
    parser.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the prompt; without --chat it may contain control tokens such as <|im_end|>",
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="read the prompt from a UTF-8 file; without -p, -f and --ids it is read from a pipe",
    )
    parser.add_argument("--ids", metavar="N,N,...", help="the prompt as token ids; the answer is printed as ids")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument(
        "--display-prompt",
        action=argparse.BooleanOptionalAction,
        help="print the prompt before the answer (default: without --chat)",
    )


def read_prompt(a: argparse.Namespace) -> str | list[int]:
    """Read the prompt as given: text, or token ids; what is piped in if no option says.

    Raises
    ------
    UsageError
        If there is none, more than one, or one that cannot be read.
    """
    given = [option for option, value in (("-p", a.prompt), ("-f", a.file), ("--ids", a.ids)) if value is not None]
    if not given and (piped := _piped()):
        return piped
    if len(given) != 1:
        asked = "no prompt was given" if not given else f"{' and '.join(given)} were given together"
        raise UsageError(
            f"{asked}; allowed: one of -p TEXT, -f FILE, --ids N,N,..., or text on stdin", hint='try -p "Hello world"'
        )
    if a.chat and a.ids is not None:
        raise UsageError("--chat and --ids were given together", hint="a chat template needs text: use -p")
    text = read_text("-f", Path(a.file)) if a.file is not None else unescaped(a, a.prompt)
    prompt = _parse_ids(a.ids) if a.ids is not None else text
    if not prompt:
        raise UsageError(f"{given[0]}: the prompt is empty", hint='give some text, for example -p "Hello world"')
    if isinstance(prompt, str) and not prompt.isascii():
        check_text("-p", prompt)
    return prompt


def is_typed(a: argparse.Namespace) -> bool:
    """Check whether a person sits at the terminal and the options give no prompt yet."""
    return a.prompt is None and a.file is None and sys.stdin is not None and sys.stdin.isatty()


def _piped() -> str:
    """Read text from stdin, "" if there is none or a person sits there."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not UTF-8 text (byte {error.start})") from error


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model sees it: its text ("" for ids), its tokens, and the conversation that it ends, if any."""

    text: str
    ids: list[int]
    chat: Covered | None = None


def prompt_tokens(
    prompt: str | list[int],
    model: LanguageModel,
    tokenizer: Any | None,
    *,
    chat: bool,
    before: Sequence[Mapping[str, str]] = (),
    variables: Mapping[str, Any] | None = None,
    continues: bool = False,
) -> PromptTokens:
    """Tokenize a prompt. Control words in plain text are control words, as in llama-cli; in a chat they are text.

    Parameters
    ----------
    before
        Earlier messages of the conversation, with `chat`.
    variables
        Of the chat template.
    continues
        Whether plain text follows other text, so that nothing marks its beginning.

    Raises
    ------
    UsageError
        If the model has no tokenizer, no chat template, or no such token ids.
    ModelFileError
        If its chat template fails, or tries what it must not.
    """
    if not isinstance(prompt, str):
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if max(prompt) >= vocabulary:
            raise UsageError(f"--ids: {max(prompt)}; this model's tokens are 0 to {vocabulary - 1}")
        return PromptTokens("", prompt)
    if tokenizer is None:
        raise UsageError("this model has no tokenizer", hint="give the prompt as token ids with --ids")
    from hybridkv.text.control_words import ControlWords

    words = ControlWords(tokenizer)
    if chat:
        from hybridkv.text.chat import chat_prompt

        rendered = chat_prompt(words, [*before, {"role": "user", "content": prompt}], variables)
        return PromptTokens(rendered.text, rendered.ids(), rendered)
    return PromptTokens(prompt, words.encode(prompt, begins=not continues))


def _parse_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    # 18 digits fit 64 bits; Python refuses to parse numbers of thousands of digits.
    if not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts):
        raise UsageError(f"--ids {text!r}; allowed: token ids, separated by commas", hint="try --ids 1,2,3")
    return [int(part) for part in parts]


def check_text(option: str, text: str) -> None:
    """Refuse what is no UTF-8.

    Raises
    ------
    UsageError
        With the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # The shell hands over bytes; those that are no UTF-8 arrive as lone surrogates.
        raise UsageError(f"{option}: not UTF-8 text (character {error.start})") from error
