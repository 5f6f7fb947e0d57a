"""Returns as free functions on tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def lambda_return(
    reward: Float[Tensor, "N H"],
    discount: Float[Tensor, "N H"],
    value: Float[Tensor, "N H"],
    lam: float,
    cut: Bool[Tensor, "N H"] | None = None,
) -> Float[Tensor, "N H"]:
    """λ-returns R_0..R_{H−1} (DreamerV3, arXiv 2301.04104, eq. 4), where column k holds what follows decision k.

        R_k = reward_k + discount_k · ((1 − λ) · value_k + λ · R_{k+1}),   R_{H−1} bootstraps from value_{H−1} alone

    ``reward_k`` and ``value_k`` belong to the state that decision k led to; ``discount_k`` is γ · cont there, 0 where
    that state is terminal. Where ``cut`` is true the sequence ends in that state, whose own value stands for the
    rest.
    """
    # Where the sequence is cut, the state's own value takes the place of the return that follows.
    bootstrapped = (1 - lam) * value if cut is None else torch.where(cut, value, (1 - lam) * value)
    fixed = (reward + discount * bootstrapped).unbind(1)
    passed_on = (lam * discount if cut is None else (lam * discount).masked_fill(cut, 0.0)).unbind(1)
    following = value[:, -1]
    returns = []
    for k in reversed(range(len(fixed))):
        following = torch.addcmul(fixed[k], passed_on[k], following)
        returns.append(following)
    return torch.stack(returns[::-1], 1)
