"""Parts of the small sweep: real ones, made slow enough to be killed half-way, or broken on purpose."""

import time
from typing import ClassVar

from pydantic import Field

from models.objectives import AnswerLoss
from tasks.modular_arithmetic import ModularArithmetic


class PacedLoss(AnswerLoss):
    """AnswerLoss with a fixed pause at each step, so that a run takes a known time on any machine."""

    pause_s: float = Field(0.0, ge=0)

    def loss(self, *arguments):
        time.sleep(self.pause_s)
        return super().loss(*arguments)


class BrokenForOneSeed(ModularArithmetic):
    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    broken_seed: int = -1

    def build(self):
        if self.seed == self.broken_seed:
            raise RuntimeError(f"no data for seed {self.seed}\n(a second line)")
        return super().build()
