"""A GPT-2 block with both passes written out, for CPUs: small models spend more time between kernels than in them.

The same arithmetic as `Decoder.block`, which is the plain version and the oracle of its tests. K runs, N rows, d width;
one run has two-dimensional rows [N, d] and weights [i, o], a pack [K, N, d] and [K, i, o], as in models/layers.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention import group_bias, group_size, grouped_backward, grouped_forward
from models.layers import LAYER_NORM_EPS, gelu_tanh_backward, gelu_tanh_forward, linear


class Geometry(NamedTuple):
    """What is not a tensor."""

    num_runs: int
    batch: int
    length: int
    num_queries: int
    num_heads: int


# ln_1, c_attn, attn.c_proj, ln_2, c_fc, mlp.c_proj: weight and bias of each
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


class FusedBlock(torch.autograd.Function):
    """(rows of the residual stream [(K,) B*T, d], positions [K, B, A] or None, ...) -> rows [(K,) B*A, d].

    `masks`: dropout's for attention weights, attention branch and MLP branch, or None each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positions: Tensor | None, geometry: Geometry, masks: tuple[Tensor | None, ...], *w: Tensor
    ) -> Tensor:
        ln1_w, ln1_b, qkv_w, qkv_b, out_w, out_b, ln2_w, ln2_b, fc_w, fc_b, proj_w, proj_b = w
        g, width = geometry, x.shape[-1]
        attention_mask, branch_mask, mlp_mask = masks
        normal1, n1, statistics1 = _norm(x, ln1_w, ln1_b)
        index = None
        rows, queries = x, n1
        if positions is None:
            q, kv = linear(n1, qkv_w, qkv_b).split([width, 2 * width], -1)
        else:
            index = _flat_index(positions, g)
            rows, queries = _pick(x, index, g), _pick(n1, index, g)
            q = linear(queries, qkv_w[..., :width], qkv_b[..., :width])
            kv = linear(n1, qkv_w[..., width:], qkv_b[..., width:])
        group = group_size(g.num_runs * g.batch, g.length)
        q, kv = q.reshape(-1, group * g.num_queries, width), kv.reshape(-1, group * g.length, 2 * width)
        bias = group_bias(q, g.length, group, positions)
        mixed, attended = grouped_forward(q, kv, bias, attention_mask, g.num_heads, group)
        mixed = mixed.view_as(rows)
        branch = linear(mixed, out_w, out_b)
        middle = rows + (branch if branch_mask is None else branch.mul_(branch_mask))
        normal2, n2, statistics2 = _norm(middle, ln2_w, ln2_b)
        hidden = linear(n2, fc_w, fc_b)
        active, gate = gelu_tanh_forward(hidden)
        branch = linear(active, proj_w, proj_b)
        result = (branch if mlp_mask is None else branch.mul_(mlp_mask)).add_(middle)
        ctx.geometry = g
        ctx.save_for_backward(
            x, index, normal1, n1, *statistics1, queries, *attended, mixed, branch_mask, middle, normal2, n2,
            *statistics2, hidden, active, gate, mlp_mask, ln1_w, ln1_b, qkv_w, out_w, ln2_w, ln2_b, fc_w, proj_w,
        )  # fmt: skip
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, index, normal1, n1, mean1, rstd1, queries, aq, akv, weights, attention_mask, mixed, branch_mask, middle,
         normal2, n2, mean2, rstd2, hidden, active, gate, mlp_mask, ln1_w, ln1_b, qkv_w, out_w, ln2_w, ln2_b, fc_w,
         proj_w) = ctx.saved_tensors  # fmt: skip
        g, width = ctx.geometry, x.shape[-1]
        # MLP branch
        branch = grad if mlp_mask is None else grad * mlp_mask
        grad_active, grad_proj_w, grad_proj_b = _linear_backward(active, proj_w, branch)
        grad_hidden = gelu_tanh_backward(hidden, gate, grad_active)
        grad_n2, grad_fc_w, grad_fc_b = _linear_backward(n2, fc_w, grad_hidden)
        grad_middle, grad_ln2_w, grad_ln2_b = _norm_backward(middle, normal2, mean2, rstd2, ln2_w, ln2_b, grad_n2)
        grad_middle = grad_middle.add_(grad)
        # attention branch
        branch = grad_middle if branch_mask is None else grad_middle * branch_mask
        grad_mixed, grad_out_w, grad_out_b = _linear_backward(mixed, out_w, branch)
        group = len(aq) // g.num_heads  # groups of examples
        grad_q, grad_kv = grouped_backward(
            (aq, akv, weights, attention_mask), g.num_heads, grad_mixed.view(group, -1, width)
        )
        if index is None:
            grad_qkv = torch.cat([grad_q.view_as(x), grad_kv.view(*x.shape[:-1], 2 * width)], -1)
            grad_n1, grad_qkv_w, grad_qkv_b = _linear_backward(n1, qkv_w, grad_qkv)
        else:
            grad_q, grad_kv = grad_q.view_as(queries), grad_kv.view(*x.shape[:-1], 2 * width)
            grad_queries, grad_q_w, grad_q_b = _linear_backward(queries, qkv_w[..., :width], grad_q)
            grad_n1, grad_kv_w, grad_kv_b = _linear_backward(n1, qkv_w[..., width:], grad_kv)
            grad_n1 = grad_n1.add_(_unpick(grad_queries, index, x))
            grad_qkv_w, grad_qkv_b = torch.cat([grad_q_w, grad_kv_w], -1), torch.cat([grad_q_b, grad_kv_b], -1)
            grad_middle = _unpick(grad_middle, index, x)
        grad_x, grad_ln1_w, grad_ln1_b = _norm_backward(x, normal1, mean1, rstd1, ln1_w, ln1_b, grad_n1)
        return (
            grad_x.add_(grad_middle), None, None, None, grad_ln1_w, grad_ln1_b, grad_qkv_w, grad_qkv_b, grad_out_w,
            grad_out_b, grad_ln2_w, grad_ln2_b, grad_fc_w, grad_fc_b, grad_proj_w, grad_proj_b,
        )  # fmt: skip


def _linear_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return torch.matmul(grad, weight.mT), torch.matmul(x.mT, grad), grad.sum(-2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor | None, Tensor, tuple[Tensor, Tensor]]:
    """-> normalised rows (a pack only), output, mean and reciprocal deviation."""
    size = x.shape[-1:]
    if weight.dim() == 1:
        y, mean, rstd = torch.native_layer_norm(x, size, weight, bias, LAYER_NORM_EPS)
        return None, y, (mean, rstd)
    normal, mean, rstd = torch.native_layer_norm(x, size, None, None, LAYER_NORM_EPS)
    return normal, torch.addcmul(bias.unsqueeze(1), normal, weight.unsqueeze(1)), (mean, rstd)


def _norm_backward(
    x: Tensor, normal: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    size, backward = x.shape[-1:], torch.ops.aten.native_layer_norm_backward
    if normal is None:
        return backward(grad, x, size, mean, rstd, weight, bias, [True, True, True])
    grad_weight, grad_bias = (grad * normal).sum(1), grad.sum(1)
    grad_x = backward(grad * weight.unsqueeze(1), x, size, mean, rstd, None, None, [True, False, False])[0]
    return grad_x, grad_weight, grad_bias


def _flat_index(positions: Tensor, g: Geometry) -> Tensor:
    """Rows [K*B*A] of the residual stream at the positions."""
    start = torch.arange(0, g.num_runs * g.batch * g.length, g.length).view(g.num_runs, g.batch, 1)
    return (positions + start).flatten()


def _pick(x: Tensor, index: Tensor, g: Geometry) -> Tensor:
    """[(K,) B*T, d] -> [(K,) B*A, d]."""
    shape = (g.num_runs, -1, x.shape[-1]) if x.dim() == 3 else (-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1]).index_select(0, index).view(shape)


def _unpick(grad: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Rows added up where they were picked, zero elsewhere."""
    num_rows = like.numel() // like.shape[-1]
    flat = grad.reshape(-1, like.shape[-1])
    return torch.ops.aten.embedding_dense_backward(flat, index, num_rows, -1, False).view_as(like)
