"""The input of `hybridkv classify`: labels, rows and the prompt around them, and then their tokens.

All of it is read and checked before a model is touched. A prompt is tokenized as a whole, as a model sees it anywhere
else: where it meets a row's text there is no seam. `hybridkv.engine.classify` finds out which tokens all prompts begin
with. A label is what its tokens add to a prompt's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.text.control_words import ControlWords, Covered

DEFAULT_PROMPT = "Choose the label that fits the text.\nLabels: {labels}\n\nText: {text}\nLabel:"

_SHOWN = 60  # characters of a user's text in an error


@dataclass(frozen=True, slots=True)
class Row:
    """A text, and the label it should get if that is known."""

    text: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Template:
    """The text before and after a row's own."""

    before: str
    after: str

    def around(self, text: str) -> str:
        """Put a text into the prompt."""
        return self.before + text + self.after


def parse_labels(text: str) -> tuple[str, ...]:
    """Parse `a,b,c` as labels.

    Raises
    ------
    UsageError
        For fewer than two, an empty one, or one that is given twice.
    """
    labels = tuple(part.strip() for part in text.split(","))
    for label in labels:
        _check_utf8(label, "--labels")
        if not label:
            raise UsageError(f"--labels {_short(text)}: a label is empty; allowed: words, separated by commas")
        if labels.count(label) > 1:
            raise UsageError(f"--labels {_short(text)}: {label!r} is given twice")
    if len(labels) < 2:
        raise UsageError(
            f"--labels {_short(text)}; allowed: at least two labels", hint="try --labels positive,negative"
        )
    return labels


def read_template(text: str | None, labels: Sequence[str]) -> Template:
    """Read the prompt, given as a file's name or as itself, and fill in its `{labels}`.

    Raises
    ------
    UsageError
        Unless `{text}` stands in it exactly once.
    """
    if text is None:
        text = DEFAULT_PROMPT
    elif os.path.isfile(text):  # noqa: PTH113 - Path.is_file raises for what is too long to be a name
        text = _read(Path(text), "--prompt").removesuffix("\n")
    _check_utf8(text, "--prompt")
    if text.count("{text}") != 1:
        count = "no {text} in it" if "{text}" not in text else f"{text.count('{text}')} times {{text}} in it"
        raise UsageError(
            f"--prompt {_short(text)}: {count}; allowed: a template, or a file with one, in which {{text}} stands once",
            hint='try --prompt "{text} Topic:", or the name of a file that exists',
        )
    before, _, after = text.partition("{text}")
    listed = ", ".join(labels)
    return Template(before.replace("{labels}", listed), after.replace("{labels}", listed))


def read_rows(path: Path, labels: Sequence[str]) -> list[Row]:
    """Read the rows of a JSONL file; empty lines are skipped.

    Raises
    ------
    UsageError
        By line number, for one that is no JSON object with a text, or whose label is none of `labels`: counting it as
        wrong would be as arbitrary as leaving it out.
    """
    # Not splitlines: it also splits at characters that a JSON string may hold as they are.
    lines = enumerate(_read(path, "-f").split("\n"), 1)
    rows = [_row(line, f"-f {path}, line {number}", labels) for number, line in lines if line.strip()]
    if not rows:
        raise UsageError(f"-f {path}: it has no rows", hint='a row is a line such as {"text": "...", "label": "..."}')
    return rows


def _row(line: str, where: str, labels: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})", hint="one JSON object a line") from error
    example = 'a row is a line such as {"text": "...", "label": "..."}'
    if not isinstance(row, dict) or "text" not in row:
        what = "no text" if isinstance(row, dict) else "no JSON object"
        raise UsageError(f"{where}: {what}", hint=example)
    text, label = row["text"], row.get("label")
    for name, value, allowed in (("text", text, str), ("label", label, str | None)):
        if not isinstance(value, allowed):
            raise UsageError(f"{where}: {name!r} must be a string, got {_short(json.dumps(value))}", hint=example)
    _check_utf8(text, where)
    if label is not None and label not in labels:
        raise UsageError(
            f"{where}: its label {_short(label)} is none of --labels {', '.join(labels)}",
            hint="add it to --labels, or take it out of the row",
        )
    return Row(text, label)


def encode(
    template: Template, rows: Sequence[Row], labels: Sequence[str], tokenizer: Any | None, *, chat: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize every row's prompt, and every label as it follows one.

    Control words are the template's alone; those in a row are text, so that no row ends its prompt before its label.
    A prompt's last spaces are the labels', whose first token begins with one where the tokenizer's do; after a line
    break there is none.

    Raises
    ------
    UsageError
        If the model has no tokenizer, a label no tokens or those of another, or the prompt's last token changes when
        a label follows.
    """
    if tokenizer is None:
        raise UsageError("this model has no tokenizer", hint="classify reads text: take a model with one")
    from hybridkv.text.control_words import ControlWords

    words = ControlWords(tokenizer)

    def ids(covered: Covered) -> list[int]:
        return covered.ids() if chat else words.enclose(covered.ids())

    some = _prompt(template, "x", words, chat)
    gap, begin = "" if some.covered.endswith("\n") else " ", ids(some)
    ends: list[list[int]] = []
    for label in labels:
        whole = ids(some.followed_by(gap + label))
        if whole[: len(begin)] != begin:
            raise UsageError(
                f"the label {label!r} merges with the end of the prompt, {some.text[-10:]!r}",
                hint="end the prompt with a word, a colon or a line break",
            )
        end = whole[len(begin) :]
        if not end or end in ends:
            twin = f"the same tokens as {labels[ends.index(end)]!r}" if end else "no tokens"
            raise UsageError(f"the label {label!r} has {twin} in this model", hint="choose another word for it")
        ends.append(end)
    return [ids(_prompt(template, row.text, words, chat)) for row in rows], ends


def _prompt(template: Template, text: str, words: ControlWords, chat: bool) -> Covered:
    """Render the prompt of a row's text, without spaces at its end."""
    from hybridkv.text.chat import chat_prompt
    from hybridkv.text.control_words import Covered

    if chat:
        prompt = chat_prompt(words, [{"role": "user", "content": template.around(text)}])
    else:
        cover = words.cover_of([template.before, text, template.after])
        prompt = Covered(template.around(cover.cover(text)), cover)
    return Covered(prompt.covered.rstrip(" "), prompt.cover)


def _read(path: Path, option: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # an editor's byte order mark is no text
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text (byte {error.start})") from error


def _check_utf8(text: str, where: str) -> None:
    """Refuse characters that no text has; JSON escapes and a shell's bytes can make them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: not UTF-8 text (character {error.start})") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
