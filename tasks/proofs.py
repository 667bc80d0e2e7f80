"""Which comparisons of entities follow from given facts.

A graph has an edge a -> b where a >= b is given. A non-strict edge arises only from an equality, which gives b -> a
too, so a path without a way back holds a strict edge: reachability alone proves the label, and strictness needs no
graph of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tasks.vocabulary import IntArray

BoolArray = NDArray[np.bool_]
UNPROVEN = -1


def comparison_graph(num_nodes: int, first: IntArray, second: IntArray, labels: IntArray) -> BoolArray:
    """Facts first[n] < = > second[n] (labels 0, 1, 2) -> edges [num_nodes, num_nodes]."""
    edges = np.zeros((num_nodes, num_nodes), bool)
    edges[first[labels >= 1], second[labels >= 1]] = True
    edges[second[labels <= 1], first[labels <= 1]] = True
    return edges


def reachable(edges: BoolArray, sources: IntArray) -> BoolArray:
    """[S, num_nodes]: is there a path of one edge or more? All sources advance together, one product a layer."""
    weights = edges.astype(np.float32)  # float products use BLAS; counts of at most num_nodes are exact
    reached = edges[sources]
    frontier = reached
    while frontier.any():
        frontier = (frontier.astype(np.float32) @ weights > 0) & ~reached
        reached = reached | frontier
    return reached


def proven_labels(edges: BoolArray, nodes: IntArray) -> IntArray:
    """[S, S]: 0 first smaller, 1 equal, 2 first larger, UNPROVEN where no path joins the two (and on the diagonal)."""
    down = reachable(edges, nodes)[:, nodes]  # first >= second
    up = down.T
    labels = np.select([down & up, down, up], [1, 2, 0], UNPROVEN)
    np.fill_diagonal(labels, UNPROVEN)
    return labels
