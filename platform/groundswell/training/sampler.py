"""The order in which a run sees its data, and the seeds of a run's random streams."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from groundswell.protocols import Examples, Split


def stream_seed(seed: int, stream: str) -> int:
    """An independent 63-bit seed for each named stream of a run (initial weights, data order, dropout)."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream))


class Order(ABC):
    """An endless sequence of row numbers in which every example is seen once an epoch, and every batch is full."""

    @abstractmethod
    def take(self, count: int) -> Tensor:
        """The next `count` row numbers [count], int64 on the CPU."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is needed to go on with the same rows; names start with "order_"."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, which may be among other tensors."""


def data_order(train: Split | Examples, source: torch.Generator) -> Order:
    """The order in which a run with this generator goes through its training examples."""
    return DataOrder(len(train), source) if isinstance(train, Split) else SequentialOrder(len(train), source)


class DataOrder(Order):
    """A fresh permutation each epoch; batches run across the seam.

    The state is the generator before the current permutation was drawn and the position in it.
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
        pieces = []
        while count:
            if self.position == self.size:
                self._start_epoch()
            piece = self._permutation[self.position : self.position + count]
            self.position += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return torch.cat(pieces)

    def state(self) -> dict[str, Tensor]:
        return {"order_generator": self._before.clone(), "order_position": torch.tensor(self.position)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._source.set_state(state["order_generator"])
        self._start_epoch()
        self.position = int(state["order_position"])


class SequentialOrder(Order):
    """Ascending from a random start, and round again: for examples whose order is random already, and so many that no
    permutation of them fits. The state is the number of rows taken."""

    def __init__(self, size: int, source: torch.Generator) -> None:
        self.size = size
        self._start = int(torch.randint(size, (), generator=source))
        self.position = 0

    def take(self, count: int) -> Tensor:
        first = self._start + self.position
        self.position += count
        return torch.arange(first, first + count) % self.size

    def state(self) -> dict[str, Tensor]:
        return {"order_position": torch.tensor(self.position)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.position = int(state["order_position"])
