"""Remove edges one by one while a network still gives the same answers: what is left is a circuit that cannot lose any
one edge, the reference for networks so small that every edge can be tried.

Shapes: B examples, T tokens, A answer positions, V outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.edge_masks import Circuit
from models.edge_network import EdgeNetwork
from models.edge_objective import NEAR
from models.edge_reference import masked_logits


@torch.no_grad()
def greedy_circuit(network: EdgeNetwork, tokens: Tensor, positions: Tensor, corrupted: Tensor | None = None) -> Circuit:
    """One pass over all edges in the graph's order: one that no answer needs is gone for good.

    tokens and corrupted tokens (None: zero ablation) [B, T], positions [B, A]. Answers are the best output, or for
    networks with a single output its value, to 0.05 as in the published test of xproportion.
    """
    graph = network.graph
    edges, nodes = torch.ones(1, graph.num_edges, device=network.device), torch.ones(graph.num_writers)
    expected = network.run(tokens, positions).logits
    other = None if corrupted is None else corrupted[None]
    for edge in range(graph.num_edges):
        edges[0, edge] = 0.0
        logits = masked_logits(network, edges, None, tokens[None], other, positions[None])[0]
        if not same_answers(logits, expected).all():
            edges[0, edge] = 1.0
    return Circuit(graph, edges[0].cpu(), nodes)


def same_answers(logits: Tensor, expected: Tensor) -> Tensor:
    """Logits [B, A, V] -> [B]: are all answers of an example the expected ones?"""
    if logits.shape[-1] == 1:
        return ((logits - expected).abs() <= NEAR).flatten(1).all(-1)
    return (logits.argmax(-1) == expected.argmax(-1)).all(-1)
