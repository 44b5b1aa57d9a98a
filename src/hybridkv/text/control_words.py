"""Control words, such as `<|im_end|>`: a chat template writes them, and text that people wrote never does.

A template joins its own words and the messages into one string, in which nothing tells them apart. So before it is
rendered, the first character of every control word is covered in the messages: a private-use character stands in for
it. Whatever a template does to a message (trim, slice, search, remove, write as JSON), no control word can begin in it.
The tokenizer looks for control words first and takes the stand-ins back afterwards, so that a covered word becomes the
tokens that its characters have as text. Lengths and positions are the same with and without stand-ins.

Control words are the special tokens and those that look like them. Other added tokens (`<tool_call>` in vocabularies of
Qwen) are text as any: they are matched whole in messages too, as llama.cpp does. Templates search messages for words
such as `</think>`; these are left as they are unless they are control words. An assistant's messages alone may carry
control words that enclose thoughts: the model wrote them, and templates cut there.

Used by `hybridkv.text.chat`, and by the command line for plain prompts and rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from hybridkv.errors import ModelFileError

_THOUGHTS = ("<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>")
"""Words that enclose an assistant's thoughts, where they are control words at all."""

_STAND_INS = range(0xE000, 0xF900)


def is_control(word: str, *, special: bool) -> bool:
    """Check whether an added token is a control word.

    Files do not always mark them as special. Source: llama.cpp, convert_hf_to_gguf.py (`does_token_look_special`),
    which makes such tokens CONTROL in GGUF files; and the turns of Gemma.
    """
    if special or word in ("<pad>", "<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>", "<EOT>"):
        return True
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(word.startswith(first) and word.endswith(last) for first, last in ends)


class ControlWords:
    """The control words of a tokenizer, and what its chat template searches for.

    Parameters
    ----------
    tokenizer
        A `TextTokenizer`, or a fast Transformers tokenizer. What its file or an earlier call may have asked for is
        turned off: truncation, padding, special tokens as text.

    Attributes
    ----------
    ids, by_id
        Id of each control word, and the other way round.
    firsts
        The characters that control words begin with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        self.added: Mapping[int, AddedToken] = self.backend.get_added_tokens_decoder()
        named = set(tokenizer.all_special_tokens)
        self.ids = {
            token.content: index
            for index, token in self.added.items()
            if is_control(token.content, special=token.special or token.content in named) and token.content.strip()
        }
        self.by_id = {index: word for word, index in self.ids.items()}
        self._words = {word.lstrip() for word in self.ids}
        self.firsts = "".join(sorted({word[0] for word in self._words}))
        self._begin, self._end = self._affixes()
        self._cover = Cover(self, _STAND_INS[: len(self.firsts)])

    def cover_of(self, texts: Iterable[str]) -> Cover:
        """Choose stand-ins that occur in none of the texts, nor in the chat template.

        Raises
        ------
        ModelFileError
            If every private-use character is taken.
        """
        texts = [*texts, *_sources(self.tokenizer.chat_template)]
        if not any(self._cover.occurs_in(text) for text in texts):
            return self._cover
        used = {ord(character) for text in texts for character in text}
        escapes = {int(digits, 16) for text in texts for digits in re.findall(r"\\u([ef][0-9a-f]{3})", text, re.I)}
        free = list(islice((code for code in _STAND_INS if code not in used | escapes), len(self.firsts)))
        if len(free) < len(self.firsts):
            raise ModelFileError("the messages take all private-use characters, by which control words are kept out")
        return Cover(self, free)

    def pattern(self, *, thoughts: bool) -> re.Pattern[str]:
        """Match what is left as it is, and single characters to cover."""
        return self._patterns[thoughts]

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Without and with the words that enclose thoughts; plain prompts need neither."""
        kept = set(self._kept(self._words))
        return self._compile(kept), self._compile(kept | (self._words & set(_THOUGHTS)))

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Tokenize a prompt that may name control words, as llama.cpp takes prompts.

        Parameters
        ----------
        begins
            Whether the text begins a sequence: what the vocabulary asks for is put around it, the beginning of text
            only unless the prompt names it already.
        """
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        return self.enclose(ids) if begins else ids

    def enclose(self, ids: list[int]) -> list[int]:
        """Put what the vocabulary adds around the ids of a text, the beginning of text once."""
        begun = bool(self._begin) and ids[: len(self._begin)] == self._begin
        return [*([] if begun else self._begin), *ids, *self._end]

    @property
    def begins(self) -> str:
        """The words that the vocabulary puts before a text."""
        return "".join(self.by_id.get(index, "") for index in self._begin)

    def _affixes(self) -> tuple[list[int], list[int]]:
        """Find what the vocabulary adds before and after a text."""
        whole = list(self.backend.encode("x", add_special_tokens=True).ids)
        bare = list(self.backend.encode("x", add_special_tokens=False).ids)
        for begin in range(len(whole) - len(bare) + 1):
            if whole[begin : begin + len(bare)] == bare:
                return whole[:begin], whole[begin + len(bare) :]
        return [], []

    def _kept(self, words: set[str]) -> Iterator[str]:
        """Yield pieces of text that begin as control words and cannot become one: each up to the next such beginning.

        They are those of other added tokens, and of what the template may search for.
        """
        beginnings = {word[:length] for word in words for length in range(1, len(word) + 1)}
        others = [token.content for token in self.added.values() if token.content not in self.ids]
        for text in (*others, *_literals(self.tokenizer.chat_template)):
            begins = [index for index, character in enumerate(text) if character in self.firsts]
            for begin, end in pairwise([*begins, len(text)]):
                piece = text[begin:end]
                if piece not in beginnings and words.isdisjoint(piece[:n] for n in range(1, len(piece) + 1)):
                    yield piece

    def _compile(self, kept: set[str]) -> re.Pattern[str]:
        firsts = [f"[{re.escape(self.firsts)}]"] if self.firsts else []
        pieces = [re.escape(piece) for piece in sorted(kept, key=len, reverse=True)]
        return re.compile("|".join([*pieces, *firsts]) or r"(?!)")


class Cover:
    """Stand-ins for the first characters of control words, and a tokenizer that knows them.

    Parameters
    ----------
    words
        The control words.
    codes
        Code points of the stand-ins, one for each of `words.firsts`.
    """

    def __init__(self, words: ControlWords, codes: Iterable[int]) -> None:
        self._words = words
        self._stand_ins = dict(zip(words.firsts, map(chr, codes), strict=True))
        self._characters = str.maketrans({chr_: first for first, chr_ in self._stand_ins.items()})
        self._any = re.compile(f"[{''.join(self._stand_ins.values())}]" if self._stand_ins else r"(?!)")
        # How a template writes them that has JSON in ASCII alone.
        self._escapes = {f"\\u{ord(stand_in):04x}": stand_in for stand_in in self._stand_ins.values()}
        self._encoder: Tokenizer | None = None
        self._true_ids: dict[int, int] = {}

    def occurs_in(self, text: str) -> bool:
        """Check whether a text already holds a stand-in, or names one by its number."""
        if not text.isascii() and self._any.search(text) is not None:
            return True
        return "\\u" in text and any(escape in text.lower() for escape in self._escapes)

    def cover(self, text: str, *, thoughts: bool = False) -> str:
        """Cover the control words in a text that somebody wrote.

        Parameters
        ----------
        thoughts
            Whether the words that enclose an assistant's thoughts keep their meaning.
        """
        kept = self._words.pattern(thoughts=thoughts)
        return kept.sub(lambda match: match[0] if len(match[0]) > 1 else self._stand_ins.get(match[0], match[0]), text)

    def cover_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Cover every text of a message but its role."""
        thoughts = message.get("role") == "assistant"

        def covered(value: Any) -> Any:
            if isinstance(value, str):
                return self.cover(value, thoughts=thoughts)
            if isinstance(value, Mapping):
                return {covered(key): covered(held) for key, held in value.items()}
            return [covered(held) for held in value] if isinstance(value, (list, tuple)) else value

        return {key: value if key == "role" else covered(value) for key, value in message.items()}

    def rendered(self, text: str) -> str:
        """Write stand-ins as characters in a template's text wherever it has written their numbers."""
        if "\\u" in text:
            for escape, stand_in in self._escapes.items():
                text = text.replace(escape, stand_in)
        return text

    def uncover(self, text: str) -> str:
        """Write covered text as it reads."""
        return text.translate(self._characters)

    def encode(self, text: str) -> list[int]:
        """Tokenize a text that is covered where people wrote it; nothing is added around it."""
        if self._any.search(text) is None:
            return list(self._words.backend.encode(text, add_special_tokens=False).ids)
        if self._encoder is None:
            self._encoder = self._build()
        encoding = self._encoder.encode(text, add_special_tokens=False)
        ids = [self._true_ids.get(index, index) for index in encoding.ids]
        control = self._words.by_id
        # A vocabulary made by merges may have a way to a control word that leads over its letters.
        forged = [
            n
            for n, index in enumerate(ids)
            if index in control and self._any.search(text, *encoding.offsets[n]) is not None
        ]
        for n in reversed(forged):
            ids[n : n + 1] = self._apart(control[ids[n]], control)
        return ids

    def _apart(self, word: str, control: Mapping[int, str]) -> list[int]:
        """Return the ids of a control word's letters, none of which is a control word."""
        if len(word) == 1:
            return []  # no vocabulary has such a word; there is no other way to write it
        ids: list[int] = []
        for part in (word[:1], word[1:]):
            for token in self._words.backend.model.tokenize(part):
                ids += self._apart(control[token.id], control) if token.id in control else [token.id]
        return ids

    def _build(self) -> Tokenizer:
        """Build the tokenizer over the same vocabulary, which finds control words before it takes stand-ins back."""
        backend, words = self._words.backend, self._words
        encoder = Tokenizer(backend.model)
        back = [normalizers.Replace(stand_in, first) for first, stand_in in self._stand_ins.items()]
        own = [] if backend.normalizer is None else [backend.normalizer]
        encoder.normalizer = normalizers.Sequence([*back, *own])
        if backend.pre_tokenizer is not None:
            encoder.pre_tokenizer = backend.pre_tokenizer
        added = sorted(words.added.items())
        encoder.add_tokens(
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized and token.content not in words.ids,
                    special=token.special,
                )
                for _, token in added
            ]
        )
        # Ids follow one another here, while a file may leave some out.
        for index, token in added:
            ours = encoder.token_to_id(token.content)
            assert ours is not None
            if ours != index:
                self._true_ids[ours] = index
        return encoder


@dataclass(frozen=True, slots=True)
class Covered:
    """A prompt that is covered where people wrote it."""

    covered: str
    cover: Cover

    @property
    def text(self) -> str:
        """As it reads."""
        return self.cover.uncover(self.covered)

    def ids(self, begin: int = 0) -> list[int]:
        """Tokenize the text from a character on; nothing is added around it."""
        return self.cover.encode(self.covered[begin:])

    def find_last(self, text: str) -> int | None:
        """Find the last place, in characters, of a text that somebody wrote; None if there is none."""
        at = self.covered.rfind(self.cover.cover(text)) if text else -1
        return None if at < 0 else at

    def after_last(self, text: str) -> list[int]:
        """Tokenize what the template writes behind the last place of a text that somebody wrote."""
        at = self.find_last(text)
        return [] if at is None else self.ids(at + len(self.cover.cover(text)))

    def followed_by(self, text: str) -> Covered:
        """Put text that somebody wrote behind the prompt; it holds no stand-in."""
        return Covered(self.covered + self.cover.cover(text), self.cover)


def _sources(template: Any) -> list[str]:
    """List the texts of a chat template: one, several by name, or none."""
    if isinstance(template, str):
        return [template]
    return [text for text in template.values() if isinstance(text, str)] if isinstance(template, Mapping) else []


def _literals(template: Any) -> Iterator[str]:
    """Yield the strings in a template's expressions; none of one that is no Jinja, which rendering refuses."""
    from jinja2 import Environment, TemplateSyntaxError  # a plain prompt needs none of it

    for source in _sources(template):
        try:
            for _, kind, value in Environment().lex(source):
                if kind == "string":
                    yield value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape", "replace")
        except (TemplateSyntaxError, RecursionError):
            continue
