"""How the edges of a circuit join up: which readers make what a writer puts out, and which edges lead anywhere.

Shapes: E edges, W writers, R readers.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.edge_graph import Edge, EdgeGraph


@dataclass(frozen=True)
class Structure:
    """A graph's edges as numbers of writers and readers, in the graph's orders of both."""

    graph: EdgeGraph
    writer: Tensor  # [E] int64
    reader: Tensor  # [E] int64
    inputs: Tensor  # [W, 3] int64: readers of a head (its q, its group's k and v), of an MLP (itself); -1: none

    @property
    def num_readers(self) -> int:
        return self.graph.num_readers


@functools.lru_cache(maxsize=8)
def structure(graph: EdgeGraph) -> Structure:
    heads, groups, per_layer = graph.num_heads, graph.num_kv_heads, graph.readers_per_layer
    readers, inputs = [], [[-1, -1, -1]] * len(graph.embeddings)
    for layer in range(graph.num_layers):
        first, last = layer * per_layer, (layer + 1) * per_layer - 1
        readers.append(torch.arange(first, last + 1).repeat_interleave(graph.writers_before(layer)))
        readers.append(torch.full((heads,), last))
        for head in range(heads):
            group = head * groups // heads
            inputs.append([first + head, first + heads + group, first + heads + groups + group])
        inputs.append([last, -1, -1])
    readers.append(torch.full((graph.num_writers,), graph.num_readers - 1))
    return Structure(graph, graph.writer_index, torch.cat(readers), torch.tensor(inputs))


def inputs_of(graph: EdgeGraph, writer: str) -> list[str]:
    """Names of the readers that make what a writer puts out; embeddings have none."""
    places = structure(graph).inputs[graph.writers.index(writer)].tolist()
    return [graph.readers[place] for place in dict.fromkeys(places) if place >= 0]


def leading_to_output(graph: EdgeGraph, mask: Tensor) -> Tensor:
    """Edges [E] of 0 and 1 without those into readers from which no path leads to the output."""
    parts = structure(graph)
    mask = mask.cpu()
    while True:
        feeds = _any(mask, parts.writer, graph.num_writers)
        alive = _readers_of(parts, feeds)
        alive[-1] = True
        kept = mask * alive[parts.reader]
        if torch.equal(kept, mask):
            return kept
        mask = kept


def connected(graph: EdgeGraph, mask: Tensor) -> Tensor:
    """Edges [E] of 0 and 1 on paths to the output that start at an embedding (Hanna et al. 2024, arXiv 2403.17806,
    section 3: nodes without edges on one side are dropped until none is left).

    Where embeddings are no writers every reader has them as input, so every writer is a start.
    """
    parts = structure(graph)
    while True:
        mask = leading_to_output(graph, mask)
        if not graph.embeddings:
            return mask
        read = _any(mask, parts.reader, parts.num_readers)
        has_input = (torch.where(parts.inputs >= 0, read[parts.inputs], False)).any(1)
        has_input[: len(graph.embeddings)] = True
        kept = mask * has_input[parts.writer]
        if torch.equal(kept, mask):
            return kept
        mask = kept


def _any(mask: Tensor, index: Tensor, size: int) -> Tensor:
    """[size] bool: does any edge with this index have a mask above 0?"""
    found = torch.zeros(size, dtype=torch.bool)
    found[index[mask > 0]] = True
    return found


def _readers_of(parts: Structure, writers: Tensor) -> Tensor:
    """[W] bool -> [R] bool: the readers that make what these writers put out."""
    found = torch.zeros(parts.num_readers, dtype=torch.bool)
    readers = parts.inputs[writers].flatten()
    found[readers[readers >= 0]] = True
    return found


def highest(graph: EdgeGraph, scores: Tensor, count: int) -> Tensor:
    """[E] of 0 and 1: the `count` edges whose score [E] has the largest magnitude."""
    mask = torch.zeros(graph.num_edges)
    mask[scores.abs().cpu().topk(min(count, graph.num_edges)).indices] = 1.0
    return mask


def greedy(graph: EdgeGraph, scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """[E] of 0 and 1 for each count, ascending or not: edges taken from the output up, always that with the largest
    magnitude of its score [E] among those that lead to what is there (Hanna et al. 2024, section 3)."""
    parts, size = structure(graph), scores.abs().double().cpu().tolist()
    into: list[list[int]] = [[] for _ in range(parts.num_readers)]
    for edge, reader in enumerate(parts.reader.tolist()):
        into[reader].append(edge)
    writers, inputs = parts.writer.tolist(), parts.inputs.tolist()
    waiting = [(-size[edge], edge) for edge in into[-1]]
    heapq.heapify(waiting)
    reached, order = {parts.num_readers - 1}, list[int]()
    while waiting and len(order) < max(counts):
        edge = heapq.heappop(waiting)[1]
        order.append(edge)
        for reader in inputs[writers[edge]]:
            if reader >= 0 and reader not in reached:
                reached.add(reader)
                for other in into[reader]:
                    heapq.heappush(waiting, (-size[other], other))
    masks = []
    for count in counts:
        mask = torch.zeros(graph.num_edges)
        mask[order[:count]] = 1.0
        masks.append(mask)
    return masks


def shared_edges(circuits: Sequence[Sequence[Edge]]) -> list[Edge]:
    """Edges that all lists have, in the order of the first."""
    others = [set(circuit) for circuit in circuits[1:]]
    return [edge for edge in circuits[0] if all(edge in other for other in others)]
