"""The kernels of a layer: chosen from what the registry holds, before any memory or weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridkv.cache.spec import EXACT_TYPE, KVSpec
from hybridkv.formats import get_format
from hybridkv.kernels import Encoder, Kernel, Phase, select, select_encoder
from hybridkv.rotation import rotation_block


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """The kernels of one KV layer: an attention kernel per phase, an encoder each for K and V, packed and exact."""

    prefill: Kernel
    decode: Kernel
    write_k: Encoder
    write_v: Encoder
    exact_k: Encoder
    exact_v: Encoder

    def attend_for(self, phase: Phase) -> Kernel:
        """Return the kernel of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    @property
    def label(self) -> str:
        """One name if both phases run the same kernel, else both."""
        if self.prefill.name == self.decode.name:
            return self.decode.name
        return f"{self.prefill.name} / {self.decode.name}"


def resolve(spec: KVSpec, device: str, kernels: Sequence[Kernel], encoders: Sequence[Encoder]) -> LayerKernels:
    """Choose the kernels of a layer, before any memory or weight is touched.

    Raises
    ------
    NoKernelError
        If a phase or a store has no kernel; carries every reason.
    UsageError
        If a rotation is asked for a head dim that has none.
    """
    facts, types, exact = spec.facts, spec.types, get_format(EXACT_TYPE)
    chosen = LayerKernels(
        prefill=select(spec.case(device, "prefill"), kernels),
        decode=select(spec.case(device, "decode"), kernels),
        write_k=select_encoder(device, get_format(types.type_k), facts.head_dim_k, encoders),
        write_v=select_encoder(device, get_format(types.type_v), facts.head_dim_v, encoders),
        exact_k=select_encoder(device, exact, facts.head_dim_k, encoders),
        exact_v=select_encoder(device, exact, facts.head_dim_v, encoders),
    )
    # After the types: one that brings its own rotation is refused as a type.
    if types.rotate_k:
        rotation_block(facts.head_dim_k)
    if types.rotate_v:
        rotation_block(facts.head_dim_v)
    return chosen
