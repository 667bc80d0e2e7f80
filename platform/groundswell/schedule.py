"""When something happens: pure functions of the step, so that a resumed run keeps the same moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from pydantic import Field

from groundswell.config import Component


class Schedule(Component, ABC):
    @abstractmethod
    def due(self, step: int) -> bool:
        """Does it happen after `step` updates? The trainer adds the last step itself."""

    def steps(self, total: int) -> list[int]:
        """All moments in 0..total, the last step included."""
        return [step for step in range(total + 1) if step == total or self.due(step)]


class Every(Schedule):
    """At fixed distances."""

    every: int = Field(100, gt=0, description="steps between two moments")

    def due(self, step: int) -> bool:
        return step % self.every == 0


class DenseThenSparse(Schedule):
    """Often at first, rarely later: Grokked Transformers saves every 2,000 steps to 40,000, then every 50,000."""

    dense_every: int = Field(2_000, gt=0)
    dense_until: int = Field(40_000, ge=0)
    every: int = Field(50_000, gt=0)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or (step <= self.dense_until and step % self.dense_every == 0)


class LogSpaced(Schedule):
    """About `per_decade` moments in each factor of ten, from `first` on (and step 0): even on a logarithmic axis."""

    per_decade: int = Field(10, gt=0)
    first: int = Field(10, gt=0)

    def due(self, step: int) -> bool:
        if step < self.first:
            return step == 0
        # A step is due when it is the first integer at or past one of the geometric marks.
        mark = math.floor(self.per_decade * math.log10(step / self.first) + 1e-9)
        return step == math.ceil(self.first * 10 ** (mark / self.per_decade) - 1e-9)
