"""Masks between 0 and 1 that can be exactly 0 or 1: the stretched, clipped concrete distribution (Louizos et al. 2018,
arXiv 1712.01312, section 2.2), with the constants of CoFi pruning (Xia et al. 2022, arXiv 2204.00408), which Edge
Pruning (Bhaskar et al. 2024, arXiv 2406.16778) keeps.

Everything is element-wise on log alphas [...] and float32 or wider.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1  # where the concrete distribution is stretched to, before it is clipped to [0, 1]
TEMPERATURE = 2 / 3
MAGNITUDE = 0.8  # factor on the log alpha of deterministic masks
EPS = 1e-6  # how near to 0 and 1 uniform noise and probabilities may come; 1e-8 in the published Llama code


def uniform_noise(size: int, generator: torch.Generator, eps: float = EPS) -> Tensor:
    """[size] float32 in [eps, 1 - eps], on the generator's device."""
    return torch.empty(size, device=generator.device).uniform_(eps, 1.0 - eps, generator=generator)


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Masks for uniform `noise` of the same shape. Differentiable in `log_alpha` where a mask is neither 0 nor 1."""
    gate = torch.sigmoid((noise.log() - (1.0 - noise).log() + log_alpha) / TEMPERATURE)
    return (gate * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def probability_of_zero(log_alpha: Tensor, eps: float = EPS) -> Tensor:
    """That a sampled mask is exactly 0: the distribution function of the stretched gate at 0."""
    return torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha).clamp(eps, 1.0 - eps)


@torch.no_grad()
def deterministic(log_alpha: Tensor, eps: float = EPS, apply_one: bool = False) -> Tensor:
    """Masks without noise for [..., N]: as many of the smallest of each N are 0 as sampling would make 0 on average,
    the rest are sigmoid(0.8 log_alpha / temperature), or 1 with `apply_one`.

    What counts as one tensor decides how many are 0: give all that share one budget.
    """
    soft = torch.sigmoid(log_alpha * (MAGNITUDE / TEMPERATURE))
    zeros = probability_of_zero(log_alpha, eps).sum(-1, keepdim=True).round()
    rank = soft.argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = torch.ones_like(soft) if apply_one else soft
    return torch.where(rank < zeros, torch.zeros_like(soft), kept)
