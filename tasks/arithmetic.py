"""Addition, subtraction and multiplication of numbers of any length, character by character (arXiv 2405.17399).

Rows are a pure function of the task's seed and the row's number, and are made by whole-array operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Dataset
from tasks.arithmetic_examples import LengthTask, MadeExamples
from tasks.arithmetic_rows import LossOn, Rows, Text, alternate, join, number, pack_rows, same, with_spaces
from tasks.arithmetic_vocabulary import EQUALS, FIRST_SYMBOL, SYMBOLS, VOCABULARIES, Characters
from tasks.numbers import (
    Digits,
    Draws,
    Mask,
    add,
    count_digits,
    key_of,
    multiply,
    printed,
    random_digits,
    random_digits_without_carry,
    shuffled,
    subtract,
    widen,
)
from tasks.vocabulary import IntArray

Operator = Literal["+", "-", "x"]
OPERATORS: dict[str, tuple[Operator, ...]] = {
    "addition": ("+",), "subtraction": ("-",), "mixed": ("+", "-"), "multiplication": ("x",),
}  # fmt: skip
LONGEST = 10_000  # digits of an operand


@dataclass(frozen=True)
class Operands:
    """Of N problems, units first."""

    first: Digits  # [N, W1]
    second: Digits  # [N, W2]
    first_lengths: IntArray  # [N]
    second_lengths: IntArray


class Arithmetic(LengthTask):
    """`A+B=R`, no separators. Every pair of operand lengths occurs equally often (the "bucket" method of the original);
    an operand of more than one digit has no leading zero, and one of one digit is not 0 unless `keep_zero`.

    Where the original cannot be followed: `mixed` and lines with hints are in the paper only (its generator drops such
    lines), both reversal flags together would turn the result twice (`reverse` has one value), and its shuffles and its
    plain generator ignore the seed. Zeros that are put before a negative result come after its sign here.
    `tasks.arithmetic_original` draws the original's own lines.
    """

    operation: Literal["addition", "subtraction", "mixed", "multiplication"] = Field(
        "addition", description="mixed: as many sums as differences"
    )
    max_first: int = Field(20, ge=1, le=LONGEST, description="most digits of the first operand in training")
    max_second: int = Field(20, ge=1, le=LONGEST, description="most digits of the second operand in training")
    min_first: int = Field(1, ge=1)
    min_second: int = Field(1, ge=1)
    sampling: Literal["lengths", "numbers"] = Field(
        "lengths",
        description="lengths: each pair of lengths equally often; numbers: uniform numbers below 10^max, so most are "
        "long (the original's plain generator)",
    )
    reverse: Literal["all", "answer", "none"] = Field("all", description="which numbers are written units first")
    keep_zero: bool = Field(False, description="an operand of one digit may be 0")
    no_carry: bool = Field(False, description="only sums without a carry, each equally often")
    keep_places: bool = Field(False, description="operands are filled up with zeros to their maximum length")
    prepend_zeros: int = Field(
        0, ge=0, description="so many more zeros before operands, and one more before the result"
    )
    interleave: bool = Field(False, description="operands digit by digit in turn, without an operator sign")
    index_hints: bool = Field(False, description="a letter before each digit says its place; needs vocabulary=index")
    space_probability: float = Field(0.0, ge=0, lt=1, description="of a space (PAD) before a character in training")
    vocabulary: Literal["pad", "index"] = "pad"
    loss_on: LossOn = Field("answer", description="all: the prompt's tokens are targets too")
    num_examples: int = Field(20_000_000, gt=0, description="training rows; they are made when they are read")

    @model_validator(mode="after")
    def _check(self) -> Arithmetic:
        for side in ("first", "second"):
            low, high = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
            if low > high:
                raise ValueError(f"min_{side} {low} is more than max_{side} {high}; set task.max_{side} higher")
        if self.index_hints and self.vocabulary != "index":
            raise ValueError("index_hints need letters; set task.vocabulary=index")
        if self.index_hints and self._result_digits(self.max_first, self.max_second) > len(SYMBOLS):
            raise ValueError(f"index_hints have {len(SYMBOLS)} letters; set task.max_first and task.max_second lower")
        if self.index_hints and self.interleave:
            raise ValueError("index_hints cannot be combined with interleave; set task.interleave=false")
        if self.interleave and self.operation == "mixed":
            raise ValueError("interleave writes no operator, so mixed is ambiguous; set task.operation=addition")
        if self.no_carry and self.operation != "addition":
            raise ValueError("no_carry is about sums; set task.operation=addition")
        if self.sampling == "numbers" and (self.no_carry or self.min_first > 1 or self.min_second > 1):
            raise ValueError("sampling numbers has neither no_carry nor least lengths; set task.sampling=lengths")
        return self

    # ---- sizes ----

    @property
    def characters(self) -> Characters:
        return VOCABULARIES[self.vocabulary]

    @property
    def num_train(self) -> int:
        return self.num_examples

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self.max_first, self.max_second

    @property
    def loss_on_tokens(self) -> LossOn:
        return self.loss_on

    def row_shape(self) -> tuple[int, int]:
        prompt, answer = self.cell_shape(self.max_first, self.max_second)
        in_prompt, in_answer = self._most_spaces(prompt), self._most_spaces(answer - 1)
        return prompt + in_prompt + answer + in_answer, answer + in_answer

    def cell_shape(self, first: int, second: int) -> tuple[int, int]:
        """See LengthTask. Raises ConfigError for lengths below 1, or above the letters there are for hints."""
        if not (1 <= first <= LONGEST and 1 <= second <= LONGEST):
            raise ConfigError(f"task: no numbers of {first} and {second} digits; lengths run from 1 to {LONGEST}")
        digits = self._result_digits(first, second)
        if self.index_hints and digits > len(SYMBOLS):
            raise ConfigError(f"task.index_hints: {len(SYMBOLS)} letters, but {digits} digits; ask for shorter numbers")
        each = 2 if self.index_hints else 1
        prompt = each * (self._written(first, self.max_first) + self._written(second, self.max_second))
        answer = each * digits
        if "-" in OPERATORS[self.operation]:  # a difference has a sign, and no digit more than the operands
            answer = max(each * (max(first, second) + self._zeros_of_result) + 1, answer)
        return prompt + (1 if self.interleave else 2), answer + 1

    def longest_run(self, first: int, second: int) -> int:
        if self.index_hints:
            return 1
        operands = self._written(first, self.max_first), self._written(second, self.max_second)
        return max(sum(operands) if self.interleave else max(operands), self._result_digits(first, second))

    def _written(self, digits: int, most: int) -> int:
        """Digits of an operand on paper."""
        return (max(digits, most) if self.keep_places else digits) + self.prepend_zeros

    def _result_digits(self, first: int, second: int) -> int:
        """Most digits of a result on paper."""
        longest = first + second if self.operation == "multiplication" else max(first, second)
        if "+" in OPERATORS[self.operation] and not self.no_carry:
            longest += 1
        return longest + self._zeros_of_result

    @property
    def _zeros_of_result(self) -> int:
        return self.prepend_zeros + 1 if self.prepend_zeros else 0

    def _most_spaces(self, characters: int) -> int:
        """Spaces before so many characters: ten standard deviations above the mean, so more never come in practice."""
        p = self.space_probability
        mean, deviation = p * (1 + 0.1 * p), math.sqrt(p * (1 - p) + 0.3 * p * p)
        return math.ceil(characters * mean + 10 * deviation * math.sqrt(characters)) if p else 0

    # ---- rows ----

    def build(self) -> Dataset:
        train = MadeExamples(self.num_examples, lambda rows: self.to_train_split(self.train_rows(rows)))
        held_out = np.arange(self.num_examples, self.num_examples + self.num_test)
        return self.assemble(train, self.train_rows(held_out))

    def train_rows(self, rows: IntArray) -> Rows:
        """Row numbers [N] -> problems as in training. Rows from `num_examples` on are held out."""
        draws = Draws(key_of("arithmetic", self.seed), rows)
        operators = len(OPERATORS[self.operation])
        if self.sampling == "numbers":
            a, b = (draws.below(10, width).astype(np.uint8) for width in self.trained_lengths)
            operands = Operands(a, b, count_digits(a), count_digits(b))
            which = rows % operators
        else:
            seconds = self.max_second - self.min_second + 1
            kinds = (self.max_first - self.min_first + 1) * seconds * operators
            pairs, which = np.divmod(shuffled(rows, kinds, key_of("lengths", self.seed)), operators)
            lengths = self.min_first + pairs // seconds, self.min_second + pairs % seconds
            operands = self._draw(draws, *lengths, self.trained_lengths)
        prompt, answer = self._write(operands, which, draws)
        if p := self.space_probability:
            widths = self.cell_shape(*self.trained_lengths)
            prompt = with_spaces(prompt, draws, p, self._most_spaces(widths[0]))
            answer = with_spaces(answer, draws, p, self._most_spaces(widths[1] - 1))
        return pack_rows(prompt, answer, self.row_shape()[0])

    def cell_rows(self, first: int, second: int, count: int, seed: int) -> Rows:
        self.cell_shape(first, second)
        rows = np.arange(count)
        draws = Draws(key_of("cell", self.operation, first, second, seed), rows)
        operands = self._draw(draws, np.full(count, first), np.full(count, second), (first, second))
        return pack_rows(*self._write(operands, rows % len(OPERATORS[self.operation]), draws))

    def _draw(self, draws: Draws, first: IntArray, second: IntArray, widths: tuple[int, int]) -> Operands:
        """Uniform operands of these lengths [N]. Widths are fixed, so that a row does not depend on its neighbours."""
        if self.no_carry:
            a, b = random_digits_without_carry(draws, first, second, max(widths), self.keep_zero)
        else:
            a = random_digits(draws.words(widths[0]), first, self.keep_zero)
            b = random_digits(draws.words(widths[1]), second, self.keep_zero)
        return Operands(a, b, first, second)

    def _calculate(self, operands: Operands, which: IntArray) -> tuple[Digits, Mask]:
        """Results and where they are negative; `which` [N] operator each row has."""
        a, b = operands.first, operands.second
        if self.operation == "multiplication":
            return multiply(a, b), np.zeros(len(a), dtype=bool)
        if self.operation == "addition":
            return add(a, b), np.zeros(len(a), dtype=bool)
        difference, negative = subtract(a, b)
        if self.operation == "subtraction":
            return difference, negative
        sums = (which == 0)[:, None]
        return np.where(sums, add(a, b), widen(difference, difference.shape[1] + 1)), negative & ~sums[:, 0]

    def _write(self, operands: Operands, which: IntArray, draws: Draws) -> tuple[Text, Text]:
        """Prompt through `=` and answer."""
        count = len(operands.first)
        result, negative = self._calculate(operands, which)
        windows = draws.below(len(SYMBOLS)) if self.index_hints else None
        in_reverse = self.reverse != "none"
        first, second = (
            self._number(digits, np.maximum(lengths, most) if self.keep_places else lengths, windows)
            for digits, lengths, most in (
                (operands.first, operands.first_lengths, self.max_first),
                (operands.second, operands.second_lengths, self.max_second),
            )
        )
        signs = np.array([self.characters.id_of(sign) for sign in OPERATORS[self.operation]], dtype=np.uint8)
        equals = same(EQUALS, count)
        if self.interleave:
            prompt = [alternate(first, second), equals]
        else:
            prompt = [first, same(signs[which], count), second, equals]
        magnitude = self._number(result, count_digits(result), windows, is_result=True)
        minus = Text(np.full((count, 1), self.characters.id_of("-"), dtype=np.uint8), negative[:, None])
        return join(prompt), join([magnitude, minus] if in_reverse else [minus, magnitude])

    def _number(self, digits: Digits, lengths: IntArray, windows: IntArray | None, is_result: bool = False) -> Text:
        """One number as it is written: zeros, order, hints (`windows` [N, 1]: where each row's letters start)."""
        if self.prepend_zeros:
            lengths = lengths + (self._zeros_of_result if is_result else self.prepend_zeros)
        digits = widen(digits, max(digits.shape[1], int(lengths.max(initial=1))))
        in_reverse = self.reverse == "all" or (is_result and self.reverse == "answer")
        text = number(printed(digits, lengths, in_reverse), lengths)
        if windows is None:
            return text
        letters = FIRST_SYMBOL + (windows + np.arange(digits.shape[1])) % len(SYMBOLS)
        return alternate(Text(letters.astype(np.uint8), text.written), text)
