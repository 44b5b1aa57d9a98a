"""`hybridkv run --session FILE`: resume a conversation, and save it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.cli.chat_options import ChatChoice, say_unused_variables
from hybridkv.cli.prompt import PromptTokens, prompt_tokens
from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.engine import Engine
    from hybridkv.engine.session import Session
    from hybridkv.model.protocols import LanguageModel


def check_session(a: argparse.Namespace) -> None:
    """Refuse what a session cannot be combined with, before a model is touched.

    Raises
    ------
    UsageError
        Saying why.
    """
    if a.session is None:
        return
    if a.parallel > 1:
        raise UsageError(f"--session and -np {a.parallel}; a session is one sequence", hint="leave -np out")
    directory = Path(a.session).resolve().parent
    if not directory.is_dir():
        raise UsageError(f"--session {a.session}: there is no directory {directory}")


@dataclass(slots=True)
class Conversation:
    """The session that a run resumes from, and its prompt.

    Attributes
    ----------
    path
        Of the session file; None without one.
    session
        What was there; None at the beginning.
    text, ids
        What the model sees now: all of the ids; of plain text only what is new.
    question
        The user's message, in a chat.
    before
        The messages before it, the system's among them.
    n_shared
        Tokens up to the question's end, which the next turn's prompt has too, whatever its template makes of the
        answer; 0 if it is no chat.
    """

    path: Path | None
    session: Session | None
    text: str
    ids: list[int]
    question: str | None
    before: tuple[Mapping[str, str], ...] = ()
    n_shared: int = 0

    @property
    def held(self) -> Session | None:
        """The session where its tokens begin the prompt: at its end, else behind its last question, else nowhere.

        A state cannot go back further, so a template that writes older turns another way has everything start over.
        """
        for session in () if self.session is None else (self.session, self.session.rewound()):
            if session is None or session.n_cached >= len(self.ids):
                continue
            if tuple(self.ids[: session.n_cached]) == session.tokens[: session.n_cached]:
                return session
        return None

    def hand_over(self, engine: Engine) -> None:
        """Resume the engine from the session, and report what was reused."""
        if self.session is None:
            return
        from hybridkv.engine.session import resume, stays_raised

        held = self.held
        if held is None:
            notice(
                f"--session: the prompt does not begin with the session's {self.session.n_cached} tokens (the chat "
                "template rewrites earlier turns), so the whole prompt is processed again"
            )
            return
        cache, converted = resume(held, engine.asked, engine.new_cache)
        if (done := converted or stays_raised(engine.asked, cache)) is not None:
            notice(f"--session: {done}")
        engine.adopt(cache, held.n_cached)
        rewritten = "" if held is self.session else "; the chat template rewrites the last answer"
        notice(f"--session: {held.n_cached} of {len(self.ids)} prompt tokens reused{rewritten}")

    def keep(self, engine: Engine, model: LanguageModel, *, answer: str, ended: bool) -> None:
        """Write the session, if there is one to write and anything was processed.

        An end token that was drawn is left out: what follows continues behind the answer.
        """
        if self.path is None or not engine.n_held:
            return
        from hybridkv.engine.session import Session, save_session

        messages = self.before
        if self.question is not None:
            said = {"role": "user", "content": self.question}
            messages = (*messages, said, {"role": "assistant", "content": answer})
        tokens = tuple(engine.history[0].tolist())
        tokens = tokens[: engine.n_held] if ended else tokens
        kept, cache = engine.kept, engine.cache.stored()
        if kept is not None and (kept[1].specs != cache.specs or kept[0] >= engine.n_held):
            kept = None  # the guard has raised types since
        asked = tuple(spec.types for spec in engine.asked)
        save_session(self.path, Session(tokens, engine.n_held, cache, messages, kept, asked), model)


def open_conversation(
    a: argparse.Namespace, prompt: str | list[int], model: LanguageModel, tokenizer: Any | None, choice: ChatChoice
) -> Conversation:
    """Tokenize the prompt, behind the tokens of the session file if there is one.

    Parameters
    ----------
    choice
        What the options say of chats; its template is put on the tokenizer.

    Raises
    ------
    UsageError
        As `prompt_ids` does, and for a session of the other kind: text or chat.
    SessionError
        If the file is not a session of this model.
    """
    path = None if a.session is None else Path(a.session)
    session = None
    if path is not None and path.exists():
        from hybridkv.engine.session import load_session

        session = load_session(path, model)
    if session is not None and bool(session.messages) != a.chat:
        kind, other = ("a chat", "with --chat") if session.messages else ("plain text", "without --chat")
        raise UsageError(f"--session {path}: it is {kind}", hint=f"continue {other}, or give another file")
    before = _before(session, choice)
    choice.put_on(tokenizer)
    if a.chat and tokenizer is not None:
        say_unused_variables(tokenizer.chat_template, choice.variables)
    new = prompt_tokens(
        prompt,
        model,
        tokenizer,
        chat=a.chat,
        before=before,
        variables=choice.variables,
        continues=session is not None and not a.chat,
    )
    ids = new.ids
    if session is not None:
        ids = _behind(session, new, tokenizer)
    question = prompt if a.chat and isinstance(prompt, str) else None
    n_shared = 0
    if path is not None and new.chat is not None and question is not None:
        opening = new.chat.after_last(question)
        n_shared = len(ids) - len(opening) if opening and ids[-len(opening) :] == opening else 0
    return Conversation(path, session, new.text, ids, question, before, n_shared)


def _before(session: Session | None, choice: ChatChoice) -> tuple[Mapping[str, str], ...]:
    """List the messages that a question follows."""
    if session is None:
        return () if choice.system is None else ({"role": "system", "content": choice.system},)
    messages = tuple(session.messages)
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if choice.system is not None and (first is None or first["content"] != choice.system):
        notice("-sys: the session began without this system message and continues without it")
    return messages


def _behind(session: Session, new: PromptTokens, tokenizer: Any) -> list[int]:
    """Put a prompt behind the session's tokens: those of a chat are kept if its text begins with theirs."""
    if new.chat is None:
        return [*session.tokens, *new.ids]
    held = session.tokens[: session.n_cached]
    begun = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [*held, *new.chat.ids(len(begun))] if new.text.startswith(begun) else new.ids
