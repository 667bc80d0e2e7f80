"""Circuit tasks whose texts are drawn from frames and lists of words, or read from the published code's files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from tasks.circuit_files import Row, read_splits, split_files
from tasks.circuit_text import CircuitTask, Pair, Sentence, encode

DATA = Path(__file__).parent / "data"
MOST_DRAWS = 100  # of counterparts for one text, before it is given up
MOST_REPEATED = 0.9  # share of rows drawn that may have been there before
Cases = NDArray[Any]  # [N] or [N, parts]: what a task draws to write a text from
SPLITS = ("train", "validation", "test")


class DrawnTask(CircuitTask):
    """All draws come from numpy's `RandomState`. Two tasks that differ in `pairs` alone have the same clean texts."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    path: str | None = Field(
        None, description="folder with train.jsonl and <split>.jsonl in the published fields, instead of drawn texts"
    )
    train_size: int = Field(200, gt=0, description="examples; of a file, at most so many, the first")
    validation_size: int = Field(200, gt=0)
    test_size: int = Field(1_000, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check_path(self) -> DrawnTask:
        if self.path is not None:
            split_files(self.path)
        return self

    @property
    def num_train(self) -> int | None:
        return self.train_size if self.path is None else None

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(SPLITS, (self.train_size, self.validation_size, self.test_size), strict=True))

    # ---- what a task says ----

    @abstractmethod
    def all_words(self) -> Sequence[Sentence]:
        """`coverage` of the drawn texts."""

    @abstractmethod
    def draw(self, random: RandomState) -> Mapping[str, Cases]:
        """Split -> distinct cases, in all splits together. Raises ConfigError where there are not so many."""

    @abstractmethod
    def corrupt(self, cases: Cases, random: RandomState) -> Cases:
        """A fresh counterpart of each case."""

    @abstractmethod
    def sentences(self, cases: Cases) -> list[Sentence]: ...

    @abstractmethod
    def read_row(self, row: Row) -> Pair:
        """One object of a file in the published fields."""

    # ---- what follows from it ----

    def coverage(self) -> Sequence[Sentence]:
        words = tuple(self.all_words())
        if self.path is None:
            return words
        return words + tuple(text for pairs in self._read().values() for pair in pairs for text in pair[:2])

    def sentence_pairs(self) -> Mapping[str, Sequence[Pair]]:
        if self.path is not None:
            return self._read()
        cases = self.draw(RandomState(self.seed))
        random = RandomState([self.seed, 1])
        return {name: self._pair(drawn, random) for name, drawn in cases.items()}

    def _read(self) -> dict[str, list[Pair]]:
        found = read_splits(str(self.path))
        return {
            name: [self.read_row(row) for row in rows[: self.sizes.get(name, len(rows))]]
            for name, rows in found.items()
        }

    def _pair(self, cases: Cases, random: RandomState) -> list[Pair]:
        """Counterparts are drawn until they have as many tokens as the clean text."""
        clean = self.sentences(cases)
        if not self.pairs:
            return [Pair(sentence, sentence) for sentence in clean]
        counts = self._token_counts(clean)
        corrupted = list(clean)
        left = np.arange(len(clean))
        for _ in range(MOST_DRAWS):
            drawn = self.sentences(self.corrupt(cases[left], random))
            fits = self._token_counts(drawn) == counts[left]
            for place in np.flatnonzero(fits):
                corrupted[left[place]] = drawn[place]
            left = left[~fits]
            if not len(left):
                return [Pair(*both) for both in zip(clean, corrupted, strict=True)]
        raise ConfigError(
            f"task.tokenizer: no counterpart of {counts[left[0]]} tokens for '{clean[left[0]].text}' in {MOST_DRAWS} "
            "draws; take another tokenizer, or write pairs to a file for tasks.paired_text.PairedText"
        )

    def word_tokens(self, words: Sequence[str]) -> NDArray[np.int64]:
        """How many tokens each word has behind a space [N], special ones included: for comparison only."""
        return np.array(
            [len(found.ids) for found in self._tokenizer().encode_batch_fast([f" {word}" for word in words])]
        )

    def _token_counts(self, sentences: Sequence[Sentence]) -> NDArray[np.int64]:
        return np.array([len(ids) for ids in encode(self._tokenizer(), sentences)[0]])


@lru_cache
def read_lines(name: str) -> tuple[str, ...]:
    """A list of tasks/data, one entry a line."""
    return tuple((DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines())


def distinct(draw: Callable[[int], Cases], count: int, what: str) -> Cases:
    """`draw(n)` -> rows [n, parts] with repetitions; the first `count` different ones in the order of the draws.

    Raises ConfigError where they are so many of all there are that a round of draws finds hardly a new one.
    """
    found = draw(count)
    while True:
        before = len(found)
        codes = np.ravel_multi_index(tuple(found.T), tuple(found.max(0) + 1))
        _, first = np.unique(codes, return_index=True)
        found = found[np.sort(first)]
        if len(found) >= count:
            return found[:count]
        if len(found) < before - MOST_REPEATED * count:
            raise ConfigError(f"task: {count} different {what} are asked for, {len(found)} were found; ask for fewer")
        found = np.concatenate([found, draw(count)])
