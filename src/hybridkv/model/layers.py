"""The layers of hybrid models as frozen records: mixers and feed-forwards.

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
    kind
        Which of the config's `rope_parameters`, in a model whose kinds of layers have their own.
    """

    n_rotated: int
    pairs: Literal["halves", "neighbours"] = "halves"
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank products beside those of a weight that several layers share: `W x + b(a(x))`.

    Attributes
    ----------
    rank
        Values between the two.
    use
        Which of the layers that share the weight.
    """

    rank: int
    use: int

    def a(self, weight: str) -> str:
        """Name the tensor that makes `rank` values of the weight's input."""
        return f"{weight.removesuffix('.weight')}.lora_a.{self.use}.weight"

    def b(self, weight: str) -> str:
        """Name the tensor that adds to the weight's output from those values."""
        return f"{weight.removesuffix('.weight')}.lora_b.{self.use}.weight"


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
        Per head, or of all heads together.
    norms_together
        Which of the two.
    gated
        Whether the output is multiplied by sigmoid(gate).
    biased
        Projections that have a bias beside their weight: `attn_q.bias`.
    adapter
        Of queries, keys and values.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_together: bool = False
    gated: bool = False
    biased: Literal["none", "qkv", "all"] = "none"
    adapter: Adapter | None = None
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
    update_scale
        Largest share of a value that an update replaces.
    qkv
        One projection, or those of queries, keys and values.
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
    update_scale: float = 1.0
    l2_eps: float = 1e-6
    qkv: str | tuple[str, str, str] = "attn_qkv.weight"
    gate: str = "attn_gate.weight"
    joined: str = "ssm_in.weight"
    """All four projections interleaved by key head, in older files of grouped values."""
    alpha: str = "ssm_alpha.weight"
    beta: str = "ssm_beta.weight"
    rates: str = "ssm_ba.weight"
    decay: str = "ssm_a"
    bias: tuple[str, ...] = ("ssm_dt.bias", "ssm_dt")
    """Of the decay, and another name that some files have."""
    conv: str = "ssm_conv1d.weight"
    out: str = "ssm_out.weight"

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, keys and values."""
        return 2 * self.n_keys * self.key_dim + self.n_values * self.value_dim


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A Mamba-2 mixer: one projection to gate, x, B, C and time steps, a convolution over x, B and C, a state space.

    Attributes
    ----------
    n_groups
        Groups of heads that share B and C, and of the values that the norm takes together.
    head_dim, state_dim
        Sizes of a head's state.
    kernel
        Inputs of the causal convolution.
    norm
        Of the gated output, by groups; without one the output is gated alone.
    """

    n_heads: int
    n_groups: int
    head_dim: int
    state_dim: int
    kernel: int
    norm: Norm | None
    project: str = "ssm_in.weight"
    conv: str = "ssm_conv1d.weight"
    conv_bias: str = "ssm_conv1d.bias"
    bias: tuple[str, ...] = ("ssm_dt.bias", "ssm_dt")
    """Of the time steps, and another name that some files have."""
    rate: str = "ssm_a"
    skip: str = "ssm_d"
    out: str = "ssm_out.weight"

    @property
    def inner(self) -> int:
        """Values of all heads."""
        return self.n_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.n_groups * self.state_dim


@dataclass(frozen=True, slots=True)
class Mamba1:
    """A Mamba-1 mixer with norms on time steps, B and C.

    Attributes
    ----------
    inner
        Channels.
    state_dim
        Values of a channel's state.
    rank
        Width of the time steps before their projection.
    kernel
        Inputs of the causal convolution.
    """

    inner: int
    state_dim: int
    rank: int
    kernel: int
    dt_norm: Norm
    b_norm: Norm
    c_norm: Norm
    project: str = "ssm_in.weight"
    conv: str = "ssm_conv1d.weight"
    conv_bias: str = "ssm_conv1d.bias"
    select: str = "ssm_x.weight"
    """To time steps, B and C."""
    dt: str = "ssm_dt.weight"
    bias: str = "ssm_dt.bias"
    rate: str = "ssm_a"
    skip: str = "ssm_d"
    out: str = "ssm_out.weight"


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A short convolution between two products: `out(c * conv(b * x))`, where b, c and x are one projection.

    Attributes
    ----------
    channels
        Width of each of the three.
    kernel
        Inputs of the causal convolution.
    """

    channels: int
    kernel: int
    project: str = "shortconv.in_proj.weight"
    conv: str = "shortconv.conv.weight"
    out: str = "shortconv.out_proj.weight"


@dataclass(frozen=True, slots=True)
class Gated:
    """`down(act(gate(x)) * up(x))`, `width` values in between.

    Attributes
    ----------
    biased
        Whether its projections have biases: `ffn_up.bias`.
    adapter
        Of gate and up, which have one `a` under the gate's name.
    """

    width: int
    gate: str = "ffn_gate.weight"
    up: str = "ffn_up.weight"
    down: str = "ffn_down.weight"
    act: Literal["silu", "gelu", "gelu_erf"] = "silu"
    biased: bool = False
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """`down(relu(up(x))^2)`, `width` values in between."""

    width: int
    up: str = "ffn_up.weight"
    down: str = "ffn_down.weight"


@dataclass(frozen=True, slots=True)
class Choice:
    """The rule by which a token is sent to experts, and each is weighed.

    Attributes
    ----------
    n_used
        Experts of a token.
    gating
        What makes shares of the router's scores.
    normalised
        Whether the weights of a token's experts are made to sum to one; else they are their shares.
    bias
        Added to the shares for the choice alone.
    n_groups, n_used_groups
        Experts are chosen from the groups whose two best are largest together.
    eps
        Added to what shares are divided by.
    scale
        Factor on all weights.
    """

    n_used: int
    gating: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    bias: str | None = None
    n_groups: int = 1
    n_used_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: each token is sent to those that its router chooses.

    Attributes
    ----------
    width
        Values between an expert's two projections.
    gated
        Whether experts are `Gated`; else they are `Plain`.
    gate, up, down
        Stacks `[n_experts, n_out, n_in]`.
    latent
        Width around the experts where it is not the model's; 0 if it is.
    shared
        One more expert that every token takes.
    weighed
        Whether the shared expert is weighed by the sigmoid of `shared_gate`, a row.
    """

    n_experts: int
    width: int
    choice: Choice
    gated: bool = True
    latent: int = 0
    shared: Gated | Plain | None = None
    weighed: bool = False
    router: str = "ffn_gate_inp.weight"
    gate: str = "ffn_gate_exps.weight"
    up: str = "ffn_up_exps.weight"
    gate_up: str = "ffn_gate_up_exps.weight"
    """Both in one stack, gate above up, in some files."""
    down: str = "ffn_down_exps.weight"
    shared_gate: str = "ffn_gate_inp_shexp.weight"
    into: tuple[str, ...] = ("ffn_latent_down.weight", "ffn_latent_in.weight")
    back: tuple[str, ...] = ("ffn_latent_up.weight", "ffn_latent_out.weight")
    """Around the experts of a latent width; other names are some files'."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A transformer block that several layers share, before a layer's own mixer.

    `mixer(norm(x + join(ffn(ffn_norm(attention(attn_norm([x | embedding])))))))`: nothing within the block is added to
    the residual stream.

    Attributes
    ----------
    owner
        Layer that holds the block's weights, and the adapters of all layers that use it, under `shared.`.
    norm
        Of what the mixer reads.
    """

    owner: int
    attn_norm: Norm
    attention: Attention
    ffn_norm: Norm
    ffn: Gated
    norm: Norm
    mixer: Mamba2
    join: str = "shared_join.weight"


Mixer = Attention | DeltaNet | Mamba2 | Mamba1 | ShortConv | Shared
FeedForward = Gated | Plain | Experts
Part = Mixer | FeedForward
