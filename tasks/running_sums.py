"""The sum of some digits in a base or another modulus, with the running sums as chain: `3 1 2 3||0 2 #### 1` in base 4.

A small task on which methods can be told apart: the chain makes each step a sum of two digits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from tasks.chain_symbols import PROBED, SymbolChain, Symbols, distinct, row_keys, some_rows
from tasks.vocabulary import IntArray

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_TRAINED = 100_000  # training rows where no size is given


class RunningSums(SymbolChain):
    """Inputs [N, length]: digits below `base`. The chain is the sums of the first 2 to length - 1 digits, the answer
    the sum of all, each modulo `modulus`. No input occurs twice."""

    length: int = Field(6, ge=3, description="digits of a question")
    base: int = Field(4, ge=2, le=len(DIGITS), description="digits are below it")
    modulus: int | None = Field(None, ge=2, le=len(DIGITS), description="of the sums; default: base")
    train_size: int | None = Field(
        None, gt=0, description=f"examples; default: all that are left, at most {MOST_TRAINED:,}"
    )
    validation_size: int = Field(250, gt=0)
    test_size: int = Field(250, gt=0)

    @model_validator(mode="after")
    def _check(self) -> RunningSums:
        left = self.base**self.length - self.validation_size - self.test_size
        if left < (self.train_size or 1):
            raise ValueError(
                f"train_size {self.train_size or 1}, validation_size and test_size take more than the "
                f"{self.base**self.length} questions there are; set them lower, or length or base higher"
            )
        return self

    @property
    def symbols(self) -> str:
        return DIGITS[: max(self.base, self.modulus or 0)]

    @property
    def num_train(self) -> int:
        left = self.base**self.length - self.validation_size - self.test_size
        return self.train_size or min(left, MOST_TRAINED)

    def sample(self) -> IntArray:
        return RandomState(0).randint(self.base, size=(PROBED, self.length))

    def draw(self) -> Mapping[str, IntArray]:
        sizes = {"validation": self.validation_size, "test": self.test_size, "train": self.num_train}
        draw = some_rows([(0, self.base)] * self.length, RandomState(self.seed))
        rows = distinct(draw, sum(sizes.values()), lambda rows: row_keys(rows, self.base))
        splits = dict(zip(sizes, np.split(rows, np.cumsum(list(sizes.values()))[:-1]), strict=True))
        return {"train": splits.pop("train"), **splits}

    def write(self, inputs: IntArray) -> Symbols:
        sums = inputs.cumsum(1) % (self.modulus or self.base)
        return Symbols(inputs, sums[:, 1:-1], sums[:, -1:])
