"""Causal attention of many short examples at once, for one run or a pack of runs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 16  # tokens up to which attention with explicit scores is faster than the fused kernel


def attention(
    query: Tensor,
    key_value: Tensor,
    positions: Tensor | None,
    num_heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal multi-head attention of A queries over T tokens.

    query [K, B, A, d], key_value [K, B, T, 2d], positions [K, B, A] of the queries (None: the last A of the T tokens,
    in order) -> [K, B, A, d]. `mask` [K, B, H, A, T], of dropout: what the attention weights are multiplied with.
    """
    num_runs, batch, num_queries, width = query.shape
    length = key_value.shape[2]
    rows, head = num_runs * batch, width // num_heads
    if length <= SHORT and not (query.is_cuda or torch.compiler.is_compiling()):
        group = group_size(rows, length)
        q = query.reshape(-1, group * num_queries, width)
        kv = key_value.reshape(-1, group * length, 2 * width)
        bias = group_bias(q, length, group, positions)
        return _GroupedAttention.apply(q, kv, bias, mask, num_heads, group).view_as(query)
    q = query.reshape(rows, num_queries, num_heads, head).transpose(1, 2)
    k, v = key_value.reshape(rows, length, 2, num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
    if positions is None and num_queries < length:
        positions = torch.arange(length - num_queries, length, device=query.device).expand(num_runs, batch, -1)
    if length > SHORT and mask is None:
        visible = None if positions is None else _visible(positions, length).view(rows, 1, num_queries, length)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=positions is None)
    else:
        if positions is None:
            positions = torch.arange(length, device=query.device).expand(num_runs, batch, length)
        hidden = ~_visible(positions, length).view(rows, 1, num_queries, length)
        weights = (torch.matmul(q, k.transpose(-1, -2)) * head**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        mixed = torch.matmul(weights if mask is None else weights * mask.flatten(0, 1), v)
    return mixed.transpose(1, 2).reshape(query.shape)


def _visible(positions: Tensor, length: int) -> Tensor:
    """[K, B, A] -> [K, B, A, T]: may the query at that position look at token t."""
    return torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)


def group_size(rows: int, length: int) -> int:
    """Examples to attend jointly, of whatever runs: products of tiny matrices cost more in calls than in sums."""
    group = 1
    while 2 * group * length <= SHORT and rows % (2 * group) == 0:
        group *= 2
    return group


def group_bias(query: Tensor, length: int, group: int, positions: Tensor | None) -> Tensor:
    """-inf where a query may not look (later tokens, other examples): [G*A, G*T], or [M, G*A, G*T] with positions."""
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
    later = torch.ones(num_queries, length, dtype=torch.bool).triu(1 + length - num_queries).repeat(group, group)
    causal = torch.zeros(own.shape, dtype=dtype).masked_fill_(later | ~own, float("-inf"))
    return example * length, own, causal


def _softmax(x: Tensor) -> Tensor:
    """Over the last axis; short rows go through the transpose, because torch's kernel is not vectorised for them."""
    length = x.shape[-1]
    if length >= SHORT:
        return x.softmax(-1)
    return x.view(-1, length).t().softmax(0).t().contiguous().view_as(x)


Saved = tuple[Tensor, Tensor, Tensor, Tensor | None]  # queries, keys and values, weights, dropout's mask


def grouped_forward(
    query: Tensor, key_value: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, group: int
) -> tuple[Tensor, Saved]:
    """Attention over M groups of short examples laid end to end; `bias` keeps the examples of a group apart.

    query [M, A, d], key_value [M, T, 2d], bias [A, T] or [M, A, T] -> [M, A, d], and what `grouped_backward` needs.
    `mask` [K, B, H, A / group, T / group], of dropout: what an example's weights are multiplied with.
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
        mask = mask.reshape(apart).transpose(1, 2).expand(-1, -1, -1, -1, group, -1).reshape(weights.shape)
    mixed = torch.bmm(weights if mask is None else weights * mask, v)
    return _join_heads(mixed, rows), (q, kv, weights, mask)


def grouped_backward(saved: Saved, num_heads: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    """grad [M, A, d] -> gradients of query [M, A, d] and key_value [M, T, 2d]. By hand: fewer copies."""
    q, kv, weights, mask = saved
    k, v = kv.unbind(0)
    rows, num_queries, width = grad.shape
    length, head = kv.shape[2], width // num_heads
    grad = grad.reshape(rows, num_queries, num_heads, head).transpose(1, 2).reshape_as(q)
    grad_kv = torch.empty_like(kv)
    used = weights if mask is None else weights * mask
    torch.bmm(used.transpose(1, 2), grad, out=grad_kv[1])
    grad_logits = torch.bmm(grad, v.transpose(1, 2)).mul_(used)
    grad_logits.addcmul_(weights, grad_logits.sum(-1, keepdim=True), value=-1.0).mul_(head**-0.5)
    grad_q = torch.bmm(grad_logits, k)
    torch.bmm(grad_logits.transpose(1, 2), q, out=grad_kv[0])
    grad_kv = grad_kv.view(2, rows, num_heads, length, head).permute(1, 3, 0, 2, 4)
    return _join_heads(grad_q, rows), grad_kv.reshape(rows, length, 2 * width)


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, group: int
    ) -> Tensor:
        mixed, saved = grouped_forward(query, key_value, bias, mask, num_heads, group)
        ctx.save_for_backward(*saved)
        ctx.num_heads = num_heads
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *grouped_backward(ctx.saved_tensors, ctx.num_heads, grad), None, None, None, None


def _join_heads(x: Tensor, rows: int) -> Tensor:
    """[M*H, A, d/H] -> [M, A, d]."""
    _, num_queries, head = x.shape
    return x.view(rows, -1, num_queries, head).transpose(1, 2).reshape(rows, num_queries, -1)
