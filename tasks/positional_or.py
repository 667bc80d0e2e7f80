"""Positional OR: `0010+000000=001000`, where one of two binary vectors has a single one (arXiv 2405.17399)."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Dataset
from tasks.arithmetic_examples import LengthTask
from tasks.arithmetic_rows import Rows, join, number, pack_rows, same
from tasks.arithmetic_vocabulary import EQUALS, VOCABULARIES, Characters
from tasks.numbers import Draws, key_of
from tasks.vocabulary import IntArray

VOCABULARY = VOCABULARIES["pad"]
LONGEST = 10_000


class PositionalOr(LengthTask):
    """All problems up to the given lengths, each once: for every pair of lengths and every place of the shorter vector
    that vector has a one there and the longer has none; the answer is as long as the longer. Of two vectors of one
    length a fair coin says which has the one. The place is counted from the left; nothing is reversed.

    The published recipe draws 100 problems in all, by an option left over from evaluation; this has all of them.
    """

    max_first: int = Field(20, ge=1, le=100)
    max_second: int = Field(20, ge=1, le=100)
    min_first: int = Field(1, ge=1)
    min_second: int = Field(1, ge=1)
    test_fraction: float = Field(0.01, gt=0, lt=1, description="of all problems, held out as the split `test`")

    @model_validator(mode="after")
    def _check(self) -> PositionalOr:
        for side in ("first", "second"):
            low, high = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
            if low > high:
                raise ValueError(f"min_{side} {low} is more than max_{side} {high}; set task.max_{side} higher")
        if not 0 < self._num_held_out < self.num_problems:
            raise ValueError(f"test_fraction {self.test_fraction:g} leaves nothing to test or to train on; take 0.1")
        return self

    @property
    def characters(self) -> Characters:
        return VOCABULARY

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.max_first, self.max_second

    @property
    def num_problems(self) -> int:
        """The sum of min(i, j) over all pairs of lengths."""
        return int(self._shorter().sum())

    @property
    def resident(self) -> bool:
        return True

    @property
    def num_train(self) -> int:
        return self.num_problems - self._num_held_out

    @property
    def _num_held_out(self) -> int:
        return round(self.test_fraction * self.num_problems)

    def row_shape(self) -> tuple[int, int]:
        prompt, answer = self.cell_shape(self.max_first, self.max_second)
        return prompt + answer, answer

    def cell_shape(self, first: int, second: int) -> tuple[int, int]:
        if not (1 <= first <= LONGEST and 1 <= second <= LONGEST):
            raise ConfigError(f"task: no vectors of {first} and {second} places; lengths run from 1 to {LONGEST}")
        return first + second + 2, max(first, second) + 1

    def longest_run(self, first: int, second: int) -> int:
        return max(first, second)

    def build(self) -> Dataset:
        order = np.argsort(Draws(key_of("positional or", self.seed), np.arange(self.num_problems)).words(1)[:, 0])
        rows = self.enumerate_rows()
        train, test = (rows.select(part) for part in np.split(order, [self.num_train]))
        return self.assemble(self.to_train_split(train), test)

    def enumerate_rows(self) -> Rows:
        """All problems in the order of the original: first length, second length, place."""
        shorter = self._shorter().reshape(-1)
        pairs = np.repeat(np.arange(len(shorter)), shorter)
        place = np.arange(len(pairs)) - np.repeat(shorter.cumsum() - shorter, shorter)
        first, second = np.divmod(pairs, self.max_second - self.min_second + 1)
        draws = Draws(key_of("coins", self.seed), np.arange(len(pairs)))
        return _write(draws, first + self.min_first, second + self.min_second, place)

    def cell_rows(self, first: int, second: int, count: int, seed: int) -> Rows:
        """At most min(first, second) problems, all different."""
        self.cell_shape(first, second)
        places = np.arange(min(first, second))
        key = key_of("positional or cell", first, second, seed)
        chosen = np.sort(np.argsort(Draws(key, places).words(1)[:, 0])[:count])
        return _write(Draws(key + 1, chosen), np.full(len(chosen), first), np.full(len(chosen), second), chosen)

    def _shorter(self) -> IntArray:
        """min(i, j) of all pairs of lengths."""
        first = np.arange(self.min_first, self.max_first + 1)
        return np.minimum(first[:, None], np.arange(self.min_second, self.max_second + 1))


def _write(draws: Draws, first: IntArray, second: IntArray, place: IntArray) -> Rows:
    """Problems with vectors of these lengths and the one at this place [N]."""
    count, longer = len(place), np.maximum(first, second)
    coin = draws.below(2)[:, 0] == 0
    one = np.arange(int(longer.max())) == place[:, None]
    in_first = (first < second) | ((first == second) & coin)
    bits = one.astype(np.uint8)
    vectors = [number(bits * in_first[:, None], first), number(bits * ~in_first[:, None], second)]
    prompt = join([vectors[0], same(VOCABULARY.id_of("+"), count), vectors[1], same(EQUALS, count)])
    return pack_rows(prompt, number(bits, longer))
