"""Circuits of an edge graph: masks of 0 and 1, how they are cut out of soft masks, and edges.json.

Shapes: E edges, W writers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import atomic_write
from models.edge_graph import Edge, EdgeGraph

if TYPE_CHECKING:
    from models.edge_masked import EdgeMasked

SEARCH_WIDTH = 1e-5  # the threshold search ends when its interval is narrower: 17 halvings of [0, 1]


@dataclass(frozen=True)
class Circuit:
    """Which edges are kept. A kept edge whose writer is off carries nothing, and is not listed."""

    graph: EdgeGraph
    mask: Tensor  # [E] float32 of 0 and 1
    nodes: Tensor  # [W] float32 of 0 and 1: which writers write at all

    @classmethod
    def of_edges(cls, graph: EdgeGraph, edges: Iterable[Edge]) -> Circuit:
        """Exactly these edges, all writers on. Raises ConfigError, which names an edge that the graph does not have."""
        return cls(graph, graph.mask_of(edges), torch.ones(graph.num_writers))

    @property
    def edges(self) -> list[Edge]:
        """In the published order of edges.json."""
        return self.graph.listed(self.mask, self.nodes)

    @property
    def num_edges(self) -> int:
        return int((effective_mask(self.graph, self.mask, self.nodes) > 0).sum())

    @property
    def edge_sparsity(self) -> float:
        """Part of the graph's edges that carry nothing."""
        return 1.0 - self.num_edges / self.graph.num_edges


def sparsity(masks: Tensor) -> Tensor:
    """[..., N] -> [...]: one minus the mean, in float32 or wider, because bfloat16 rounds 1 - 1041/3872820 to 1."""
    wide = masks if masks.dtype == torch.float64 else masks.float()
    return 1.0 - wide.mean(-1)


def effective_mask(graph: EdgeGraph, edges: Tensor, nodes: Tensor) -> Tensor:
    """Edges [..., E] times their writers' masks [..., W] -> [..., E]."""
    return edges * nodes[..., graph.writer_index.to(nodes.device)]


def effective_sparsity(graph: EdgeGraph, edges: Tensor, nodes: Tensor) -> Tensor:
    """Edge sparsity [...] where a writer that is off takes all its edges with it."""
    return sparsity(effective_mask(graph, edges, nodes))


def threshold_search(masks: Tensor, target: float) -> Iterator[tuple[float, float]]:
    """Bisection for the threshold at which [masks > threshold] has the sparsity `target`: (threshold, sparsity) of each
    round. `masks` [N] in [0, 1]."""
    low, high = 0.0, 1.0
    while high - low > SEARCH_WIDTH:
        threshold = (low + high) / 2
        found = float((masks <= threshold).double().mean())
        yield threshold, found
        low, high = (low, threshold) if found > target else (threshold, high)


def find_threshold(masks: Tensor, target: float | None = None) -> float:
    """The last threshold that the search tries, as in the published code. `target`: by default the sparsity of `masks`
    [N] themselves. Where masks are tied the sparsity found differs a little."""
    goal = float(sparsity(masks.double())) if target is None else target
    return [threshold for threshold, _ in threshold_search(masks, goal)][-1]


def binary(masks: Tensor, target: float | None = None) -> Tensor:
    """[N] soft masks -> [N] float32 of 0 and 1 at the threshold found by search."""
    return (masks > find_threshold(masks, target)).float()


def binary_circuit(
    model: EdgeMasked,
    parameters: Mapping[str, Tensor],
    run: int = 0,
    edge_sparsity: float | None = None,
    node_sparsity: float | None = None,
) -> Circuit:
    """The circuit of one run of a pack (parameters [K, *shape]): thresholds for edges and nodes, each found by search,
    with the sparsities of the soft masks or those that are asked for."""
    edges, nodes = model.deterministic(parameters)
    return Circuit(model.graph, binary(edges[run].cpu(), edge_sparsity), binary(nodes[run].cpu(), node_sparsity))


def save_edges(path: str | Path, edges: Iterable[Edge]) -> None:
    """Write edges.json: a list of [writer, reader]."""
    atomic_write(path, json.dumps([list(edge) for edge in edges]) + "\n")


def load_edges(path: str | Path, graph: EdgeGraph) -> Circuit:
    """Read edges.json: exactly the listed edges are kept, all writers are on. Raises ConfigError, which names the file
    and the edge, where the list is none or belongs to another graph."""
    try:
        edges = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give an edges.json") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); give a list of [writer, reader]") from None
    pairs = isinstance(edges, list) and all(
        isinstance(edge, list) and all(isinstance(name, str) for name in edge) for edge in edges
    )
    if not pairs:
        raise ConfigError(f"{path}: not an edge list; give a JSON list of [writer, reader]")
    try:
        return Circuit.of_edges(graph, [tuple(edge) for edge in edges])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
