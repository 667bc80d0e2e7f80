"""Products of two n-digit numbers, digits units first, with partial products and their running sums as chain.

Deng et al. 2023, arXiv 2311.01460, section 4.1. 12 * 34 reads
`2 1 * 4 3||8 4 0 + 0 6 3 0 #### 8 0 4 0`: 48 + 360 = 408. From three digits on, each partial product but the first and
the last is followed by the sum so far, in brackets. Partial product i (from 0) has n + 1 + i digits, the answer 2n.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from tasks.chain_symbols import FILE_NAMES, PROBED, Codes, SymbolChain, Symbols, distinct, row_keys, some_rows
from tasks.chain_text import Example, read_lines
from tasks.vocabulary import IntArray

SYMBOLS = "0123456789+*()"
PLUS, TIMES, OPEN, CLOSE = (SYMBOLS.index(symbol) for symbol in "+*()")


class MultiplicationChain(SymbolChain):
    """Inputs [N, 2n]: the digits of both operands, units first.

    No two training rows have the same operands in the same order, and no operands of validation or test occur in
    another split in either order.
    """

    digits: int = Field(4, gt=0, description="n of both operands")
    train_size: int = Field(10_000, gt=0, description="examples (published: 808,000)")
    validation_size: int = Field(1_000, gt=0, description="examples; of a file, at most so many, the first")
    test_size: int = Field(1_000, gt=0, description="likewise")
    files: str | None = Field(
        None,
        description="folder whose valid.txt and test_bigbench.txt give the operands of validation and test, as far as "
        "it has them",
    )

    @model_validator(mode="after")
    def _check(self) -> MultiplicationChain:
        pairs = (9 * 10 ** (self.digits - 1)) ** 2
        needed = self.train_size + 2 * (self.validation_size + self.test_size)  # each also the other way round
        if needed > pairs:
            raise ValueError(
                f"train_size {self.train_size} with validation and test takes up to {needed} of {pairs} pairs; set "
                f"train_size, validation_size and test_size lower, or digits higher than {self.digits}"
            )
        if self.files is not None and not self._held_out_files():
            names = ", ".join(list(FILE_NAMES.values())[1:])
            raise ValueError(
                f"files {self.files}: has none of {names}; give a folder with one of them, or leave it out"
            )
        return self

    @property
    def symbols(self) -> str:
        return SYMBOLS

    @property
    def num_train(self) -> int:
        return self.train_size

    def sample(self) -> IntArray:
        return self._rows(RandomState(0))(PROBED)

    def draw(self) -> Mapping[str, IntArray]:
        """Raises ConfigError for a line of a file that is no product of this size."""
        draw = self._rows(RandomState(self.seed))
        held_out = {name: self._read(path, name) for name, path in self._held_out_files().items()}
        for name in ("validation", "test"):
            if name not in held_out:
                size = getattr(self, f"{name}_size")
                held_out[name] = distinct(draw, size, self._unordered, self._outside(list(held_out.values())))
        outside = self._outside(list(held_out.values()))
        return {"train": distinct(draw, self.train_size, lambda rows: row_keys(rows, 10), outside), **held_out}

    def write(self, inputs: IntArray) -> Symbols:
        digits, count = self.digits, len(inputs)
        first, second = (part.astype(np.uint8) for part in np.split(inputs, 2, axis=1))
        plus, times, opened, closed = (np.full((count, 1), place, np.uint8) for place in (PLUS, TIMES, OPEN, CLOSE))
        total: Codes = np.zeros((count, digits), np.uint8)
        chain: list[Codes] = []
        for place in range(digits):
            shifted = np.pad(first * second[:, place, None], ((0, 0), (place, 1)))  # two digits: at most 81
            partial = _carried(shifted)
            total = _carried(partial + np.pad(total, ((0, 0), (0, 1))))
            chain += [plus, partial] if place else [partial]
            if 0 < place < digits - 1:  # the last sum is the answer
                chain += [opened, total, closed]
        return Symbols(np.hstack([first, times, second]), np.hstack(chain), total)

    # ---- operands ----

    def _rows(self, random: RandomState) -> Callable[[int], IntArray]:
        number = [(0, 10)] * (self.digits - 1) + [(1, 10)]
        return some_rows(number * 2, random)

    def _unordered(self, rows: IntArray) -> NDArray[Any]:
        """A key that is the same for both orders of the operands."""
        one, other = row_keys(rows, 10), row_keys(np.roll(rows, self.digits, axis=1), 10)
        return np.where(one < other, one, other)

    def _outside(self, splits: Sequence[IntArray]) -> Callable[[IntArray], NDArray[np.bool_]]:
        """Are the operands of rows in none of these splits, in either order?"""
        taken = [self._unordered(split) for split in splits]
        return lambda rows: (
            ~np.isin(self._unordered(rows), np.concatenate(taken)) if taken else np.full(len(rows), True)
        )

    def _held_out_files(self) -> dict[str, Path]:
        """Split -> file of its operands, where there is one."""
        if self.files is None:
            return {}
        paths = {name: Path(self.files) / FILE_NAMES[name] for name in ("validation", "test")}
        return {name: path for name, path in paths.items() if path.is_file()}

    def _read(self, path: Path, split: str) -> IntArray:
        examples = read_lines(path, most=getattr(self, f"{split}_size")).examples
        inputs = np.stack([self._operands(example) for example in examples])
        for line, example in zip(self.lines(inputs), examples, strict=True):
            if line != example.line:
                raise ConfigError(f"{example.source}: is not '{line}', which its operands give; mend it")
        return inputs

    def _operands(self, example: Example) -> IntArray:
        number = rf"((?:\d ){{{self.digits - 1}}}[1-9])"
        match = re.fullmatch(rf"{number} \* {number}", example.question, re.ASCII)
        if match is None:
            raise ConfigError(
                f"{example.source}: '{example.question}' is not two numbers of {self.digits} digits, units first; take "
                "another folder or set task.digits"
            )
        return np.array([int(digit) for number in match.groups() for digit in number.split()])


def _carried(sums: Codes) -> Codes:
    """Sums of digits, units first, at most 246 each [N, w] -> the w digits of the number they make."""
    found = np.asfortranarray(sums)
    for place in range(found.shape[1] - 1):
        over = found[:, place] // 10
        found[:, place] -= over * 10
        found[:, place + 1] += over
    return found
