"""The options of a chat: its system message, its template, and how its text is read and shown."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError, one_of
from hybridkv.text.named_templates import TEMPLATES, named_template

_SWITCH = ("on", "off", "auto")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options in llama-cli's spellings."""
    group = parser.add_argument_group("chat")
    for names, text in (
        (("-cnv", "--conversation"), "hold a conversation, like `hybridkv chat`"),
        (("-st", "--single-turn"), "answer one message in the model's chat template, as --chat does"),
        (("-i", "--interactive", "-if", "--interactive-first"), "same as -cnv"),
    ):
        group.add_argument(*names, action="store_true", help=text)
    group.add_argument(
        "-no-cnv", "--no-conversation", action="store_true", help="answer one prompt without a template (default)"
    )
    group.add_argument("-sys", "--system-prompt", metavar="TEXT", help="system message; turns the prompt into a chat")
    group.add_argument(
        "-sysf", "-spf", "--system-prompt-file", metavar="FILE", help="read the system message from a UTF-8 file"
    )
    add_template_arguments(group)
    add_variable_arguments(group, "variables of the chat template")
    add_text_arguments(group)


def add_variable_arguments(group: argparse._ActionsContainer, what: str) -> None:
    """Add `--chat-template-kwargs`, `--reasoning` and `--reasoning-effort`."""
    group.add_argument("--chat-template-kwargs", metavar="JSON", help=f'{what}: {{"enable_thinking": false}}')
    group.add_argument(
        "-rea", "--reasoning", metavar="on|off|auto", help="set the template's enable_thinking (default auto: leave it)"
    )
    group.add_argument("--reasoning-effort", metavar="LEVEL", help="set the template's reasoning_effort")


def add_template_arguments(group: argparse._ActionsContainer) -> None:
    """Add `--chat-template` and `--chat-template-file`."""
    group.add_argument(
        "--chat-template",
        metavar="JINJA|NAME",
        help="chat template that replaces the model's own: its text, or llama.cpp's name of it, such as chatml",
    )
    group.add_argument("--chat-template-file", metavar="FILE", help="file with such a template")


def template_of(a: argparse.Namespace) -> str | None:
    """Read the template: its text, or a name; None for the model's own.

    Raises
    ------
    UsageError
        For a file that cannot be read, and for a name that there is not.
    """
    if a.chat_template is not None and a.chat_template_file is not None:
        raise UsageError("--chat-template and --chat-template-file were given together", hint="one of them will do")
    if a.chat_template_file is not None:
        return read_text("--chat-template-file", Path(a.chat_template_file))
    if a.chat_template is not None and "{" not in a.chat_template:
        return one_of(a.chat_template, tuple(TEMPLATES), "--chat-template", hint="or give --chat-template-file FILE")
    return None if a.chat_template is None else str(a.chat_template)


def add_text_arguments(group: argparse._ActionsContainer) -> None:
    """Add `-e`, `--no-escape` and `-r`."""
    group.add_argument(
        "-e",
        "--escape",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=r"process escapes such as \n, \t, \\, \" and \x41 in -p, -sys and -r, not in files (default on)",
    )
    group.add_argument(
        "-r",
        "--reverse-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop an answer before this text; repeatable",
    )


def is_chat(a: argparse.Namespace) -> bool:
    """Check whether a prompt is to be put into the chat template.

    Raises
    ------
    UsageError
        For options of a chat together with -no-cnv.
    """
    asked = [
        option
        for option, value in (
            ("--chat", a.chat),
            ("-cnv", a.conversation),
            ("-st", a.single_turn),
            ("-i", a.interactive),
            ("-sys", a.system_prompt),
            ("-sysf", a.system_prompt_file),
        )
        if value not in (None, False)
    ]
    if asked and a.no_conversation:
        raise UsageError(f"-no-cnv and {asked[0]} were given together", hint="one of them will do")
    of_chats = (
        ("--chat-template", a.chat_template),
        ("--chat-template-file", a.chat_template_file),
        ("--chat-template-kwargs", a.chat_template_kwargs),
        ("-rea", a.reasoning),
        ("--reasoning-effort", a.reasoning_effort),
    )
    given = [option for option, value in of_chats if value is not None]
    if not asked and not a.no_conversation and {"--chat-template", "--chat-template-file"} & set(given):
        return True
    if given and not asked:
        notice(f"{', '.join(given)}: no effect on a plain prompt; --chat puts it into the template")
    return bool(asked)


@dataclass(frozen=True, slots=True)
class ChatChoice:
    """A command line's options for chats.

    Attributes
    ----------
    system
        The system message; None for none.
    template
        In place of the model's own, or its name; None for the model's own.
    variables
        Of the template.
    thinks
        Whether thoughts are wanted at all.
    """

    system: str | None = None
    template: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    thinks: bool = True

    def put_on(self, tokenizer: Any | None) -> None:
        """Replace a tokenizer's template, and tell it where no thoughts are wanted."""
        if tokenizer is None:
            return
        if self.template in TEMPLATES:
            from hybridkv.text.control_words import ControlWords

            tokenizer.chat_template = named_template(str(self.template), ControlWords(tokenizer).begins)
        elif self.template is not None:
            tokenizer.chat_template = self.template
        if not self.thinks:
            from hybridkv.text.templates import template_source, template_variables

            known = template_variables(template_source(tokenizer))
            for name in {"enable_thinking", "thinking"} & known:
                self.variables.setdefault(name, False)


def chat_choice(a: argparse.Namespace) -> ChatChoice:
    """Read the options.

    Raises
    ------
    UsageError
        For files that cannot be read, text that is no template, and variables that are no JSON object.
    """
    if a.system_prompt is not None and a.system_prompt_file is not None:
        raise UsageError("-sys and -sysf were given together", hint="one of them will do")
    system = unescaped(a, a.system_prompt)
    if a.system_prompt_file is not None:
        system = read_text("-sysf", Path(a.system_prompt_file))
    return ChatChoice(system, template_of(a), variables_of(a), a.reasoning_budget != 0)


def template_variables(text: str | None) -> dict[str, Any]:
    """Read `--chat-template-kwargs`; nothing where it is left out.

    Raises
    ------
    UsageError
        For what is no JSON object.
    """
    try:
        variables = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_variables(f"{error.msg} (character {error.pos})") from error
    except RecursionError as error:
        raise _no_variables("it is nested too deeply") from error
    if not isinstance(variables, dict):
        raise _no_variables("it is no JSON object")
    return variables


def _no_variables(what: str) -> UsageError:
    return UsageError(f"--chat-template-kwargs: {what}", hint="""try '{"enable_thinking": false}'""")


def variables_of(a: argparse.Namespace) -> dict[str, Any]:
    """Read what the options say of the template's variables.

    Raises
    ------
    UsageError
        For what is no JSON object, and for a switch that there is not.
    """
    variables = template_variables(a.chat_template_kwargs)
    if variables:
        from hybridkv.text.templates import OF_RENDERING  # imports jinja2

        if taken := sorted(OF_RENDERING & variables.keys()):
            raise _no_variables(f"{', '.join(taken)} is not a variable")
    if a.reasoning is not None:
        if a.reasoning not in _SWITCH:
            raise UsageError(f"-rea {a.reasoning!r}; allowed: {', '.join(_SWITCH)}")
        if a.reasoning != "auto":
            variables["enable_thinking"] = a.reasoning == "on"
    if a.reasoning_effort not in (None, "default"):
        variables["reasoning_effort"] = a.reasoning_effort
    return variables


def say_unused_variables(template: str | None, variables: dict[str, Any]) -> None:
    """Name the variables that a template does not read."""
    unused = [name for name in variables if name not in (template or "")]
    if unused:
        notice(f"the chat template does not read {', '.join(unused)}: no effect")


def unescaped(a: argparse.Namespace, text: str | None) -> str | None:
    """Read escapes in a text of the command line, unless they are to stay."""
    return unescape(text) if text is not None and a.escape else text


def stops_of(a: argparse.Namespace) -> tuple[str, ...]:
    """List the texts before which an answer ends."""
    return tuple(str(unescaped(a, stop)) for stop in a.reverse_prompt if stop)


def unescape(text: str) -> str:
    r"""Read `\n`, `\r`, `\t`, `\'`, `\"`, `\\` and `\xHH`; others stay, as in llama.cpp.

    Source: llama.cpp, common/common.cpp (`string_process_escapes`).
    """
    plain = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}
    out, at = bytearray(), 0
    while (found := text.find("\\", at)) >= 0 and found + 1 < len(text):
        out += text[at:found].encode("utf-8", "surrogateescape")
        letter, digits = text[found + 1], text[found + 2 : found + 4]
        at = found + 2
        if letter in plain:
            out += plain[letter].encode()
        elif letter == "x" and len(digits) == 2 and all(d in "0123456789abcdefABCDEF" for d in digits):
            out.append(int(digits, 16))
            at = found + 4
        else:
            out += text[found:at].encode("utf-8", "surrogateescape")
    out += text[at:].encode("utf-8", "surrogateescape")
    return out.decode("utf-8", "surrogateescape")


def read_text(option: str, path: Path) -> str:
    """Read a UTF-8 file.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")  # an editor's byte order mark is no prompt
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text (byte {error.start})") from error
