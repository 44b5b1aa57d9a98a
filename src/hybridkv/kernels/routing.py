"""The routing of a mixture of experts, as native code and the card's kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The rule by which a token is sent to experts, and each is weighed.

    Attributes
    ----------
    n_used
        Experts of a token.
    gating
        `softmax`: the largest scores choose, and weights are shares of the softmax over all, or over the chosen if
        `normalised`. `sigmoid`: the largest of sigmoid(score) + bias choose; weights are the sigmoids, divided by their
        sum + `eps` if `normalised`.
    bias
        Per expert.
    n_groups, n_used_groups
        Experts are chosen from the groups whose two best are largest together.
    scale
        Factor on all weights.
    """

    n_used: int
    gating: Literal["softmax", "sigmoid"] = "softmax"
    bias: Tensor | None = None
    n_groups: int = 1
    n_used_groups: int = 1
    normalised: bool = True
    eps: float = 0.0
    scale: float = 1.0

    def native(self, n_experts: int) -> tuple[object, ...]:
        """Convert for the native code, checked against the number of experts."""
        sigmoid, size = self.gating == "sigmoid", n_experts // max(1, self.n_groups)
        assert 1 <= self.n_used <= self.n_used_groups * size and n_experts == size * self.n_groups, self
        assert 1 <= self.n_used_groups <= self.n_groups and (self.n_groups == 1 or size > 1), self
        assert sigmoid or (self.bias is None and self.n_groups == 1 and not self.eps), self
        assert self.bias is None or self.bias.shape == (n_experts,), self.bias
        bias = [] if self.bias is None else self.bias.detach().float().flatten().tolist()
        groups = self.n_groups, self.n_used_groups
        return sigmoid, bias, self.n_used, *groups, self.normalised, self.eps, self.scale
