"""Position encodings besides learned tables: sinusoids, rotation in halves, FIRE.

Shapes: K runs, B batch rows, A queries, T tokens, H heads, d width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.layers import ROTARY_BASE, Generators

SINUSOID_BASE = 10_000.0  # Vaswani et al. 2017 (arXiv 1706.03762), section 3.5
FIRE_EPS = 1e-6  # keeps FIRE's normaliser off zero; of the published code
CHUNK = 256  # positions that are drawn together in `fixed_normal`


@functools.lru_cache(maxsize=16)
def sinusoids(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, d]: sine in even columns, cosine in odd ones; column pair i turns by 10000^(-2i / d) a position."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(SINUSOID_BASE) / width))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width].to(device, dtype)


@functools.lru_cache(maxsize=16)
def fixed_normal(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, d]: one draw of N(0, 1) for ever. Row t does not depend on the length."""
    chunks = [
        torch.randn(CHUNK, width, generator=torch.Generator().manual_seed(chunk))
        for chunk in range(-(-length // CHUNK))
    ]
    return torch.cat(chunks)[:length].to(device, dtype)


# ---- rotary ----


def rotate_halves(x: Tensor, positions: Tensor | None, length: int, num_heads: int) -> Tensor:
    """x [K, B, A, d] of tokens at `positions` [K, B, A] below `length` (None: all in order) -> the same shape.

    In each head of h dimensions pair i is (i, i + h/2), turned by t * 10000^(-2i / h): Su et al. 2021 (arXiv
    2104.09864) with the pairing of GPT-NeoX. The pairing of the paper is `models.layers.rotate`.
    """
    heads = x.unflatten(-1, (num_heads, -1))
    cos, sin = _half_tables(length, heads.shape[-1], x.dtype, x.device)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2)).flatten(-2)


@functools.lru_cache(maxsize=32)
def _half_tables(length: int, head: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, h] each: cosines, and sines with their sign in (u cos - v sin, v cos + u sin)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    sin = angles.sin()
    return angles.cos().repeat(1, 2).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)


# ---- FIRE ----


class FireWeights(NamedTuple):
    """FIRE's parameters of one layer, each with the run axis K. W hidden units."""

    c: Tensor  # [K, 1]
    multiplier: Tensor  # [K, 1], of the threshold
    hidden: Tensor  # [K, 1, W]
    hidden_bias: Tensor  # [K, W]
    output: Tensor  # [K, W, H]
    output_bias: Tensor  # [K, H]


def fire_bias(weights: FireWeights, queries: Tensor, keys: Tensor, length: float) -> Tensor:
    """Positions of queries [K, A] and keys [K, T] (or [1, ...] for all runs) -> added to attention scores [K, H, A, T].

    FIRE (Li et al. 2024, arXiv 2310.04418): an MLP of the distance, after a logarithm, over the query's
    position or a threshold, whichever is larger. The threshold is |multiplier * length|. Later keys get a value too.
    """
    c, threshold = weights.c, (weights.multiplier * length).abs()  # [K, 1]
    distance = torch.log1p((c[:, :, None] * (queries[:, :, None] - keys[:, None, :])).abs())  # [K, A, T]
    normaliser = torch.log1p((c * torch.maximum(queries, threshold)).abs()) + FIRE_EPS  # [K, A]
    x = (distance / normaliser.unsqueeze(-1)).flatten(1)  # [K, A*T]
    hidden = torch.addcmul(weights.hidden_bias.unsqueeze(1), x.unsqueeze(-1), weights.hidden).relu()
    bias = torch.baddbmm(weights.output_bias.unsqueeze(1), hidden, weights.output)  # [K, A*T, H]
    return bias.unflatten(1, (queries.shape[1], keys.shape[1])).permute(0, 3, 1, 2)


def random_positions(length: int, max_length: int, generators: Generators, device: torch.device) -> Tensor:
    """[K, T]: for each run a sorted random choice of `length` out of 0..max_length-1, from its own generator.

    Randomised positions: Ruoss et al. 2023 (arXiv 2305.16843).
    """
    drawn = [torch.randperm(max_length, generator=generator, device=device)[:length] for generator in generators]
    return torch.stack(drawn).sort(-1).values
