"""Large buffers that are used again at the next step: on a CPU the first touch of fresh memory costs more than a read.

GPUs have a caching allocator, so there buffers are allocated as always.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 2**15  # elements; below that malloc keeps the pages itself


class Workspace:
    """Buffers given back wait here; one that is never given back is freed as usual.

    Sizes are rounded up to powers of two, so that a few buffers serve batches of all lengths; pages that are never
    touched take no memory.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.dtype, int], list[Tensor]] = defaultdict(list)

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised, of the dtype and device of `like`."""
        size = math.prod(shape)
        if like.device.type != "cpu" or size < SMALL:
            return like.new_empty(shape)
        capacity = 1 << (size - 1).bit_length()
        free = self._free[like.dtype, capacity]
        flat = free.pop() if free else like.new_empty(capacity)
        return flat[:size].view(*shape)

    def give(self, *buffers: Tensor) -> None:
        """No longer used by anyone. Takes those of `take` only."""
        for buffer in buffers:
            if buffer.device.type == "cpu" and buffer._base is not None:
                self._free[buffer.dtype, len(buffer._base)].append(buffer._base)
