"""The order in which a run sees its data, and the seeds of a run's random streams."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream_seed(seed: int, stream: str) -> int:
    """An independent 63-bit seed for each named stream of a run (initial weights, data order, dropout)."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream))


class DataOrder:
    """Endless sequence of row numbers: a fresh permutation each epoch, batches run across the seam.

    Every example is seen once an epoch and every batch is full. The state is the generator before the current
    permutation was drawn and the position in it.
    """

    def __init__(self, size: int, source: torch.Generator) -> None:
        self.size = size
        self._source = source
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._before = self._source.get_state()
        self._permutation = torch.randperm(self.size, generator=self._source)
        self.position = 0

    def take(self, count: int) -> Tensor:
        """The next `count` row numbers [count]."""
        pieces = []
        while count:
            if self.position == self.size:
                self._start_epoch()
            piece = self._permutation[self.position : self.position + count]
            self.position += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return torch.cat(pieces)

    def state(self) -> tuple[Tensor, int]:
        return self._before.clone(), self.position

    def load_state(self, before: Tensor, position: int) -> None:
        self._source.set_state(before)
        self._start_epoch()
        self.position = position
