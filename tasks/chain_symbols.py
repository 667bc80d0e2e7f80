"""Drawn chains of thought whose texts have equally many symbols: written and tokenised all at once.

N examples, D digits of an input, S symbols of a text (places where only the digits differ).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field

from groundswell.files import check_name, ensure_writable
from tasks.chain_of_thought import ChainOfThought, Widths
from tasks.chain_text import DELIMITER, MARKER, Example, read_line, write_text
from tasks.chain_tokens import END, ChainRows, single_tokens
from tasks.vocabulary import IntArray

SPACE, MARKER_WORDS = " ", (" #", "###")
PROBED = 64  # texts whose tokens are compared with those of a tokenizer
MOST_LISTED = 2**20  # inputs that are listed to draw from them
FILE_NAMES = {"train": "train.txt", "validation": "valid.txt", "test": "test_bigbench.txt"}  # as published


Codes = NDArray[np.integer[Any]]


class Symbols(NamedTuple):
    """Places in the task's own symbols: question [N, Q], chain [N, C], answer [N, A]."""

    question: Codes
    chain: Codes
    answer: Codes


class SymbolChain(ChainOfThought):
    """All draws come from numpy's `RandomState`. Tasks that differ in `form` alone have the same examples."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    seed: int = Field(0, ge=0, lt=2**32)

    @property
    @abstractmethod
    def symbols(self) -> str:
        """The characters of all texts, each of which has a space before it."""

    @abstractmethod
    def draw(self) -> Mapping[str, IntArray]:
        """Split -> inputs [N, D], "train" first."""

    @abstractmethod
    def write(self, inputs: IntArray) -> Symbols:
        """Inputs [N, D] -> what is written of them."""

    def words(self) -> tuple[str, ...]:
        return (END, *(f" {symbol}" for symbol in self.symbols), *MARKER_WORDS, SPACE)

    def examples(self) -> Mapping[str, Sequence[Example]]:
        return {name: [read_line(line) for line in self.lines(inputs)] for name, inputs in self.draw().items()}

    def texts(self, split: str) -> Sequence[Example]:
        draws = self.draw()
        return [read_line(line) for line in self.lines(draws[split])] if split in draws else super().texts(split)

    def lines(self, inputs: IntArray) -> list[str]:
        """Inputs [N, D] -> lines `question||chain #### answer`."""
        parts, table = self.write(inputs), np.frombuffer(self.symbols.encode(), np.uint8)
        columns: list[int] = []
        text = ""
        for part, before in zip(parts, ("", DELIMITER, f" {MARKER} "), strict=True):
            text += before
            columns.extend(len(text) + 2 * place for place in range(part.shape[1]))
            text += " ".join("0" * part.shape[1])
        lines = np.tile(np.frombuffer(f"{text}\n".encode(), np.uint8), (len(inputs), 1))
        lines[:, columns] = table[_joined(len(inputs), parts)]
        return lines.tobytes().decode().splitlines()

    # ---- tokens ----

    def rows(self) -> Mapping[str, ChainRows]:
        table = self._single_tokens()
        if table is None:  # the tokenizer writes some symbol in more than one token
            return super().rows()
        return {name: self._chain_rows(self.write(inputs), table) for name, inputs in self.draw().items()}

    def widths(self) -> Widths:
        table = self._single_tokens()
        if table is None:
            return super().widths()
        return Widths.of([self._chain_rows(self.write(self.sample()), table)])

    @abstractmethod
    def sample(self) -> IntArray:
        """A few inputs [N, D], whatever the seed."""

    def _chain_rows(self, parts: Symbols, table: IntArray) -> ChainRows:
        end, count = 0, len(parts.question)
        marker = [len(self.symbols) + place for place in (1, 2)]
        space = len(self.symbols) + 3
        shifted = Symbols(*(part + 1 for part in parts))  # E is word 0
        codes = _joined(
            count,
            [shifted.question, [space, end], shifted.chain, [space, end], marker, shifted.answer, [space, end]],
        )
        first = parts.question.shape[1] + 1
        second = first + parts.chain.shape[1] + 2
        places = (np.full(count, place) for place in (first, second, codes.shape[1]))
        return ChainRows(table[codes], *places)

    def _single_tokens(self) -> IntArray | None:
        """Token of each word, if every text is one token a word; else None."""
        if self.tokenizer is None:
            return np.arange(len(self.words()), dtype=np.int32)
        tokenizer, (end, text) = self._tokenizer(), self._end()
        table = single_tokens(tokenizer, self.words(), end)
        if table is None:
            return None
        sample = self.sample()
        rows = self._chain_rows(self.write(sample), table).tokens.tolist()
        examples = [read_line(line) for line in self.lines(sample)]
        found = tokenizer.encode_batch_fast([example.text(text) for example in examples])
        return table if [each.ids for each in found] == rows else None


def _joined(count: int, parts: Sequence[Codes | Sequence[int]]) -> Codes:
    """Columns [N, c] or equal for all rows [c] -> [N, S] uint8."""
    arrays = [np.asarray(part, np.uint8) for part in parts]
    return np.hstack([part if part.ndim == 2 else np.broadcast_to(part, (count, len(part))) for part in arrays])


def write_folder(task: SymbolChain, folder: str | Path) -> list[Path]:
    """Write train.txt, valid.txt and test_bigbench.txt, as the published folders have them."""
    target = ensure_writable(folder, "folder")
    return [
        write_text(target / check_name(FILE_NAMES.get(name, f"{name}.txt")), task.lines(inputs))
        for name, inputs in task.draw().items()
    ]


# ---- draws ----


def row_keys(rows: IntArray, base: int) -> NDArray[Any]:
    """Digits below `base` [N, D] -> a key of each row [N], equal where the rows are."""
    if base ** rows.shape[1] < 2**63:
        return rows @ (base ** np.arange(rows.shape[1], dtype=np.int64))
    return (np.ascontiguousarray(rows, np.uint8) + 1).view(f"S{rows.shape[1]}")[:, 0]  # bytes end at a zero


def some_rows(bounds: Sequence[tuple[int, int]], random: RandomState) -> Callable[[int], IntArray]:
    """Rows with digit d from `bounds[d][0]` to below `bounds[d][1]` -> what draws the next so many of them: without
    replacement where there are few rows in all."""
    low, high = np.array(bounds).T
    count = math.prod((high - low).tolist())
    if count > MOST_LISTED:
        return lambda number: random.randint(low, high, (number, len(low)))
    numbers = iter(random.permutation(count))

    def following(number: int) -> IntArray:
        chosen = np.fromiter(islice(numbers, number), np.int64)
        return np.column_stack(np.unravel_index(chosen, high - low)) + low

    return following


def distinct(
    draw: Callable[[int], IntArray],
    count: int,
    key: Callable[[IntArray], NDArray[Any]],
    allowed: Callable[[IntArray], NDArray[np.bool_]] | None = None,
) -> IntArray:
    """`count` rows that are `allowed`, no two with the same key, in the order they are drawn."""
    found = draw(count)
    while True:
        if allowed is not None:
            found = found[allowed(found)]
        found = found[np.sort(np.unique(key(found), return_index=True)[1])]
        if len(found) == count:
            return found
        found = np.concatenate([found, draw(count - len(found))])
