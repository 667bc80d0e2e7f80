"""How long a run has trained."""

from __future__ import annotations

import time
from collections.abc import Callable

clock: Callable[[], float] = time.monotonic


class Stopwatch:
    """Training time in seconds, summed over a run's sessions: batches and updates, but no evaluation and no saving."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self.elapsed = elapsed
        self._since = clock()

    def start(self) -> None:
        """What has passed since the last tick does not count."""
        self._since = clock()

    def tick(self) -> None:
        """What has passed since the last tick, or the start, counts."""
        now = clock()
        self.elapsed += now - self._since
        self._since = now
