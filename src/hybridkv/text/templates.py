"""The variables that a chat template reads. It is parsed and never run here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

OF_RENDERING = frozenset(
    {
        *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "tokenizer_kwargs",
    }
)
"""Names that mean something to Transformers' `apply_chat_template`."""

RESERVED = OF_RENDERING | {"tools", "documents", "self"}
"""Names that are no variables of a template's own: the renderer gives them a meaning."""


def template_source(tokenizer: Any) -> str:
    """Return the text of the chat template; of several by name, all texts together, "" if there is none."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return "\n".join(text for text in template.values() if isinstance(text, str))
    return template if isinstance(template, str) else ""


def template_variables(source: str) -> frozenset[str]:
    """Collect the names that a template takes from outside; of one that does not parse, every word in it."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except (TemplateSyntaxError, RecursionError):  # `{% generation %}` is Transformers' own tag
        return frozenset(re.findall(r"[A-Za-z_]\w*", source))
