"""The edge-masked forward pass and its derivative, fast: same numbers as `models.edge_reference`.

What a writer puts out differs from the corrupted run by D_w = f_w - c_w. With C the corrupted run's residual stream at
a stage, and z_w the writer's node mask, every reader of the stage reads

    input_r = C + sum_w m_wr z_w D_w

so one buffer of differences, triangular over the layers, serves all readers of a layer in one matrix product, node
masks are factors of edge masks, and C comes out of an ordinary run. Without a corrupted run C = c = 0. The way back
walks the layers in reverse with one buffer of gradients. Logits, and in the last layer queries and MLP, are computed at
answers only; tokens after the last answer, and before the first that differs, not at all.

Shapes: K runs, B rows of each, N = K*B sequences, S tokens of a row, T tokens of those that are computed, P of the
shared prefix before them, A answers, n = B*T*d, d width, V outputs, E edges, W writers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import edge_reference
from models.edge_layout import Layout, layout_of
from models.edge_network import EdgeNetwork
from models.edge_sweep import Given, Sweep, given
from models.edge_transformer import EdgeTransformer


def masked_logits(
    network: EdgeNetwork,
    edges: Tensor,
    nodes: Tensor | None,
    clean: Tensor,
    corrupted: Tensor | None,
    positions: Tensor,
    corrupted_writers: Tensor | None = None,
    source: Given | None = None,
) -> Tensor:
    """edges [K, E], nodes [K, W] (None: all 1), clean and corrupted tokens [K, B, S], positions [K, B, A] ->
    logits [K, B, A, V].

    Tokens and positions may be [1, B, ...], shared by all runs: the corrupted run then is done once. Without
    `corrupted` the ablation is by zero. `corrupted_writers` [W, N, S, d] takes the place of the corrupted run; it, and
    networks of another kind than EdgeTransformer, go through the reference form. `source`: what `given` finds for these
    tokens, where that is known.
    """
    if corrupted_writers is not None or not isinstance(network, EdgeTransformer):
        return edge_reference.masked_logits(network, edges, nodes, clean, corrupted, positions, corrupted_writers)
    graph = network.graph
    if nodes is not None:
        edges = edges * nodes[:, graph.writer_index.to(nodes.device)]
    layout = layout_of(graph, None if corrupted is None else network.position_writer())
    if source is None:
        with torch.no_grad():
            source = given(network.folded, len(edges), clean, corrupted, positions)
    flat = layout.flat(edges.to(network.dtype))
    logits = _MaskedPass.apply(flat, layout, Sweep(network.folded, layout, source), torch.is_grad_enabled())
    return logits.unflatten(0, (len(edges), -1))


class _MaskedPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Layout, sweep: Sweep, keep: bool) -> Tensor:
        ctx.sweep = sweep
        ctx.save_for_backward(flat)
        return sweep.forward(flat, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        sweep, ctx.sweep = ctx.sweep, None
        if sweep is None:
            raise RuntimeError("the masked pass frees what it kept on its way back; run it again for other gradients")
        return sweep.backward(flat, grad), None, None, None
