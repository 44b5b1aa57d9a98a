"""The graph of a model as frozen records: branches, blocks, a head that guesses, the whole.

Tensor names are GGUF's; within a block they are relative to `blk.N.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hybridkv.model.layers import Norm, Part


@dataclass(frozen=True, slots=True)
class Branch:
    """`x += scale * after(sum of parts(norm(x)))`.

    Attributes
    ----------
    norm
        None where the parts read x itself.
    parts
        Side by side: each reads the same.
    after
        Of the sum.
    """

    norm: Norm | None
    parts: tuple[Part, ...]
    after: Norm | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: branches, one after the other."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A head of multi-token prediction: from a final hidden state and the token drawn there, the token behind that.

    `x = project([embed_norm(embedding of the token) | hidden_norm(hidden state)])`, one block over `x`, then `norm`:
    that is what the head's output matrix reads, and the hidden state from which the token after is predicted.

    Attributes
    ----------
    layer
        Number of its block in a file, behind the model's own.
    block
        Attends to a cache of its own.
    tokens
        Those that it guesses among, beside the text's newest; none for all.
    embed, head
        A head without one of these uses the model's.
    """

    layer: int
    block: Block
    embed_norm: Norm
    hidden_norm: Norm
    norm: Norm
    tokens: tuple[int, ...] = ()
    project: str = "nextn.eh_proj.weight"
    embed: str = "nextn.embed_tokens.weight"
    head: str = "nextn.shared_head_head.weight"

    @property
    def prefix(self) -> str:
        """Prefix of its tensors' names."""
        return f"blk.{self.layer}."


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A whole model: an embedding, blocks, a norm, and a head.

    Attributes
    ----------
    hidden
        Width of the residual stream.
    embed_scale
        Factor on the embedding.
    head
        Output matrix; a source without it uses the embedding (tied).
    logit_scale
        Factor on the logits.
    prediction
        What may guess tokens ahead; no part of the model.
    """

    hidden: int
    n_vocab: int
    blocks: tuple[Block, ...]
    norm: Norm
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    embed: str = "token_embd.weight"
    head: str = "output.weight"
    prediction: Prediction | None = None

    @property
    def parts(self) -> Iterator[Part]:
        """Mixers and feed-forwards of all layers, in order."""
        return (part for block in self.blocks for branch in block.branches for part in branch.parts)
