"""How the outside world reaches a run's workers, so that all of them act after the same update."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from groundswell.rundir import RunFolder

LOOK_SECONDS = 0.5  # how often the first worker looks into the run's folder


class Wish(IntEnum):
    """What the workers are to do. The highest one of any worker counts."""

    GO_ON = 0
    LEAVE = 1  # a worker will be taken away: save, and start again without it
    PAUSE = 2  # save, and leave the run to a later session
    PRUNE = 3  # end the run here


class Leaving(Exception):
    """The run's state is saved; a worker is about to be taken away."""


class Control:
    """A wish of any worker becomes known to all one update later: the exchange travels while they compute."""

    def __init__(
        self,
        folder: RunFolder,
        leads: bool,
        leaving: Callable[[], bool] = lambda: False,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """`leaving`: is this worker about to be taken away (a signal, a drained node)? `look` is called by the first
        worker before it looks into the folder."""
        self.folder, self.leads, self.leaving, self.look = folder, leads, leaving, look
        # Flags and decisions travel as CPU tensors: they never wait for a GPU.
        self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.wish = Wish.GO_ON  # the same on every worker
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._looked = 0.0

    def exchange(self) -> None:
        """Once after every step."""
        self.finish()
        flags = torch.tensor(int(self._own_wish()), dtype=torch.int32)
        self._pending = flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> None:
        """Wait for the exchange under way."""
        if self._pending is not None:
            flags, work = self._pending
            work.wait()
            self.wish, self._pending = max(self.wish, Wish(int(flags))), None

    def _own_wish(self) -> Wish:
        if self.leads and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self.look()
            if self.folder.prune_request() is not None:
                return Wish.PRUNE
            if self.folder.pause_requested():
                return Wish.PAUSE
        return Wish.LEAVE if self.leaving() else Wish.GO_ON

    def broadcast(self, value: Any) -> Any:
        """The first worker's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def broadcast_number(self, value: float) -> float:
        """The first worker's value; cheaper than `broadcast`."""
        number = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(number, 0, group=self.group)
        return float(number)

    def barrier(self) -> None:
        dist.barrier(group=self.group)
