"""Building blocks of a decoder as pure functions, for one run or for a pack of runs.

Rows: activations are [N, d] with weights [i, o] for one run, and [K, N, d] with weights [K, i, o] for a pack of K.
One run takes the two-dimensional matrix products, which are cheaper than batched ones of batch 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LAYER_NORM_EPS = 1e-5  # GPT-2's

Generators = Sequence[torch.Generator]


GELU_SCALE = (8 / math.pi) ** 0.5  # twice the sqrt(2/pi) of GELU's tanh form (Hendrycks & Gimpel 2016, section 2)
GELU_CUBIC = 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """x * sigmoid(2u) = x * (1 + tanh(u)) / 2, u = sqrt(2/pi) * (x + 0.044715 x^3)."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return _GeluTanh.apply(x)


def gelu_tanh_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> y, and the sigmoid, so that the backward pass needs no exponential (CPU: 2x faster than torch's)."""
    gate = (x * x).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x).sigmoid_()
    return x * gate, gate


def gelu_tanh_backward(x: Tensor, gate: Tensor, grad: Tensor) -> Tensor:
    slope = (x * x).mul_(3 * GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x)  # x * d(2u)/dx
    slope.addcmul_(slope, gate, value=-1.0)  # ... * (1 - gate)
    return slope.add_(1.0).mul_(gate).mul_(grad)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, gate = gelu_tanh_forward(x)
        ctx.save_for_backward(x, gate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        return gelu_tanh_backward(x, gate, grad)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [(K,) N, i], weight [(K,) i, o], bias [(K,) o] -> [(K,) N, o]."""
    if weight.dim() == 2:
        return torch.addmm(bias, x, weight)
    return torch.baddbmm(bias.unsqueeze(1), x, weight)


def scores(x: Tensor, table: Tensor) -> Tensor:
    """x [(K,) N, d], table [(K,) V, d] -> dot product with every row of the table [(K,) N, V]."""
    return torch.matmul(x, table.transpose(-1, -2))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [(K,) N, d], weight and bias [(K,) d]."""
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)
    normal = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return torch.addcmul(bias.unsqueeze(1), normal, weight.unsqueeze(1))


def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """table [K, V, d], tokens [K, B, T] -> [K, B, T, d], as one gather for the whole pack."""
    num_runs, vocab_size, width = table.shape
    if num_runs == 1:
        return F.embedding(tokens, table.squeeze(0))
    first_row = torch.arange(0, num_runs * vocab_size, vocab_size, device=tokens.device)
    return F.embedding(tokens + first_row[:, None, None], table.reshape(num_runs * vocab_size, width))


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x [K, B, T, d], positions [K, B, A] -> x at those tokens [K, B, A, d]."""
    num_runs, batch, length, width = x.shape
    start = torch.arange(0, num_runs * batch * length, length, device=x.device).view(num_runs, batch, 1)
    # an embedding look-up: its backward adds rows several times faster than those of gather and index_select
    return F.embedding(positions + start, x.reshape(-1, width))


def dropout(x: Tensor, probability: float, generators: Generators | None) -> Tensor:
    """Drop elements of x [K, ...]."""
    if generators is None or probability == 0.0:
        return x
    return x * keep_masks([x.shape[1:]], probability, generators, x)[0]


def keep_masks(
    shapes: Sequence[Sequence[int]], probability: float, generators: Generators, like: Tensor
) -> list[Tensor]:
    """What dropout multiplies with: 0, or 1 / (1 - probability). One mask [K, *shape] for each shape (of one run).

    Each run's part is drawn from its own generator as if the run were alone, so packing changes nothing. An element
    takes 16 random bits (CPU: 5x faster than bernoulli_), so the probability is rounded to a multiple of 2^-16.
    """
    dropped = round(probability * 2**16)
    sizes = [math.prod(shape) for shape in shapes]
    whole = sum(sizes)
    bits = torch.empty(len(generators), -(-whole // 4), dtype=torch.int64, device=like.device)
    for part, generator in zip(bits.unbind(), generators, strict=True):
        part.random_(-(2**63), None, generator=generator)
    mask = torch.empty(len(generators), whole, dtype=like.dtype, device=like.device)
    torch.ge(bits.view(torch.int16)[:, :whole], dropped - 2**15, out=mask)
    parts = mask.mul_(2**16 / (2**16 - dropped)).split(sizes, 1)
    return [part.unflatten(1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


# ---- rotary positions ----

ROTARY_BASE = 10_000.0  # Su et al. 2021 (arXiv 2104.09864), section 3.2.2


def rotate(x: Tensor, positions: Tensor | None, length: int, num_heads: int, dimensions: int) -> Tensor:
    """x [K, B, A, d] of tokens at `positions` [K, B, A] below `length` (None: all of them in order) -> the same shape.

    In each head the leading `dimensions` are turned in interleaved pairs: pair i = (2i, 2i+1) of the token at position
    t by the angle t * 10000^(-2i / dimensions).
    """
    heads = x.unflatten(-1, (num_heads, -1))
    turned, rest = heads.split([dimensions, heads.shape[-1] - dimensions], -1)
    cos, sin = _rotary_tables(length, dimensions, x.dtype, x.device)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = torch.addcmul(turned * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2))
    return (torch.cat([turned, rest], -1) if rest.shape[-1] else turned).flatten(-2)


@functools.lru_cache(maxsize=32)
def _rotary_tables(length: int, dimensions: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, dimensions] each: cosines, and sines with their sign in (u cos - v sin, v cos + u sin)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, -1)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(dimensions // 2)
    return angles.cos().to(device, dtype), (angles.sin() * signs).to(device, dtype)
