"""Pieces of the recurrent decoder as pure functions: norms, residual schemes, MLPs, attention with biases.

Rows are [N, d] with weights [i, o] for one run, [K, N, d] with [K, i, o] for a pack, as in models/layers.py.
Shapes: K runs, B batch rows, A queries, T tokens, H heads, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from groundswell.protocols import Parameters
from models import attention as plain_attention
from models.layers import linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
GATED = "_glu"  # suffix of activations that multiply: the first half of the units by the activated second half
SHAPED_GAIN = (
    0.214  # of a branch in the scheme `shaped`: Noci et al. 2023 (arXiv 2306.17759), value of the published code
)
NORM_BEFORE = ("pre", "sandwich", "shaped")  # schemes whose branches read normalised states


def rows_of(x: Tensor) -> Tensor:
    """[K, B, T, d] -> [K, B*T, d], for one run [B*T, d]."""
    return x.flatten(0, 2) if len(x) == 1 else x.flatten(1, 2)


def tensor(parameters: Parameters, name: str) -> Tensor | None:
    """Without the run axis for one run (squeeze: indexing would cost a copy in the backward pass); None: not there."""
    found = parameters.get(name)
    return found if found is None or len(found) > 1 else found.squeeze(0)


def product(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Rows [(K,) N, i] times the matrix `name`.weight, plus `name`.bias where there is one -> [(K,) N, o]."""
    weight, bias = tensor(parameters, f"{name}.weight"), tensor(parameters, f"{name}.bias")
    assert weight is not None
    return torch.matmul(x, weight) if bias is None else linear(x, weight, bias)


def norm(parameters: Parameters, name: str, kind: str, eps: float, x: Tensor) -> Tensor:
    """Rows [(K,) N, d] -> the same shape.

    layer_norm; rms_norm (Zhang & Sennrich 2019): over the root of the mean square; scale_norm (Nguyen & Salazar 2019):
    over the length, times one number.
    """
    weight = tensor(parameters, f"{name}.weight")
    assert weight is not None
    scale = weight if weight.dim() == 1 else weight.unsqueeze(1)
    if kind == "rms_norm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale
    if kind == "scale_norm":
        return x * scale / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)
    bias = tensor(parameters, f"{name}.bias")
    assert bias is not None
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def activate(activation: str, hidden: Tensor) -> Tensor:
    """[..., m] -> [..., m], gated ones [..., m / 2]."""
    if not activation.endswith(GATED):
        return ACTIVATIONS[activation](hidden)
    value, gate = hidden.chunk(2, -1)
    return value * ACTIVATIONS[activation.removesuffix(GATED)](gate)


def mlp(parameters: Parameters, name: str, activation: str, x: Tensor) -> Tensor:
    """Rows [(K,) N, i] -> [(K,) N, o], through the matrices `name`.up and `name`.down."""
    return product(parameters, f"{name}.down", activate(activation, product(parameters, f"{name}.up", x)))


def combine(scheme: str, depth: int, x: Tensor, branch: Tensor, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Residual stream and a branch's output, rows of both. `normalise` is the norm after the sum, where there is one.

    deepnorm: the stream weighs (2 * depth)^(1/4), Wang et al. 2022 (arXiv 2203.00555), table 1, decoder-only, with the
    depth counted in effective layers. shaped: both are weighed so that squares add up to 1.
    """
    if scheme == "deepnorm":
        return normalise((2.0 * depth) ** 0.25 * x + branch)
    if scheme == "shaped":
        return (1.0 - SHAPED_GAIN**2) ** 0.5 * x + SHAPED_GAIN * branch
    return normalise(x + branch) if scheme in ("post", "sandwich") else x + branch


def attention(
    query: Tensor, key_value: Tensor, positions: Tensor | None, num_heads: int, bias: Tensor | None
) -> Tensor:
    """Causal attention. query [K, B, A, d], key_value [K, B, T, 2d], positions [K, B, A] of the queries (None: all
    tokens in order), bias [K, H, T, T] on the scaled scores or None -> [K, B, A, d]."""
    if bias is None:
        return plain_attention.attention(query, key_value, positions, num_heads)
    num_runs, batch, num_queries, _ = query.shape
    length = key_value.shape[2]
    mask = causal(bias, positions)  # [K, B or 1, H, A, T]
    mask = mask.expand(num_runs, batch, *mask.shape[2:]) if num_runs > 1 else mask
    q = query.reshape(num_runs * batch, num_queries, num_heads, -1).transpose(1, 2)
    k, v = key_value.reshape(num_runs * batch, length, 2, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1))
    return mixed.transpose(1, 2).reshape(query.shape)


def causal(bias: Tensor, positions: Tensor | None) -> Tensor:
    """bias [K, H, T, T] -> [K, 1, H, T, T], with positions [K, B, A] the rows of those queries [K, B, H, A, T];
    -inf where a query may not look."""
    length = bias.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
    bias = bias.masked_fill(later, float("-inf"))
    if positions is None:
        return bias.unsqueeze(1)
    run = torch.arange(len(bias), device=bias.device)[:, None, None]
    return bias.transpose(1, 2)[run, positions].transpose(2, 3)  # [K, B, A, H, T] -> [K, B, H, A, T]


def advance(active: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """[K, ...] states: the new one of active runs, the old one of the others."""
    if all(active):
        return new
    mask = torch.tensor(active, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)
