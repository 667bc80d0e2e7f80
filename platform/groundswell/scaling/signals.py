"""A worker that is told to go: by SIGTERM (a preempted machine, the end of a job), or by Ray draining its node."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback

_told = threading.Event()


class CatchTermination(WorkerGroupCallback):
    """Has every worker take note of SIGTERM. Ray Train's training function runs in a thread, where Python allows no
    signal handlers; what a group executes runs in the worker's main thread."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(_catch)


def _catch() -> None:
    _told.clear()
    signal.signal(signal.SIGTERM, lambda number, frame: _told.set())


def is_leaving() -> bool:
    """Will this worker be taken away?"""
    from ray.train.v2._internal.execution.context import get_train_context

    # ray.train.get_preemption_info() would make all workers wait for each other after every step.
    return _told.is_set() or get_train_context().preemption_context.preemption_info is not None
