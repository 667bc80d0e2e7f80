"""Sorting numbers of different lengths: `A:7,B:31,C:204=A,B,C` (arXiv 2405.17399, section 4.2 and appendix)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Dataset
from tasks.arithmetic_examples import LengthTask, MadeExamples
from tasks.arithmetic_rows import Rows, Text, alternate, join, number, pack_rows, same
from tasks.arithmetic_vocabulary import EQUALS, SYMBOLS, VOCABULARIES, Characters, Ids
from tasks.numbers import Digits, Draws, key_of, printed, random_digits, shuffled
from tasks.vocabulary import IntArray

SYNTAX = ",:D"
LIMB = 18  # decimal digits that an int64 holds
VOCABULARY = VOCABULARIES["sort"]


class Sorting(LengthTask):
    """An array of numbers, each named by a symbol; the answer lists the symbols by ascending number, equal ones in
    their order. Every pair (length of the array, most digits) occurs equally often; a number's count of digits is
    uniform up to that, and then the number among those of that count.

    Symbols of a row are neighbours in a cyclic alphabet. By default it leaves out `,` and `:`, which are syntax, and
    `D`; alphabet=original has all 102, and its first symbol twice as often, as the original draws them.
    """

    max_digits: int = Field(10, ge=1, le=1_000, description="most digits of a number in training")
    max_numbers: int = Field(10, ge=1, le=len(SYMBOLS), description="longest array in training")
    reverse: Literal["all", "none"] = Field("all", description="all: numbers are written units first")
    index_hints: bool = Field(False, description="a letter before each digit says its place")
    alphabet: Literal["plain", "original"] = "plain"
    num_examples: int = Field(20_000_000, gt=0, description="training rows; they are made when they are read")

    @model_validator(mode="after")
    def _check(self) -> Sorting:
        for field, value in (("max_numbers", self.max_numbers), ("max_digits", self.max_digits * self.index_hints)):
            if value > len(self.symbols):
                raise ValueError(f"{field} {value} is more than the {len(self.symbols)} symbols there are; take fewer")
        return self

    @property
    def characters(self) -> Characters:
        return VOCABULARY

    @property
    def num_train(self) -> int:
        return self.num_examples

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.max_digits, self.max_numbers

    @property
    def symbols(self) -> Ids:
        """Ids of the cyclic alphabet, in order."""
        left_out = SYNTAX if self.alphabet == "plain" else ""
        return np.array([VOCABULARY.id_of(symbol) for symbol in SYMBOLS if symbol not in left_out], dtype=np.uint8)

    def row_shape(self) -> tuple[int, int]:
        prompt, answer = self.cell_shape(self.max_digits, self.max_numbers)
        return prompt + answer, answer

    def cell_shape(self, first: int, second: int) -> tuple[int, int]:
        """See LengthTask: most digits and length of the array; the prompt's length is that of the longest."""
        if first < 1 or not 1 <= second <= len(self.symbols):
            raise ConfigError(
                f"task: no arrays of {second} numbers of {first} digits; "
                f"numbers have at least 1 digit, and there are {len(self.symbols)} symbols"
            )
        if self.index_hints and first > len(self.symbols):
            raise ConfigError(
                f"task.index_hints: {len(self.symbols)} letters, but {first} digits; take shorter numbers"
            )
        digits = 2 * first if self.index_hints else first
        return second * (digits + 3), 2 * second

    def longest_run(self, first: int, second: int) -> int:
        return 1 if self.index_hints else first

    def build(self) -> Dataset:
        train = MadeExamples(self.num_examples, lambda rows: self.to_train_split(self.train_rows(rows)))
        held_out = np.arange(self.num_examples, self.num_examples + self.num_test)
        return self.assemble(train, self.train_rows(held_out))

    def train_rows(self, rows: IntArray) -> Rows:
        """Row numbers [N] -> problems as in training. Rows from `num_examples` on are held out."""
        kinds = self.max_digits * self.max_numbers
        numbers, digits = np.divmod(shuffled(rows, kinds, key_of("lengths", self.seed)), self.max_digits)
        draws = Draws(key_of("sorting", self.seed), rows)
        prompt, answer = self._write(draws, digits + 1, numbers + 1, self.max_digits, self.max_numbers)
        return pack_rows(prompt, answer, self.row_shape()[0])

    def cell_rows(self, first: int, second: int, count: int, seed: int) -> Rows:
        self.cell_shape(first, second)
        draws = Draws(key_of("sorting cell", first, second, seed), np.arange(count))
        return pack_rows(*self._write(draws, np.full(count, first), np.full(count, second), first, second))

    def _write(
        self, draws: Draws, most_digits: IntArray, sizes: IntArray, width: int, longest: int
    ) -> tuple[Text, Text]:
        """Prompt through `=` and answer of rows with so many digits and numbers [N]."""
        count = len(sizes)
        lengths = 1 + draws.below(most_digits[:, None], longest)  # [N, M]
        digits = random_digits(draws.words(longest * width).reshape(-1, width), lengths.reshape(-1))
        exists = np.arange(longest) < sizes[:, None]
        names = self._windows(draws, longest)  # [N, M]

        each = number(printed(digits, lengths.reshape(-1), self.reverse == "all"), lengths.reshape(-1))
        if self.index_hints:
            letters = np.repeat(self._windows(draws, width), longest, axis=0)
            each = alternate(Text(letters, each.written), each)
        total = count * longest
        comma, colon = VOCABULARY.id_of(","), VOCABULARY.id_of(":")
        entries = join([same(comma, total), same(names.reshape(-1), total), same(colon, total), each])
        written = entries.written.reshape(count, longest, -1) & exists[:, :, None]
        written[:, 0, 0] = False  # no comma before the first
        prompt = Text(entries.ids.reshape(count, -1), written.reshape(count, -1))

        order = ascending(digits.reshape(count, longest, width), exists)
        listed = np.stack([np.full_like(names, comma), np.take_along_axis(names, order, axis=1)], axis=2)
        shown = np.stack([exists & (np.arange(longest) > 0), exists], axis=2)
        answer = Text(listed.reshape(count, -1), shown.reshape(count, -1))
        return join([prompt, same(EQUALS, count)]), answer

    def _windows(self, draws: Draws, width: int) -> Ids:
        """A stretch of the alphabet for each row [N, width]."""
        symbols = self.symbols
        starts = draws.below(len(symbols) + (self.alphabet == "original"))
        return symbols[(starts + np.arange(width)) % len(symbols)]


def ascending(digits: Digits, exists: np.ndarray) -> IntArray:
    """Stable order of numbers [N, M, W], units first; those that do not exist [N, M] come last -> places [N, M]."""
    count, longest, width = digits.shape
    order = np.tile(np.arange(longest), (count, 1))
    for start in range(0, width, LIMB):  # from the least significant limb to the most: later sorts decide
        limb = digits[:, :, start : start + LIMB]
        values = limb.astype(np.int64) @ (10 ** np.arange(limb.shape[2], dtype=np.int64))
        order = _reorder(order, values)
    return _reorder(order, (~exists).astype(np.int64))


def _reorder(order: IntArray, values: IntArray) -> IntArray:
    by_value = np.argsort(np.take_along_axis(values, order, axis=1), axis=1, kind="stable")
    return np.take_along_axis(order, by_value, axis=1)
