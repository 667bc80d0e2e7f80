"""ACDC: edges are removed one after the other, from the output down, where the divergence from the whole network grows
by less than a threshold (Conmy et al. 2023, arXiv 2304.14997, algorithm 1).

The order is fixed: readers from the last to the first, and of each reader its writers from the last to the first. A
decision depends on those before it, so it is taken as in the sequential algorithm; but because nearly all edges go, a
whole batch of passes is computed on the guess that all of its edges do, and what follows the first wrong guess is
computed again. Shapes: K packed masks, E edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from analysis.circuit_evaluation import GradedTask, grades, inputs
from analysis.circuit_paths import structure
from groundswell.config import ConfigError
from groundswell.protocols import Split
from models.edge_fast import masked_logits
from models.edge_graph import EdgeGraph
from models.edge_network import EdgeNetwork

MAX_GUESSES = 32  # masks in one pass: more need memory and are thrown away when an edge stays

Divergence = Callable[[Tensor], Tensor]  # masks [K, E] -> divergence of each [K]


def acdc(graph: EdgeGraph, divergence: Divergence, threshold: float, max_guesses: int = MAX_GUESSES) -> Tensor:
    """[E] float32 of 0 and 1: the edges that stay. An edge goes where the divergence grows by less than `threshold`.

    Edges into writers that nobody reads any more go without being tried: they change nothing.
    """
    if threshold < 0:
        raise ConfigError(f"threshold {threshold:g}: must not be negative")
    mask = torch.ones(graph.num_edges)
    current, guesses = float(divergence(mask[None])[0]), 1
    waiting = _Candidates(graph)
    while candidates := waiting.next(mask, guesses):
        tried = mask.repeat(len(candidates), 1)
        for row, edge in enumerate(candidates):
            tried[row:, edge] = 0.0  # the guess: all before it are gone
        grown = divergence(tried).tolist()
        for row, edge in enumerate(candidates):
            if grown[row] - current >= threshold:  # it stays; the rest was computed on a wrong guess
                waiting.keep(row)
                guesses = max(1, guesses // 2)
                break
            mask[edge], current = 0.0, grown[row]
        else:
            waiting.keep(len(candidates) - 1)
            guesses = min(2 * guesses, max_guesses)
    return mask


class _Candidates:
    """Edges in the order in which they are tried."""

    def __init__(self, graph: EdgeGraph) -> None:
        self.graph, self.parts = graph, structure(graph)
        order = (self.parts.reader * graph.num_writers + self.parts.writer).argsort(descending=True)
        self.order: list[int] = order.tolist()
        self.readers: list[int] = self.parts.reader.tolist()
        self.owners = _owners(graph)
        self.done = 0
        self._offered: list[int] = []  # places in `order`

    def next(self, mask: Tensor, count: int) -> list[int]:
        """The next `count` edges of one reader; fewer where it has fewer left. Edges of dead readers are cleared."""
        while self.done < len(self.order):
            reader = self.readers[self.order[self.done]]
            end = self.done
            while end < len(self.order) and self.readers[self.order[end]] == reader:
                end += 1
            if self._is_read(reader, mask):
                self._offered = list(range(self.done, min(end, self.done + count)))
                return [self.order[place] for place in self._offered]
            mask[self.order[self.done : end]] = 0.0
            self.done = end
        return []

    def keep(self, row: int) -> None:
        """What was offered is decided up to and with this row."""
        self.done = self._offered[row] + 1

    def _is_read(self, reader: int, mask: Tensor) -> bool:
        owners = self.owners[reader]
        return not owners or bool(any(mask[self.parts.writer == owner].any() for owner in owners))


def _owners(graph: EdgeGraph) -> list[list[int]]:
    """For each reader the writers that it makes; none for the last."""
    owners: list[list[int]] = [[] for _ in range(graph.num_readers)]
    for writer, readers in enumerate(structure(graph).inputs.tolist()):
        for reader in set(readers) - {-1}:
            owners[reader].append(writer)
    return owners


def divergence_of(
    network: EdgeNetwork, task: GradedTask, split: Split, corrupted: bool = True, batch_size: int = 64
) -> Divergence:
    """The task's `kl` from the whole network, mean over the split. The whole network's answers are computed once."""
    batches = list(_batches(network, task, split, corrupted, batch_size))

    @torch.no_grad()
    def divergence(masks: Tensor) -> Tensor:
        total = torch.zeros(len(masks), dtype=torch.float64)
        for batch, clean, other, reference in batches:
            places = batch.positions[None]
            logits = masked_logits(network, masks.to(network.device), None, clean, other, places)
            total += grades(task, logits, reference, batch)["kl"].double().sum(1).cpu()
        return total / len(split)

    return divergence


@torch.no_grad()
def _batches(
    network: EdgeNetwork, task: GradedTask, split: Split, corrupted: bool, batch_size: int
) -> Iterator[tuple[Split, Tensor, Tensor | None, Tensor]]:
    for start in range(0, len(split), batch_size):
        batch = split.select(slice(start, start + batch_size)).to(network.device)
        clean, other = inputs(task, batch.tokens, corrupted)
        reference = network.run(clean, batch.positions).logits
        yield batch, clean[None], None if other is None else other[None], reference
