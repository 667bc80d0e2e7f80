"""A task whose training examples are made as they are read."""

import dataclasses

import torch

from groundswell.protocols import Examples
from tasks.modular_arithmetic import ModularArithmetic


class Made(Examples):
    """A resident split in disguise."""

    def __init__(self, split):
        self.split = split
        self.calls = 0

    def __len__(self):
        return len(self.split)

    def select(self, rows):
        self.calls += 1
        assert rows.dtype == torch.int64 and rows.device == torch.device("cpu")
        return self.split.select(rows)


class MadeModularArithmetic(ModularArithmetic):
    @property
    def resident(self):
        return False

    @property
    def num_train(self):
        return self._num_train

    def build(self):
        dataset = super().build()
        return dataclasses.replace(dataset, train=Made(dataset.train))
