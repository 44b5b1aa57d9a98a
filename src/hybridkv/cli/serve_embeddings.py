"""The embedding model of `hybridkv serve`: Transformers' class, and no cache."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from hybridkv.cli.fits import Demand, check_memory
from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.cli.model_options import Opened
    from hybridkv.engine.embed import NoScheduler
    from hybridkv.server.request_handler import Served


def load_embedder(a: argparse.Namespace, opened: Opened) -> tuple[Served, NoScheduler]:
    """Load the model.

    Raises
    ------
    UsageError
        For a model that has no tokenizer.
    ContextError
        For one that memory does not hold.
    """
    import torch

    from hybridkv import __version__
    from hybridkv.cache import KVTypes
    from hybridkv.engine.embed import Embedder, NoScheduler
    from hybridkv.gguf.load import load_gguf
    from hybridkv.model import vocab_size_of
    from hybridkv.server.request_handler import Served

    header, pooling = opened.description.header, opened.description.pooling
    assert header is not None
    assert pooling is not None
    plain = replace(opened, weights="plain", backend="eager", dtype=torch.float32, split=None)
    check_memory(plain, Demand((), opened.n_ctx))
    loaded = load_gguf(header, dtype=torch.float32, device=opened.device)
    for line in loaded.notices:
        notice(line)
    if loaded.tokenizer is None:
        raise UsageError("this model has no tokenizer, and a server takes text")
    print(f"embeddings: {pooling} of the last layer, texts of at most {opened.n_ctx} tokens", file=sys.stderr)
    scheduler = NoScheduler()
    served = Served(
        runner=scheduler,
        tokenizer=loaded.tokenizer,
        name=a.alias or opened.description.name,
        types=KVTypes(),
        types_label="none",
        n_ctx=opened.n_ctx,
        parallel=1,
        n_vocab=vocab_size_of(loaded.model.config),
        end_ids=(),
        strict=a.answers.strict,
        notify=notice,
        fingerprint=f"hybridkv-{__version__}-{pooling}",
        embedder=Embedder(loaded.model, pooling, opened.n_ctx),
    )
    return served, scheduler
