"""What layers of hybrid models compute, as frozen records: mixers, feed-forwards, and the graph of a whole model.

Tensor names are GGUF's; within a block they are relative to `blk.N.`. Conventions are the file's own: norm weights as
they are, `ssm_a` as -exp(A_log), rows in the file's order. A backend lowers each record to its operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: `x * weight / sqrt(mean(x^2) + eps)`."""

    weight: str
    eps: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions on the first `n_rotated` values of each head.

    Attributes
    ----------
    pairs
        Which values turn together: `halves` (i, i + n_rotated / 2) or `neighbours` (2 i, 2 i + 1).
    """

    n_rotated: int
    pairs: Literal["halves", "neighbours"] = "halves"


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention over the KV cache.

    Attributes
    ----------
    q, k, v, out
        Projections. A gated attention's `q` holds `[query | gate]` per head.
    scale
        Factor on the scores.
    rope
        None for attention without positions.
    q_norm, k_norm
        Per head.
    gated
        Whether the output is multiplied by sigmoid(gate).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    gated: bool = False
    q: str = "attn_q.weight"
    k: str = "attn_k.weight"
    v: str = "attn_v.weight"
    out: str = "attn_output.weight"


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net.

    Attributes
    ----------
    n_keys, n_values
        Key heads, and the value heads that share them.
    key_dim, value_dim
        Values per head.
    kernel
        Inputs of the causal convolution over q, k and v.
    values
        Which key head value head h uses: `tiled` h % n_keys, `grouped` h // (n_values / n_keys).
    joined_rates
        Whether the decay's and the update's inputs come from one matrix, `ssm_ba`, interleaved by key head.
    norm
        Of the output, per head, before its gate.
    """

    n_keys: int
    n_values: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: Norm
    values: Literal["tiled", "grouped"] = "tiled"
    joined_rates: bool = False
    l2_eps: float = 1e-6
    qkv: str = "attn_qkv.weight"
    gate: str = "attn_gate.weight"
    joined: str = "ssm_in.weight"
    """All four projections interleaved by key head, in older files of grouped values."""
    alpha: str = "ssm_alpha.weight"
    beta: str = "ssm_beta.weight"
    rates: str = "ssm_ba.weight"
    decay: str = "ssm_a"
    bias: str = "ssm_dt.bias"
    conv: str = "ssm_conv1d.weight"
    out: str = "ssm_out.weight"

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, keys and values."""
        return 2 * self.n_keys * self.key_dim + self.n_values * self.value_dim


@dataclass(frozen=True, slots=True)
class Gated:
    """`down(silu(gate(x)) * up(x))`, `width` values in between."""

    width: int
    gate: str = "ffn_gate.weight"
    up: str = "ffn_up.weight"
    down: str = "ffn_down.weight"


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of gated experts: each token is sent to the `n_used` that its router scores highest.

    Attributes
    ----------
    width
        Values between an expert's two projections.
    normalised
        Whether the weights of a token's experts are made to sum to one; else they are shares of all experts' softmax.
    gate, up, down
        Stacks `[n_experts, n_out, n_in]`.
    shared
        One more expert that every token takes; `shared_gate` is the row whose sigmoid weighs it.
    """

    n_experts: int
    n_used: int
    width: int
    normalised: bool = True
    shared: Gated | None = None
    router: str = "ffn_gate_inp.weight"
    gate: str = "ffn_gate_exps.weight"
    up: str = "ffn_up_exps.weight"
    gate_up: str = "ffn_gate_up_exps.weight"
    """Both in one stack, gate above up, in some files."""
    down: str = "ffn_down_exps.weight"
    shared_gate: str = "ffn_gate_inp_shexp.weight"


Mixer = Attention | DeltaNet
FeedForward = Gated | Experts


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: `x += mixer(norm(x))`, then `x += ffn(ffn_norm(x))`."""

    norm: Norm
    mixer: Mixer
    ffn_norm: Norm
    ffn: FeedForward


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A whole model: an embedding, blocks, a norm, and a head.

    Attributes
    ----------
    hidden
        Width of the residual stream.
    head
        Output matrix; a source without it uses the embedding (tied).
    """

    hidden: int
    n_vocab: int
    blocks: tuple[Block, ...]
    norm: Norm
    embed: str = "token_embd.weight"
    head: str = "output.weight"
