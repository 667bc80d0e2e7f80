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
SHORT = 16  # tokens up to which attention with explicit scores is faster than the fused kernel

Generators = Sequence[torch.Generator]


GELU_SCALE = (8 / math.pi) ** 0.5  # twice the sqrt(2/pi) of GELU's tanh form (Hendrycks & Gimpel 2016, section 2)
GELU_CUBIC = 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """x * sigmoid(2u) = x * (1 + tanh(u)) / 2, u = sqrt(2/pi) * (x + 0.044715 x^3)."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return _GeluTanh.apply(x)


class _GeluTanh(torch.autograd.Function):
    """Keeps the sigmoid, so that its backward pass needs no exponential (CPU: both passes 2x faster than torch's)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = (x * x).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        slope = (x * x).mul_(3 * GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x)  # x * d(2u)/dx
        slope.addcmul_(slope, gate, value=-1.0)  # ... * (1 - gate)
        return slope.add_(1.0).mul_(gate).mul_(grad)


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
    """Drop elements of x, whose rows belong to the runs in equal parts."""
    if generators is None or probability == 0.0:
        return x
    return x * keep_mask(x.shape, probability, generators, x)


def keep_mask(shape: Sequence[int], probability: float, generators: Generators, like: Tensor) -> Tensor:
    """What dropout multiplies with: 0, or 1 / (1 - probability), in equal parts for the runs.

    Each run's part is drawn from its own generator as if the run were alone, so packing changes nothing. An element
    takes 16 random bits (CPU: 5x faster than bernoulli_), so the probability is rounded to a multiple of 2^-16.
    """
    dropped = round(probability * 2**16)
    size = math.prod(shape) // len(generators)
    bits = torch.empty(len(generators), -(-size // 4), dtype=torch.int64, device=like.device)
    for part, generator in zip(bits.unbind(), generators, strict=True):
        part.random_(-(2**63), None, generator=generator)
    mask = torch.empty(len(generators), size, dtype=like.dtype, device=like.device)
    torch.ge(bits.view(torch.int16)[:, :size], dropped - 2**15, out=mask)
    return mask.mul_(2**16 / (2**16 - dropped)).view(shape)


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
def _rotary_tables(
    length: int, dimensions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[T, dimensions] each: cosines, and sines with the sign that the swapped partner takes (u cos - v sin, v cos + u sin)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies).repeat_interleave(2, -1)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(dimensions // 2)
    return angles.cos().to(device, dtype), (angles.sin() * signs).to(device, dtype)


# ---- attention ----


def attention(
    query: Tensor,
    key_value: Tensor,
    positions: Tensor | None,
    num_heads: int,
    probability: float = 0.0,
    generators: Generators | None = None,
) -> Tensor:
    """Causal multi-head attention of A queries over T tokens.

    query [K, B, A, d], key_value [K, B, T, 2d], positions [K, B, A] of the queries (None: A = T, all tokens in
    order) -> [K, B, A, d]. `probability` and `generators` are those of dropout on the attention weights.
    """
    num_runs, batch, num_queries, width = query.shape
    length = key_value.shape[2]
    rows, head = num_runs * batch, width // num_heads
    drops = generators is not None and probability > 0.0
    mask = keep_mask((rows, num_heads, num_queries, length), probability, generators, query) if drops else None
    if length <= SHORT and not (query.is_cuda or torch.compiler.is_compiling()):
        group = _group_size(rows, length)
        q = query.reshape(-1, group * num_queries, width)
        kv = key_value.reshape(-1, group * length, 2 * width)
        bias = _group_bias(q, length, group, positions)
        return _GroupedAttention.apply(q, kv, bias, mask, num_heads, group).view_as(query)
    q = query.reshape(rows, num_queries, num_heads, head).transpose(1, 2)
    k, v = key_value.reshape(rows, length, 2, num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
    if length > SHORT and not drops:
        visible = None if positions is None else _visible(positions, length).view(rows, 1, num_queries, length)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=positions is None)
    else:
        if positions is None:
            positions = torch.arange(length, device=query.device).expand(num_runs, batch, length)
        hidden = ~_visible(positions, length).view(rows, 1, num_queries, length)
        weights = (torch.matmul(q, k.transpose(-1, -2)) * head**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        mixed = torch.matmul(weights if mask is None else weights * mask, v)
    return mixed.transpose(1, 2).reshape(query.shape)


def _visible(positions: Tensor, length: int) -> Tensor:
    """[K, B, A] -> [K, B, A, T]: may the query at that position look at token t."""
    return torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)


def _group_size(rows: int, length: int) -> int:
    """Examples to attend jointly, of whatever runs: products of tiny matrices cost more in calls than in sums."""
    group = 1
    while 2 * group * length <= SHORT and rows % (2 * group) == 0:
        group *= 2
    return group


def _group_bias(query: Tensor, length: int, group: int, positions: Tensor | None) -> Tensor:
    """-inf where a query may not look (later tokens, other examples): [G*T, G*T], or [M, G*A, G*T] with positions."""
    num_queries = query.shape[1] // group
    first, own, causal = _group_frame(length, group, num_queries, query.dtype)
    if positions is None:
        return causal
    visible = own & (torch.arange(group * length) <= (positions.reshape(-1, group * num_queries) + first).unsqueeze(-1))
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, float("-inf"))


@functools.lru_cache(maxsize=32)
def _group_frame(length: int, group: int, num_queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What depends on shapes alone: each query's first own key [G*A], its own keys [G*A, G*T], the causal bias."""
    example = torch.arange(group).repeat_interleave(num_queries)
    own = example.unsqueeze(-1) == torch.arange(group * length) // length
    later = torch.ones(num_queries, length, dtype=torch.bool).triu(1).repeat(group, group)
    causal = torch.zeros(own.shape, dtype=dtype).masked_fill_(later | ~own, float("-inf"))
    return example * length, own, causal


def _softmax(x: Tensor) -> Tensor:
    """Over the last axis; short rows go through the transpose, because torch's kernel is not vectorised for them."""
    length = x.shape[-1]
    if length >= SHORT:
        return x.softmax(-1)
    return x.view(-1, length).t().softmax(0).t().contiguous().view_as(x)


class _GroupedAttention(torch.autograd.Function):
    """Attention over M groups of short examples laid end to end; `bias` keeps the examples of a group apart.

    The gradient is written out by hand to save the copies between the layouts of projections and heads.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, group: int
    ) -> Tensor:
        """query [M, A, d], key_value [M, T, 2d], bias [A, T] or [M, A, T] -> [M, A, d].

        `mask` [M * group, H, A / group, T / group], of dropout: what an example's weights are multiplied with.
        """
        rows, num_queries, width = query.shape
        length, head = key_value.shape[1], width // num_heads
        q = query.view(rows, num_queries, num_heads, head).transpose(1, 2).reshape(-1, num_queries, head)
        kv = key_value.view(rows, length, 2, num_heads, head).permute(2, 0, 3, 1, 4).reshape(2, -1, length, head)
        k, v = kv.unbind(0)
        if bias.dim() == 2:
            logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=head**-0.5)
        else:
            logits = torch.bmm(q, k.transpose(1, 2)).mul_(head**-0.5)
            logits.view(rows, num_heads, num_queries, length).add_(bias.unsqueeze(1))
        weights = _softmax(logits)
        if mask is not None:  # what it does outside of an example's own block meets weights of zero
            apart = (rows, group, num_heads, num_queries // group, 1, length // group)
            mask = mask.view(apart).transpose(1, 2).expand(-1, -1, -1, -1, group, -1).reshape(weights.shape)
        ctx.save_for_backward(q, kv, weights, mask)
        ctx.num_heads = num_heads
        return _join_heads(torch.bmm(weights if mask is None else weights * mask, v), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, weights, mask = ctx.saved_tensors
        k, v = kv.unbind(0)
        rows, num_queries, width = grad.shape
        length, head = kv.shape[2], width // ctx.num_heads
        grad = grad.reshape(rows, num_queries, ctx.num_heads, head).transpose(1, 2).reshape_as(q)
        grad_kv = torch.empty_like(kv)
        used = weights if mask is None else weights * mask
        torch.bmm(used.transpose(1, 2), grad, out=grad_kv[1])
        grad_logits = torch.bmm(grad, v.transpose(1, 2)).mul_(used)
        grad_logits.addcmul_(weights, grad_logits.sum(-1, keepdim=True), value=-1.0).mul_(head**-0.5)
        grad_q = torch.bmm(grad_logits, k)
        torch.bmm(grad_logits.transpose(1, 2), q, out=grad_kv[0])
        grad_kv = grad_kv.view(2, rows, ctx.num_heads, length, head).permute(1, 3, 0, 2, 4)
        return _join_heads(grad_q, rows), grad_kv.reshape(rows, length, 2 * width), None, None, None, None


def _join_heads(x: Tensor, rows: int) -> Tensor:
    """[M*H, A, d/H] -> [M, A, d]."""
    _, num_queries, head = x.shape
    return x.view(rows, -1, num_queries, head).transpose(1, 2).reshape(rows, num_queries, -1)
