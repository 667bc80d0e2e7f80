"""An ordinary pass of a folded network, of which the fast masked pass keeps what it needs.

Shapes: N sequences, T tokens, A answer positions, d width, h head width, H heads, G key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.edge_folded import FoldedTransformer


@dataclass
class OrdinaryPass:
    """Of the last layer, queries and MLP at answers only: for T read A in what is marked so (*)."""

    residual: list[Tensor] = field(default_factory=list)  # [N, T, d] before each layer
    keys: list[Tensor] = field(default_factory=list)  # [G, N, T, h], turned
    values: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)  # [H, N, T, h] (*), before the output matrix
    attention: list[Tensor] = field(default_factory=list)  # [N, T, d] (*), all heads together
    mlp: list[Tensor] = field(default_factory=list)  # [N, T, d] (*)
    final: Tensor = field(init=False)  # [N, A, d]


def ordinary_pass(parts: FoldedTransformer, tokens: Tensor, positions: Tensor) -> OrdinaryPass:
    """tokens [N, T], positions [N, A]."""
    kept, x = OrdinaryPass(), parts.embeddings(tokens).sum(0)
    heads, groups = parts.graph.num_heads, parts.graph.num_kv_heads
    everywhere = torch.arange(tokens.shape[1], device=tokens.device)
    last = len(parts.layers) - 1
    bias, places = hidden_bias(everywhere[None], len(everywhere), x.dtype), everywhere[None]
    for number, layer in enumerate(parts.layers):
        kept.residual.append(x)
        joined, _ = parts.joined(number)(x.flatten(0, 1))
        by_head = joined.view(*x.shape[:2], -1, parts.head_width).permute(2, 0, 1, 3)
        q, k, v = by_head.split([heads, groups, groups])
        if number == last:
            places, x, bias = positions, take(x, positions), hidden_bias(positions, len(everywhere), x.dtype)
            q = q.gather(2, positions[None, :, :, None].expand(len(q), -1, -1, q.shape[-1]))
        k = parts.turn(k, everywhere[None])
        mixed, _ = parts.attend(parts.turn(q, places), k, v, bias)
        kept.keys.append(k)
        kept.values.append(v)
        kept.mixed.append(mixed)
        output = layer.output.flatten(0, 1)
        side_by_side = mixed.permute(1, 2, 0, 3).reshape(-1, len(output))
        kept.attention.append(torch.addmm(layer.output_bias, side_by_side, output).view_as(x))
        x = x + kept.attention[-1]
        outer, saved = parts.mlp(number, x.flatten(0, 1))
        kept.mlp.append(torch.addmm(layer.mlp_output_bias, outer, layer.mlp_output).view_as(x))
        parts.space.give(outer, *saved.buffers)
        x = x + kept.mlp[-1]
    kept.final = x
    return kept


def hidden_bias(places: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Queries at positions [N, Q] -> -inf where one may not look, else 0 [N, Q, length]; positions [1, Q], the same in
    all sequences -> [Q, length]."""
    later = torch.arange(length, device=places.device) > places.unsqueeze(-1)
    bias = torch.zeros(later.shape, dtype=dtype, device=places.device).masked_fill_(later, float("-inf"))
    return bias.squeeze(0) if len(places) == 1 else bias


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x [N, T, d], positions [N, A] -> [N, A, d]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
