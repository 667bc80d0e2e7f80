"""The edge-masked forward pass, written as it is defined (Bhaskar et al. 2024, arXiv 2406.16778, section 3). The slow,
plain form that the fast one is tested against.

Every reader forms its own input from all earlier writers' outputs x_w; an edge that is masked out carries what the
writer puts out in a run on the corrupted input, c_w, instead, or nothing:

    input_r = sum_w m_wr x_w + (1 - m_wr) c_w        x_w = z_w f_w + (1 - z_w) c_w

Shapes: K packed runs, B rows of each, N = K*B, T tokens, A answer positions, V outputs, d width, E edges, W writers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.edge_network import EdgeNetwork


def masked_logits(
    network: EdgeNetwork,
    edges: Tensor,
    nodes: Tensor | None,
    clean: Tensor,
    corrupted: Tensor | None,
    positions: Tensor,
    corrupted_writers: Tensor | None = None,
) -> Tensor:
    """edges [K, E], nodes [K, W] (None: all 1), clean and corrupted tokens [K, B, T], positions [K, B, A] ->
    logits [K, B, A, V].

    Tokens and positions may be [1, B, ...], shared by all runs. Without `corrupted` the ablation is by zero.
    `corrupted_writers` [W, N, T, d] takes the place of an ordinary run on the corrupted tokens.
    """
    places = _rows(positions, len(edges))
    if corrupted_writers is None and corrupted is not None:
        corrupted_writers = network.run(_rows(corrupted, len(edges)), places, keep_writers=True).writers
    final = masked_stream(network, edges, nodes, clean, corrupted_writers)[0]
    answers = final.gather(1, places.unsqueeze(-1).expand(-1, -1, network.width))
    return network.logits(answers).unflatten(0, (len(edges), -1))


def masked_stream(
    network: EdgeNetwork, edges: Tensor, nodes: Tensor | None, clean: Tensor, corrupted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `masked_logits`, with the corrupted run's writers [W, N, T, d] -> the last reader's input [N, T, d], and what
    each writer puts out [W, N, T, d]."""
    graph = network.graph
    stream = _Stream(edges, nodes, corrupted, network.dtype)
    embeddings = network.embeddings(_rows(clean, len(edges)))
    if graph.embeddings:
        stream.write(embeddings)
    else:
        stream.always = embeddings.sum(0)
    heads, groups = graph.num_heads, graph.num_kv_heads
    for layer in range(graph.num_layers):
        masks, own = graph.reads(edges, layer), graph.own_heads(edges, layer)
        queries, keys, values = stream.read(masks[:, :-1]).split([heads, groups, groups])
        stream.write(network.attend(layer, queries, keys, values))
        stream.write(network.mlp(layer, stream.read(torch.cat([masks[:, -1], own], -1)[:, None])))
    return stream.read(graph.last(edges)[:, None])[0], torch.stack(stream.outputs)


def _rows(x: Tensor, num_runs: int) -> Tensor:
    """[K or 1, B, ...] -> [N, ...]."""
    return x.expand(num_runs, *x.shape[1:]).flatten(0, 1)


class _Stream:
    """What the writers have put out so far."""

    always: Tensor | None = None  # [N, T, d]: part of every reader's input

    def __init__(self, edges: Tensor, nodes: Tensor | None, corrupted: Tensor | None, dtype: torch.dtype) -> None:
        self.num_runs, self.nodes, self.corrupted, self.dtype = len(edges), nodes, corrupted, dtype
        self.outputs: list[Tensor] = []  # [N, T, d] each

    def write(self, outputs: Tensor) -> None:
        """Outputs [w, N, T, d] of the next w writers, scaled by their node masks."""
        start, count = len(self.outputs), len(outputs)
        if self.nodes is not None:
            rows = outputs.shape[1] // self.num_runs
            scale = self.nodes[:, start : start + count].T.repeat_interleave(rows, dim=1)[..., None, None]
            scale = scale.to(self.dtype)
            outputs = scale * outputs
            if self.corrupted is not None:
                outputs = outputs + (1 - scale) * self.corrupted[start : start + count]
        self.outputs += outputs.unbind()

    def read(self, masks: Tensor) -> Tensor:
        """Masks [K, R, writers so far] -> inputs of R readers [R, N, T, d]."""
        masks, count = masks.to(self.dtype), masks.shape[-1]
        total: Tensor | float = 0.0 if self.always is None else self.always
        if count == 0:
            assert self.always is not None
            return self.always.expand(masks.shape[1], *self.always.shape)
        total = total + self._sum(masks, torch.stack(self.outputs))
        if self.corrupted is not None:
            total = total + self._sum(1 - masks, self.corrupted[:count])
        return total

    def _sum(self, weights: Tensor, x: Tensor) -> Tensor:
        """[K, R, w], [w, N, T, d] -> [R, N, T, d]."""
        by_run = x.unflatten(1, (self.num_runs, -1))
        return torch.einsum("krw,wkbtd->rkbtd", weights, by_run).flatten(1, 2)
