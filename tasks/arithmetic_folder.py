"""Arithmetic problems that are files already, as text or tokenised, as a task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from groundswell.config import ConfigError
from groundswell.protocols import Dataset, Split
from tasks.arithmetic_examples import LengthTask, MadeExamples
from tasks.arithmetic_files import (
    DICTIONARY,
    SPLITS,
    TOKENIZED,
    as_rows,
    read_text,
    read_tokenized,
    shuffle_and_split,
    without_spaces,
)
from tasks.arithmetic_rows import LossOn, Rows, longest_run, to_split
from tasks.arithmetic_vocabulary import VOCABULARIES, Characters, VocabularyName
from tasks.vocabulary import IntArray


class ArithmeticFolder(LengthTask):
    """A folder of problems in the form of the original: .txt files with one problem a line, or a tokenised DatasetDict
    (in the folder itself, or in its `hf_tokenized_dataset`). It must not change while runs on it are compared."""

    path: Path
    form: Literal["auto", "text", "tokenized"] = Field("auto", description="auto: tokenized where there is one")
    vocabulary: VocabularyName = "pad"
    test_ratio: float = Field(
        0.05, ge=0, lt=1, description="of text files: the last rows; less than one row puts all into the test"
    )
    shuffle: bool = Field(True, description="text files: mix all lines (by the seed) before they are split")
    remove_spaces: bool = Field(
        False, description="drop the spaces (PAD) inside rows, as the original's evaluator does"
    )
    loss_on: LossOn = "answer"
    num_test: int = Field(2_000, gt=0, description="so many of the test rows are the split `test`")
    cells: SerializeAsAny[LengthTask] | None = Field(
        None, description="task whose problems are those of the folder: for test_lengths and grids"
    )

    @model_validator(mode="after")
    def _check(self) -> ArithmeticFolder:
        stored = self._stored()
        if not len(stored.train):
            raise ValueError(f"path: {self.path} has no training rows; set task.test_ratio higher")
        if not len(stored.test):
            raise ValueError(f"path: {self.path} has no test rows; tokenise it with a test split")
        if self.cells is not None and self.cells.characters.name != self.vocabulary:
            raise ValueError(f"cells: its vocabulary is {self.cells.characters.name}; set task.vocabulary to that")
        if self.test_lengths and self.cells is None:
            raise ValueError("test_lengths need problems of these lengths; set task.cells.class")
        return self

    @property
    def characters(self) -> Characters:
        return VOCABULARIES[self.vocabulary]

    @property
    def num_train(self) -> int:
        return len(self._stored().train)

    @property
    def loss_on_tokens(self) -> LossOn:
        return self.loss_on

    @property
    def trained_lengths(self) -> tuple[int, int]:
        return self._cells.trained_lengths

    def row_shape(self) -> tuple[int, int]:
        stored = self._stored()
        return stored.longest_row, stored.longest_answer

    def cell_shape(self, first: int, second: int) -> tuple[int, int]:
        """As the task in the field `cells`. Raises ConfigError without one."""
        return self._cells.cell_shape(first, second)

    def cell_rows(self, first: int, second: int, count: int, seed: int) -> Rows:
        return self._cells.cell_rows(first, second, count, seed)

    def longest_run(self, first: int, second: int) -> int:
        return self._cells.longest_run(first, second)

    @property
    def longest_number(self) -> int:
        """Most digits in a row, as the files have it."""
        return self._stored().longest_number

    @property
    def _cells(self) -> LengthTask:
        if self.cells is None:
            raise ConfigError("task.cells: say which task the problems are of, e.g. tasks.arithmetic.Arithmetic")
        return self.cells

    def build(self) -> Dataset:
        stored, loss_on, num_answers = self._stored(), self.loss_on, self.num_answers
        length = stored.longest_row - 1

        def train_rows(numbers: IntArray) -> Split:
            return to_split(stored.train.select(numbers), length, num_answers, loss_on)

        first = np.arange(min(self.num_test, len(stored.test)))
        return self.assemble(MadeExamples(len(stored.train), train_rows), stored.test.select(first))

    def _stored(self) -> Stored:
        tokenized = next((path for path in (self.path, self.path / TOKENIZED) if (path / DICTIONARY).exists()), None)
        if self.form == "tokenized" and tokenized is None:
            raise ConfigError(f"task.path: no {DICTIONARY} in '{self.path}' or its {TOKENIZED}; set task.form=text")
        if tokenized is None or self.form == "text":
            folder, reading = self.path, (self.test_ratio, self.seed if self.shuffle else None)
        else:
            folder, reading = tokenized, None
        return _read_cached(folder, reading, self.vocabulary, self.remove_spaces, _stamps(folder))


@dataclass(frozen=True)
class Stored:
    """What a folder holds, a byte a token."""

    train: Rows
    test: Rows
    longest_row: int  # tokens through EOS
    longest_answer: int
    longest_number: int  # digits side by side


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Of all files, to see whether one has changed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(path), status.st_mtime_ns, status.st_size) for path in paths for status in [path.stat()])


@lru_cache(maxsize=2)
def _read_cached(
    folder: Path,
    reading: tuple[float, int | None] | None,
    vocabulary: VocabularyName,
    remove_spaces: bool,
    stamps: tuple[Any, ...],
) -> Stored:
    """`reading`: ratio and seed for text; None for a tokenised folder."""
    known = VOCABULARIES[vocabulary]
    if reading is None:
        splits = read_tokenized(folder, known)
        if "train" not in splits or "test" not in splits:
            raise ConfigError(f"task.path: {folder} has the splits {', '.join(splits)}; it needs train and test")
    else:
        splits = shuffle_and_split(read_text(folder, known), *reading)
    if remove_spaces:
        splits = {name: without_spaces(rows) for name, rows in splits.items()}
    train, test = (as_rows(splits[name]) for name in SPLITS)
    parts = [(rows.lengths, rows.equals) for rows in (train, test)]
    longest = max(int(lengths.max(initial=1)) for lengths, _ in parts)
    answer = max(int((lengths - equals).max(initial=2)) for lengths, equals in parts) - 1
    return Stored(train, test, longest, answer, max(longest_run(rows.tokens) for rows in (train, test)))
