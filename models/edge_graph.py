"""The edge graph of a transformer: who writes to the residual stream, who reads from it, and one number an edge.

Writers, in index order: the embeddings where they are masked, then for each layer its heads and its MLP. Readers, in
index order: for each layer q of each head, k and v of each key/value head, the MLP; then the one at the end. Every
reader sees all writers before it; no edges lead from q, k, v to their own head (Bhaskar et al. 2024, arXiv 2406.16778,
section 3). Shapes: L layers, H heads, G key/value heads, W writers, E edges.

Edges live in one vector [E]: for each layer the matrix [H + 2G + 1 readers, writers before the layer], by rows, then
the edges [H] from the layer's own heads to its MLP; at the end the last reader's [W].
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundswell.config import ConfigError

LAST_READER = "resid_post"
Edge = tuple[str, str]  # writer, reader


@dataclass(frozen=True)
class EdgeGraph:
    """Sizes and names. `embeddings` are the names of the embedding writers: none, one or two."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embeddings: tuple[str, ...] = ()

    @property
    def num_writers(self) -> int:
        return len(self.embeddings) + self.num_layers * (self.num_heads + 1)

    @property
    def readers_per_layer(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads + 1

    @property
    def num_readers(self) -> int:
        return self.num_layers * self.readers_per_layer + 1

    def writers_before(self, layer: int) -> int:
        """Writers that a layer's q, k and v see; the layer's heads follow them."""
        return len(self.embeddings) + layer * (self.num_heads + 1)

    @property
    def num_edges(self) -> int:
        return self._starts[-1] + self.num_writers

    @functools.cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where each layer's edges begin, and the last reader's."""
        starts = [0]
        for layer in range(self.num_layers):
            starts.append(starts[-1] + self.readers_per_layer * self.writers_before(layer) + self.num_heads)
        return tuple(starts)

    # ---- parts of the vector ----

    def reads(self, edges: Tensor, layer: int) -> Tensor:
        """[..., E] -> the layer's readers' edges from earlier layers [..., H + 2G + 1, writers before], a view."""
        start, width = self._starts[layer], self.writers_before(layer)
        stop = start + self.readers_per_layer * width
        return edges[..., start:stop].unflatten(-1, (self.readers_per_layer, width))

    def own_heads(self, edges: Tensor, layer: int) -> Tensor:
        """[..., E] -> edges from the layer's heads to its MLP [..., H], a view."""
        stop = self._starts[layer + 1]
        return edges[..., stop - self.num_heads : stop]

    def last(self, edges: Tensor) -> Tensor:
        """[..., E] -> edges to the last reader [..., W], a view."""
        return edges[..., self._starts[-1] :]

    # ---- names ----

    @functools.cached_property
    def writers(self) -> tuple[str, ...]:
        names = list(self.embeddings)
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}" for head in range(self.num_heads)] + [f"m{layer}"]
        return tuple(names)

    def layer_readers(self, layer: int) -> list[str]:
        """The number of a k or v reader is that of its key/value head."""
        groups = (("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads))
        return [f"a{layer}.h{head}.{part}" for part, count in groups for head in range(count)] + [f"m{layer}"]

    @functools.cached_property
    def readers(self) -> tuple[str, ...]:
        names = (name for layer in range(self.num_layers) for name in self.layer_readers(layer))
        return (*names, LAST_READER)

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Names in the order of the vector."""
        names: list[Edge] = []
        for layer in range(self.num_layers):
            before = self.writers_before(layer)
            names += [(writer, reader) for reader in self.layer_readers(layer) for writer in self.writers[:before]]
            names += [(writer, f"m{layer}") for writer in self.writers[before : before + self.num_heads]]
        return tuple(names + [(writer, LAST_READER) for writer in self.writers])

    @functools.cached_property
    def index(self) -> dict[Edge, int]:
        """Place of each edge in the vector."""
        return {edge: place for place, edge in enumerate(self.edges)}

    @functools.cached_property
    def writer_index(self) -> Tensor:
        """[E] int64: each edge's writer."""
        return torch.tensor([self._writer_places[writer] for writer, _ in self.edges])

    @functools.cached_property
    def _writer_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.writers)}

    # ---- edge lists ----

    def listed(self, mask: Tensor, nodes: Tensor | None = None) -> list[Edge]:
        """Edges with mask [E] > 0 whose writer's mask [W] is > 0, in the published order of edges.json: layer by layer
        all q readers of one writer, then k, v; the edges to the MLP after those; the last reader's at the end."""
        kept = mask > 0
        if nodes is not None:
            kept = kept & (nodes > 0)[self.writer_index.to(kept.device)]
        found = [self.edges[place] for place in kept.nonzero().flatten().tolist()]
        return sorted(found, key=self._published_place)

    def _published_place(self, edge: Edge) -> tuple[int, int, int, int]:
        writer, reader = edge
        place = self._writer_places[writer]
        if reader == LAST_READER:
            return self.num_layers, 0, place, 0
        layer = int(re.match(r"[am](\d+)", reader)[1])  # type: ignore[index]
        if reader.startswith("m"):
            return layer, 1, place, 0
        return layer, 0, place, self.layer_readers(layer).index(reader)

    def mask_of(self, edges: Iterable[Sequence[str]]) -> Tensor:
        """A list of [writer, reader] -> [E] float32 of 0 and 1. Raises ConfigError, which names the edge."""
        mask = torch.zeros(self.num_edges)
        for edge in edges:
            place = self.index.get((edge[0], edge[1])) if len(edge) == 2 else None
            if place is None:
                raise ConfigError(
                    f"edge {' -> '.join(map(str, edge))} is not in the graph of {self.num_layers} layers with "
                    f"{self.num_heads} heads; the list belongs to another model"
                )
            mask[place] = 1.0
        return mask
