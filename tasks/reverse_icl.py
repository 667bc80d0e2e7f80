"""Reversal inside the context: the positive control of the reversal task (arXiv 2405.04669, appendix).

A sentence states x → y and asks for y ← x at once, so the answer is a token of the context.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from tasks.entities import Facts, FactTask, letters

FORWARD, BACKWARD, EQUIVALENT = 0, 1, 2


class ReverseICL(FactTask):
    """Sentences `x → y ⇔ y ← x` of every x with every y; validation has new combinations of known tokens."""

    relations: ClassVar[tuple[str, ...]] = ("→", "←", "⇔")
    num_spare: ClassVar[int] = 3

    entity_vocab_size: int = Field(400, ge=1, le=2**20, description="token ids that the letters are drawn from")
    num_x_tokens: int = Field(100, ge=1)
    num_y_tokens: int = Field(10, ge=2)
    train_fraction: float = Field(0.7, gt=0, lt=1, description="of the y of each x")

    @model_validator(mode="after")
    def _check(self) -> ReverseICL:
        taken = self.num_x_tokens + self.num_y_tokens + 3
        if taken > self.entity_vocab_size:
            raise ValueError(
                f"entity_vocab_size {self.entity_vocab_size} is too small for {self.num_x_tokens} x and "
                f"{self.num_y_tokens} y tokens; at least {taken} is needed"
            )
        if not 0 < self._train_per_x < self.num_y_tokens:
            raise ValueError(
                f"train_fraction {self.train_fraction:g} of {self.num_y_tokens} y tokens leaves one side empty; "
                f"choose between {1 / self.num_y_tokens:.3g} and 1, and num_y_tokens of at least 2"
            )
        return self

    @property
    def entity_length(self) -> int:
        return 1

    @property
    def max_length(self) -> int:
        return 6

    @property
    def num_train(self) -> int:
        return self.num_x_tokens * self._train_per_x

    @property
    def _train_per_x(self) -> int:
        return int(self.train_fraction * self.num_y_tokens)

    def draw(self) -> Facts:
        random = RandomState(self.seed)
        ids = letters(random, self, self.num_x_tokens + self.num_y_tokens)
        x_tokens, y_tokens = ids[: self.num_x_tokens], ids[self.num_x_tokens :]
        y = np.stack([y_tokens[random.permutation(self.num_y_tokens)] for _ in x_tokens])
        x = np.repeat(x_tokens[:, None], self.num_y_tokens, axis=1)
        forward, backward, equivalent = (np.full_like(x, token) for token in (FORWARD, BACKWARD, EQUIVALENT))
        rows = np.stack([x, forward, y, equivalent, y, backward, x], axis=2)  # [num_x, num_y, 7]
        train, validation = rows[:, : self._train_per_x], rows[:, self._train_per_x :]
        return Facts(train.reshape(-1, 7), validation.reshape(-1, 7), [x_tokens, y_tokens])
