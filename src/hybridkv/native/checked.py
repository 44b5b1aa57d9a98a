"""A step's program, stopped before and after the attention of layers at which the guard looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybridkv.kernels import AttentionParams
from hybridkv.kernels.cache_rows import CacheRows, Health
from hybridkv.native.builder import Builder
from hybridkv.native.rows import fault_of, of_cache, starts
from hybridkv.policy import MismatchError
from hybridkv.runtime import Fault, LayerView, WatchedRows
from hybridkv.runtime.attend import verify_call


def run_checked(
    builder: Builder,
    run: Callable[[int, int], list[Health]],
    layers: Sequence[WatchedRows],
    rows: Sequence[CacheRows],
    n_seqs: int,
    spans: Sequence[int] = (1,),
) -> dict[int, Fault]:
    """Run a whole program, in parts where a layer's rows and attention are to be checked.

    Parameters
    ----------
    builder
        Of the program, and of the buffers that it works on.
    run
        Runs a part of the program: from one operation up to another.
    layers, rows
        By attention call, and then by cache.
    n_seqs
        Sequences of each cache.
    spans
        Tokens of each cache; one where the guard looks.

    Returns
    -------
    dict
        The first fault of each token that has one.
    """
    n_caches, first_rows = len(spans), starts(spans)
    owners = [cache for cache, n in enumerate(spans) for _ in range(n)]
    failed: dict[int, Fault] = {}

    def note(health: Sequence[Health]) -> None:
        if all(found == "finite" for found in health):
            return
        for index, found in enumerate(health):
            number, row = divmod(index, len(owners))
            layer = layers[number * n_caches + owners[row]]
            if found != "finite" and layer.watch.guard.watches:
                failed.setdefault(row, fault_of(layer, found))

    begin = 0
    for number, call in enumerate(builder.calls):
        first = number * n_caches
        own = layers[first : first + n_caches]
        due = [i for i, layer in enumerate(own) if layer.watch.should_check(layer.store.n_seen, 1)]
        if not due:
            continue
        note(run(begin, call.index))
        begin = call.index + 1
        # The buffers are other layers' too, and the native code rotates in place.
        at = [first_rows[i] for i in due]
        asked = [tuple(of_cache(x, row, n_seqs).clone() for x in (call.q, call.k, call.v)) for row in at]
        note(run(call.index, begin))
        for i, row, (q, k, v) in zip(due, at, asked, strict=True):
            if row in failed:
                continue
            packed = LayerView(own[i].store, rows[first + i].view, own[i].watch, k, v)
            try:
                verify_call(q, packed, AttentionParams(scale=call.scale), of_cache(call.out, row, n_seqs))
            except MismatchError as error:
                failed[row] = error
    note(run(begin, len(builder.program)))
    return failed
