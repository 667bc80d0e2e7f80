"""Arithmetic modulo a prime, the smallest task that groks: two numbers in, one out (Power et al., arXiv 2201.02177)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from groundswell.protocols import Answer, Dataset, Task
from tasks.examples import answer_split, make_dataset
from tasks.vocabulary import IntArray, numbered


class ModularArithmetic(Task):
    """Prompt `<a><b>`, answer `<c>`. A share of all pairs (a, b) is for training, the others for the test.

    There is no operator and no `=` token: the operation is fixed, and the answer is read at b.
    """

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    modulus: int = Field(97, gt=2, le=2_048)
    operation: Literal["add", "subtract", "multiply", "divide"] = "add"
    train_fraction: float = Field(0.4, gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self) -> ModularArithmetic:
        if self.operation == "divide" and not is_prime(self.modulus):
            raise ValueError(f"task.operation divide needs a prime task.modulus, not {self.modulus}; take 97 or 113")
        if not 0 < self._num_train < len(self._pairs()):
            raise ValueError(
                f"task.train_fraction {self.train_fraction:g} leaves no pair to train on or none to test; take 0.4"
            )
        return self

    @property
    def vocab_size(self) -> int:
        return self.modulus

    @property
    def max_length(self) -> int:
        return 2

    @property
    def num_answers(self) -> int:
        return 1

    def build(self) -> Dataset:
        pairs = self._pairs()
        pairs = pairs[RandomState(self.seed).permutation(len(pairs))]
        rows = np.column_stack([pairs, self._results(pairs[:, 0], pairs[:, 1])])
        train, test = (answer_split(part, 2, 2, pad=0) for part in (rows[: self._num_train], rows[self._num_train :]))
        evaluation = {"train": train, "test": test}
        return make_dataset(
            self, tuple(numbered("", self.modulus)), {"train": train}, evaluation, Answer(slice(-1, None))
        )

    @property
    def _num_train(self) -> int:
        return round(self.train_fraction * len(self._pairs()))

    def _pairs(self) -> IntArray:
        """All operands [N, 2]; nothing is divided by zero."""
        first, second = np.divmod(np.arange(self.modulus**2), self.modulus)
        pairs = np.stack([first, second], axis=1)
        return pairs[second > 0] if self.operation == "divide" else pairs

    def _results(self, a: IntArray, b: IntArray) -> IntArray:
        if self.operation == "divide":
            inverses = np.array([0, *(pow(number, -1, self.modulus) for number in range(1, self.modulus))])
            return a * inverses[b] % self.modulus
        results = {"add": a + b, "subtract": a - b, "multiply": a * b}
        return results[self.operation] % self.modulus


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
