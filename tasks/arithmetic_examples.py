"""What tasks with two lengths share: training rows that are made when they are read, and evaluation by length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from groundswell.protocols import Answer, Dataset, Examples, Split, Task
from tasks.arithmetic_rows import LossOn, Rows, to_split
from tasks.arithmetic_vocabulary import Characters
from tasks.examples import concatenate, digest
from tasks.vocabulary import IntArray

PIECE = 16_384  # most rows made at a time: their arrays stay in the processor's cache
BLOCK, KEPT_BLOCKS = 2_048, 16  # rows, and blocks: 28 MB at 20 digits; a run needs two
NEIGHBOURS = 8  # rows that follow each other, on average, from which on blocks are worth it
DIGEST_ROWS = 4_096  # of the training rows, for the manifest


class MadeExamples(Examples):
    """Rows that a function makes from their numbers.

    A call of the function costs as much as some hundred rows, so where rows follow each other, as in training, whole
    blocks are made, and the last ones are kept.
    """

    def __init__(self, count: int, make: Callable[[IntArray], Split]) -> None:
        self._count, self._make = count, make
        self._blocks: OrderedDict[int, Split] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def select(self, rows: Tensor) -> Split:
        """rows [N] -> N examples."""
        starts = torch.cat([rows.new_zeros(1), (rows.diff() != 1).nonzero()[:, 0] + 1])
        if len(rows) < NEIGHBOURS * len(starts) or len(rows) > PIECE:
            return _concatenate([self._make(piece.numpy()) for piece in rows.split(PIECE)])
        lengths = torch.cat([starts[1:], starts.new_tensor([len(rows)])]) - starts
        runs = list(zip(rows[starts].tolist(), lengths.tolist(), strict=True))
        return _concatenate([part for first, length in runs for part in self._run(first, length, 2 * len(runs))])

    def _run(self, first: int, length: int, kept: int) -> Iterator[Split]:
        """Rows that follow each other, in parts."""
        end = first + length
        while first < end:
            number, offset = divmod(first, BLOCK)
            stop = min(end, (number + 1) * BLOCK)
            yield self._block(number, max(kept, KEPT_BLOCKS)).select(slice(offset, offset + stop - first))
            first = stop

    def _block(self, number: int, kept: int) -> Split:
        if number not in self._blocks:
            last = min((number + 1) * BLOCK, self._count)
            self._blocks[number] = self._make(np.arange(number * BLOCK, last))
            while len(self._blocks) > kept:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


def _concatenate(parts: Sequence[Split]) -> Split:
    return parts[0] if len(parts) == 1 else concatenate(*parts)


class LengthTask(Task, ABC):
    """A task whose problems have two lengths, such as the digits of both operands, and which is asked beyond those it
    was trained on. Everything is a pure function of the fields.

    Rows of the split `test` are draws that training never makes; but there are so few problems of one or two digits
    that training meets those too. The splits `length_L` and the cells of grids are draws of their own.
    """

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    test_lengths: tuple[int, ...] = Field((), description="a split length_L of problems of both lengths L for each")
    num_test: int = Field(200, gt=0, description="problems of each evaluation split")
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("test_lengths")
    @classmethod
    def _lengths_are_positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(length < 1 for length in value) or len(set(value)) < len(value):
            raise ValueError("test_lengths must be different numbers of at least 1")
        return value

    # ---- what each task says ----

    @property
    @abstractmethod
    def characters(self) -> Characters: ...

    @property
    @abstractmethod
    def trained_lengths(self) -> tuple[int, int]:
        """The largest lengths that occur in training."""

    @property
    def loss_on_tokens(self) -> LossOn:
        """Which tokens of a training row are targets."""
        return "answer"

    @abstractmethod
    def row_shape(self) -> tuple[int, int]:
        """Most tokens of a training row through EOS, most tokens of its answer through EOS."""

    @abstractmethod
    def cell_shape(self, first: int, second: int) -> tuple[int, int]:
        """Tokens of a problem of these lengths through `=`, most tokens of its answer through EOS. From arithmetic
        alone: nothing is made."""

    @abstractmethod
    def longest_run(self, first: int, second: int) -> int:
        """Most digits side by side in a problem of these lengths: places that a table of positions must have."""

    @abstractmethod
    def cell_rows(self, first: int, second: int, count: int, seed: int) -> Rows:
        """`count` problems of exactly these lengths; the same for every task that writes problems alike, whatever its
        own seed."""

    @abstractmethod
    def build(self) -> Dataset: ...

    # ---- what follows from it ----

    def cell(self, first: int, second: int, count: int, seed: int) -> Split:
        """A cell of a grid as evaluation examples, as wide as its own longest row and answer.

        Problems are written without random spaces. Raises ConfigError for lengths that the task does not have.
        """
        rows = self.cell_rows(first, second, count, seed)
        return to_split(rows, int(rows.lengths.max()) - 1, int((rows.lengths - rows.equals).max()) - 1)

    @property
    def resident(self) -> bool:
        return False  # training rows are made when they are read

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def max_length(self) -> int:
        """T of training rows; evaluation splits have a T of their own."""
        return self.row_shape()[0] - 1

    @property
    def num_answers(self) -> int:
        return self.max_length if self.loss_on_tokens == "all" else self.row_shape()[1]

    @property
    def evaluation_length(self) -> int:
        """T of the evaluation splits."""
        tests = [sum(self.cell_shape(length, length)) for length in self.test_lengths]
        return max(self.row_shape()[0], *tests, 0) - 1

    @property
    def longest_number(self) -> int:
        """Most digits side by side in training."""
        return self.longest_run(*self.trained_lengths)

    @property
    def longest_test_number(self) -> int:
        """Most digits side by side in the evaluation splits."""
        return max(self.longest_number, *(self.longest_run(length, length) for length in self.test_lengths), 0)

    def to_train_split(self, rows: Rows) -> Split:
        return to_split(rows, self.max_length, self.num_answers, self.loss_on_tokens)

    def assemble(self, train: Split | Examples, test: Rows) -> Dataset:
        """With the splits `test` and `length_L`. All evaluation splits are of one width, so that one pass serves them,
        and it does not depend on the seed, so that runs can be packed."""
        evaluation = {"test": test}
        for length in self.test_lengths:
            evaluation[f"length_{length}"] = self.cell_rows(length, length, self.num_test, self.seed)
        width = self.evaluation_length
        answers = max(self.row_shape()[1], *(self.cell_shape(n, n)[1] for n in self.test_lengths), 0)
        splits = {name: to_split(rows, width, answers) for name, rows in evaluation.items()}
        manifest = describe(self, train, splits)
        return Dataset(self.characters.tokens, train, splits, Answer(slice(None)), manifest)


def describe(task: Task, train: Split | Examples, evaluation: Mapping[str, Split]) -> dict[str, Any]:
    """The manifest. sha256 runs over the evaluation splits and the first training rows."""
    first = torch.arange(min(len(train), DIGEST_ROWS))
    return {
        "spec": task.to_dict(),
        "counts": {"train": len(train), **{name: len(split) for name, split in evaluation.items()}},
        "train_blocks": {"train": len(train)},
        "sha256": digest(train.select(first), evaluation),
    }
