"""Facts about entities that are words of a few tokens, for the tasks of the Reversal Curse analysis (arXiv 2405.04669).

Entities of one kind are words over an alphabet of their own; relations are single tokens. Draws come from numpy's
`RandomState` in the order of the published generator, so that a seed gives its data set. N rows, L tokens, k a word.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.random import RandomState
from pydantic import Field, model_validator

from groundswell.protocols import Answer, Dataset, Task
from tasks.examples import answer_split, make_dataset
from tasks.vocabulary import IntArray, numbered

ORIGINAL_LIMITS = (100, 50)  # a left-over of the published generator: training and validation facts at word_size 3
LARGEST_POOL = 2**24  # words that are numbered and shuffled as a whole (128 MiB); of more, words are drawn one by one


@dataclass(frozen=True)
class Panel:
    """Facts whose answers are looked up behind their first token alone: the answer to `prompts[i]` is `answers[i]`."""

    prompts: IntArray  # [N]
    answers: IntArray  # [N]


@dataclass(frozen=True)
class Facts:
    """What a task draws."""

    train: IntArray  # [N, L]
    validation: IntArray  # [N, L]
    alphabets: Sequence[IntArray]  # token ids of each kind of letter: the candidates for one another's place
    panels: Mapping[str, Panel] = field(default_factory=dict)  # for heat-maps of logits
    groups: Mapping[str, IntArray] = field(default_factory=dict)  # entities as tokens, matched ones at one place


class FactTask(Task):
    """Sentences of entities and relations. What is asked for is always the last entity of a sentence."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})
    relations: ClassVar[tuple[str, ...]] = ("→", "←")
    num_spare: ClassVar[int] = 2  # embedding rows beyond `entity_vocab_size`

    entity_vocab_size: int = Field(800, ge=1, le=2**20, description="token ids that the letters are drawn from")
    loss_scope: Literal["last", "whole"] = Field(
        "last", description="train on the last entity, or on every token behind the first"
    )
    seed: int = Field(1234, ge=0, lt=2**32)

    @property
    def vocab_size(self) -> int:
        return self.entity_vocab_size + self.num_spare

    @property
    @abstractmethod
    def entity_length(self) -> int:
        """Tokens of one entity."""

    @property
    def max_length(self) -> int:
        return 2 * self.entity_length

    @property
    def num_answers(self) -> int:
        return self.entity_length if self.loss_scope == "last" else self.max_length

    @abstractmethod
    def draw(self) -> Facts: ...

    def build(self) -> Dataset:
        facts, k = self.draw(), self.entity_length
        length = self.max_length
        asked = length + 1 - self.num_answers
        train = answer_split(facts.train, asked, length, pad=0)
        last = {"train": facts.train, "validation": facts.validation}
        evaluation = {name: answer_split(rows, length + 1 - k, length, pad=0) for name, rows in last.items()}
        kinds = torch.full((self.vocab_size,), -1)
        for kind, alphabet in enumerate(facts.alphabets):
            kinds[torch.from_numpy(alphabet)] = kind
        vocabulary = (*(f"<{name}>" for name in self.relations), *numbered("", self.vocab_size - len(self.relations)))
        answer = Answer(slice(-k, None), kinds)
        return make_dataset(self, vocabulary, {"train": train}, evaluation, answer)


class WordTask(FactTask):
    """Facts about words of any length over alphabets of a quarter of the token ids each.

    A subclass names the field that counts its facts.
    """

    count_field: ClassVar[str]

    word_size: int = Field(1, ge=1, le=16, description="tokens of an entity")
    train_fraction: float = Field(0.7, gt=0, lt=1, description="facts of which every sentence is trained")
    original_limits: bool = Field(
        False, description="at word_size 3 keep 100 training and 50 validation facts, as the published code does"
    )

    @model_validator(mode="after")
    def _check(self) -> WordTask:
        self._count()
        return self

    @property
    def entity_length(self) -> int:
        return self.word_size

    def _count(self) -> int:
        """Facts in all. Raises ValueError for sizes that do not go together."""
        name = self.count_field
        return check_sizes(self.entity_vocab_size, self.word_size, getattr(self, name), self.train_fraction, name)

    def _sizes(self) -> tuple[int, int]:
        """Training and validation facts."""
        count = self._count()
        num_train = round(self.train_fraction * count)
        sizes = num_train, count - num_train
        if self.original_limits and self.word_size == 3:
            return min(sizes[0], ORIGINAL_LIMITS[0]), min(sizes[1], ORIGINAL_LIMITS[1])
        return sizes

    def _draw_words(self, random: RandomState, kinds: int) -> tuple[list[IntArray], list[IntArray], IntArray, IntArray]:
        """-> alphabets, words [N, k] of each kind, numbers of the training and of the validation facts."""
        alphabets = np.split(letters(random, self, kinds * (self.entity_vocab_size // 4)), kinds)
        count, (num_train, num_validation) = self._count(), self._sizes()
        drawn = words(random, alphabets, self.word_size, count)
        train, validation = split(random, count, self.train_fraction)
        return alphabets, drawn, train[:num_train], validation[:num_validation]


def letters(random: RandomState, task: FactTask, count: int) -> IntArray:
    """`count` distinct token ids; ids of relations are left out."""
    return random.choice(task.entity_vocab_size, count, replace=False) + len(task.relations)


def words(random: RandomState, alphabets: Sequence[IntArray], length: int, count: int) -> list[IntArray]:
    """`count` distinct words [count, length] over each alphabet; all pools are shuffled before words are taken."""
    size = len(alphabets[0])
    if size**length > LARGEST_POOL:
        return [alphabet[_distinct_rows(random, size, length, count)] for alphabet in alphabets]
    pools = [np.arange(size**length) for _ in alphabets]
    for pool in pools:
        random.shuffle(pool)
    place = size ** np.arange(length - 1, -1, -1)  # words in lexicographic order, as numbers in base `size`
    taken = [pool[random.choice(len(pool), count, replace=False)] for pool in pools]
    return [alphabet[numbers[:, None] // place % size] for alphabet, numbers in zip(alphabets, taken, strict=True)]


def _distinct_rows(random: RandomState, size: int, length: int, count: int) -> IntArray:
    """Distinct rows of letter numbers in the order in which they are drawn."""
    rows = np.empty((0, length), dtype=np.int64)
    while len(rows) < count:
        rows = np.concatenate([rows, random.randint(0, size, (count, length))])
        rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    return rows[:count]


def split(random: RandomState, count: int, train_fraction: float) -> tuple[IntArray, IntArray]:
    """Numbers 0..count-1, shuffled: those of the training facts and those of the validation facts."""
    order = np.arange(count)
    random.shuffle(order)
    num_train = round(train_fraction * count)
    return order[:num_train], order[num_train:]


def sentences(first: IntArray, relation: int, second: IntArray) -> IntArray:
    """[N, k], relation, [N, k] -> [N, 2k + 1]."""
    return np.concatenate([first, np.full((len(first), 1), relation), second], axis=1)


def woven(*parts: IntArray) -> IntArray:
    """Row 0 of each part, row 1 of each part, and so on: [N, L] each -> [N * parts, L]."""
    return np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])


def check_sizes(entity_vocab_size: int, word_size: int, count: int | None, train_fraction: float, name: str) -> int:
    """-> facts in all. Raises ValueError that names the field and its allowed range."""
    alphabet = entity_vocab_size // 4
    if alphabet < 2:
        raise ValueError(f"entity_vocab_size {entity_vocab_size} gives alphabets of {alphabet}; at least 8 is needed")
    pool = alphabet**word_size
    if count is not None and not 2 <= count <= pool:
        raise ValueError(
            f"{name} {count} is out of range; word_size {word_size} over {alphabet} letters allows 2 to {pool}"
        )
    count = count or min(pool, 2 * alphabet)  # twice the alphabet, as far as there are words
    if not 0 < round(train_fraction * count) < count:
        low, high = 0.5 / count, 1 - 0.5 / count
        raise ValueError(
            f"train_fraction {train_fraction:g} leaves one side of {count} facts empty; "
            f"choose between {low:.3g} and {high:.3g}, or a larger entity_vocab_size"
        )
    return count
