"""The attributes asked of a config and of a model, whoever made them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Config(Protocol):
    """A Transformers config. What a family has beside this, its own code reads from the text part."""

    model_type: str

    def get_text_config(self, decoder: bool = ...) -> Any:
        """Return the part that describes the language model; the config itself where there is no other."""
        ...


class LanguageModel(Protocol):
    """A `NativeModel`, or a Transformers causal language model loaded with `attn_implementation="hybridkv"`."""

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """Device that it runs on."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of its plain weights."""
        ...
