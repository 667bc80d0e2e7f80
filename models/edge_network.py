"""What edge masks ask of a transformer: its parts one by one, with frozen weights and no run axis.

Shapes: B batch rows, T tokens, Q query positions, A answer positions, d width, H heads, G key/value heads, W writers,
V outputs (vocabulary).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.edge_graph import EdgeGraph


@dataclass(frozen=True)
class WholeRun:
    """An ordinary pass of the whole network."""

    logits: Tensor  # [B, A, V]
    writers: Tensor | None = None  # [W, B, T, d], what each writer adds to the residual stream
    # the residual stream [B, T, d] as each stage reads it: before layer 0's attention, before its MLP, ..., at the end
    residual: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Outline:
    """What a folder's configuration says of its network; no weights are read for it."""

    graph: EdgeGraph
    width: int
    num_outputs: int
    causal: bool = True


class EdgeNetwork(ABC):
    """A transformer whose residual stream can be formed from outside.

    `graph.embeddings` names the embedding writers: two (token and position), one, or none, in which case the sum of all
    embeddings is part of every reader's input and always clean.
    """

    graph: EdgeGraph
    width: int
    num_outputs: int
    causal: bool = True
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def embeddings(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [W_e, B, T, d]: what each kind of embedding adds, with W_e >= 1 whether they are writers or not."""

    @abstractmethod
    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """The readers' inputs (before the norm) of queries [H, B, Q, d], keys and values [G, B, T, d] -> what each head
        adds to the residual stream [H, B, Q, d], its share of the output bias included.

        `positions` [B, Q]: where the queries are; None: Q = T, all of them.
        """

    @abstractmethod
    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """The reader's input (before the norm) [..., d] -> what the MLP adds [..., d]."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """The last reader's input [..., d] -> [..., V], through the final norm."""

    @abstractmethod
    def run(self, tokens: Tensor, positions: Tensor, keep_writers: bool = False) -> WholeRun:
        """tokens [B, T], positions [B, A] -> an ordinary pass, as fast as the network runs."""

    def position_writer(self) -> int | None:
        """Which writer depends on nothing but the position, and so never differs between two runs; None: no one."""
        names = self.graph.embeddings
        return names.index("pos_embeds") if "pos_embeds" in names else None
