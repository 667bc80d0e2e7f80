"""The training examples of a pack's members, resident on the device or made as they are read.

Shapes: K members, B batch rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from groundswell.protocols import Dataset, Examples, Split

NAMES = ("tokens", "positions", "targets")


class TrainingData(ABC):
    @abstractmethod
    def place(self, rows: Tensor) -> Tensor:
        """Each member's row numbers [K, N], int64 on the CPU, as `batch` wants them and where it wants them."""

    @abstractmethod
    def batch(self, rows: Tensor) -> Split:
        """Examples [K, B, ...] on the device, of placed rows [K, B]."""


def training_data(datasets: Sequence[Dataset], device: torch.device) -> TrainingData:
    """`datasets`: one a member; members may share one."""
    trains = [dataset.train for dataset in datasets]
    splits = [train for train in trains if isinstance(train, Split)]
    return Resident(splits, device) if len(splits) == len(trains) else Made(trains, device)


class Resident(TrainingData):
    """Each distinct split once, end to end; a member's rows start at its offset."""

    def __init__(self, splits: Sequence[Split], device: torch.device) -> None:
        unique = {id(split): split for split in splits}
        offsets, start = {}, 0
        for key, split in unique.items():
            offsets[key] = start
            start += len(split)
        self.device = device
        self.examples = Split(
            *(torch.cat([getattr(split, name) for split in unique.values()]).to(device) for name in NAMES)
        )
        self.offsets = torch.tensor([offsets[id(split)] for split in splits])

    def place(self, rows: Tensor) -> Tensor:
        return (rows + self.offsets[:, None]).to(self.device)

    def batch(self, rows: Tensor) -> Split:
        shape, flat = rows.shape, rows.reshape(-1)
        return Split(*(getattr(self.examples, name).index_select(0, flat).view(*shape, -1) for name in NAMES))


class Made(TrainingData):
    """Batches are made on the CPU, one call for all members of a data set, and sent to the device."""

    def __init__(self, sources: Sequence[Split | Examples], device: torch.device) -> None:
        members: dict[int, list[int]] = {}
        for member, source in enumerate(sources):
            members.setdefault(id(source), []).append(member)
        self.device = device
        self._groups = [(sources[group[0]], group) for group in members.values()]

    def place(self, rows: Tensor) -> Tensor:
        return rows

    def batch(self, rows: Tensor) -> Split:
        made = [source.select(rows[group].reshape(-1)) for source, group in self._groups]
        order = torch.tensor([member for _, group in self._groups for member in group]).argsort()
        return Split(*(self._send([getattr(split, name) for split in made], rows.shape, order) for name in NAMES))

    def _send(self, parts: Sequence[Tensor], shape: torch.Size, order: Tensor) -> Tensor:
        whole = parts[0].view(*shape, -1) if len(parts) == 1 else torch.cat(list(parts)).view(*shape, -1)[order]
        # From pinned memory the copy travels while the device computes, and the host does not wait for it.
        return whole.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else whole
