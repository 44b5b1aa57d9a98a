"""What a GGUF model needs on a card, tensor by tensor, from its header alone: for `hybridkv.placement`."""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.cache import KVSpec
from hybridkv.engine.describe import Description
from hybridkv.gguf.stored import named_tensors
from hybridkv.held import card_bytes
from hybridkv.placement import Needs, Portion, group_of


def needs_of(description: Description, specs: Sequence[KVSpec], *, n_ctx: int, n_seqs: int) -> Needs:
    """Count what a run holds; its weights stay packed on the card.

    Raises
    ------
    ModelFileError
        For a damaged file.
    """
    assert description.header is not None
    facts = description.facts
    kv = [0] * len(facts)
    for spec in specs:
        kv[spec.facts.layer] += spec.bytes_at(n_ctx, n_seqs)
    portions = []
    for name, tensor, n_bytes in named_tensors(description.header):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        has_kv = layer is not None and facts[layer].attention is not None
        on_card = sum(card_bytes(tensor).values()) or 4 * tensor.n_values  # vectors are float32
        portions.append(Portion(name, layer, group_of(name, has_kv), on_card, n_bytes))
    return Needs(
        portions,
        kv,
        [0 if f.state is None else f.state.nbytes(n_seqs, 4) for f in facts],
        tied=all(portion.name != "output.weight" for portion in portions),
    )
