"""Where the fast masked pass keeps masks: one matrix a layer for all readers, in one flat vector.

Row 0 of the pass's buffer of differences is what every reader reads, with coefficient 1; the writers that can differ
follow. Shapes: K runs, E edges, R readers of a layer, s rows of the buffer so far.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from models.edge_graph import EdgeGraph


class Layout:
    """`without`: a writer that never differs and has no row."""

    def __init__(self, graph: EdgeGraph, without: int | None) -> None:
        self.graph = graph
        self.writers = [writer for writer in range(graph.num_writers) if writer != without]
        self.num_embeddings = len(graph.embeddings) - (without is not None)
        self.num_rows = 1 + len(self.writers)
        ones, places = graph.num_edges, torch.arange(graph.num_edges)  # `ones` stands for the coefficient 1
        parts: list[Tensor] = []
        self._reads: list[tuple[int, int, int]] = []
        self._own: list[int] = []
        size = 0
        for layer in range(graph.num_layers):
            reads = self._matrix(graph.reads(places, layer), without, ones)
            own = graph.own_heads(places, layer)
            parts += [reads.flatten(), own]
            self._reads.append((size, *reads.shape))
            self._own.append(size + reads.numel())
            size += reads.numel() + len(own)
        parts.append(self._matrix(graph.last(places)[None], without, ones)[0])
        self._last = size
        self.gather = torch.cat(parts)
        self.size = len(self.gather)
        scatter = torch.full((ones + 1,), self.size)  # the place of a gradient that is 0
        scatter[self.gather] = torch.arange(self.size)
        self.scatter = scatter[:ones]

    @staticmethod
    def _matrix(places: Tensor, without: int | None, ones: int) -> Tensor:
        if without is not None:
            places = torch.cat([places[:, :without], places[:, without + 1 :]], 1)
        return torch.cat([torch.full((len(places), 1), ones), places], 1)

    def before(self, layer: int) -> int:
        """Rows that the layer's q, k and v read; its heads follow."""
        return 1 + self.num_embeddings + layer * (self.graph.num_heads + 1)

    # ---- parts of the flat vector [K, size] ----

    def flat(self, edges: Tensor) -> Tensor:
        """[K, E] -> [K, size]."""
        ones = torch.cat([edges, edges.new_ones(len(edges), 1)], 1)
        return ones[:, self.gather.to(edges.device)]

    def unflat(self, flat: Tensor) -> Tensor:
        """Gradients [K, size] -> [K, E]."""
        return torch.cat([flat, flat.new_zeros(len(flat), 1)], 1)[:, self.scatter.to(flat.device)]

    def reads(self, flat: Tensor, layer: int) -> Tensor:
        """[K, R, s], a view."""
        start, *shape = self._reads[layer]
        return flat[:, start : start + shape[0] * shape[1]].unflatten(1, shape)

    def own_heads(self, flat: Tensor, layer: int) -> Tensor:
        """[K, H], a view."""
        return flat[:, self._own[layer] : self._own[layer] + self.graph.num_heads]

    def last(self, flat: Tensor) -> Tensor:
        """[K, rows], a view."""
        return flat[:, self._last :]


@functools.lru_cache(maxsize=16)
def layout_of(graph: EdgeGraph, without: int | None) -> Layout:
    return Layout(graph, without)
