"""Entities with ordinal attribute values: the world of the comparison and complex reasoning tasks.

E entities, A attributes, V values. For each attribute on its own, some of the entities are out of distribution (OOD),
so an entity may be in distribution (ID) for one attribute and OOD for another. A fact about a pair comes in both
orders, which always belong to the same split.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field, model_validator

from groundswell.protocols import Task
from tasks.vocabulary import PAD, SPECIAL_TOKENS, IntArray, numbered

NUM_LABELS = 3  # first smaller, equal, first larger


@dataclass(frozen=True)
class PairFacts:
    """Facts (attribute, e1, e2), both orders of each unordered pair: pair p has the row numbers 2p and 2p + 1.

    Kept as one code a pair, (attribute * E + e1) * E + e2 with e1 < e2: the published pool has 14.56 million facts.
    """

    codes: IntArray  # [P]
    num_entities: int

    def __len__(self) -> int:
        return 2 * len(self.codes)

    def rows(self, numbers: IntArray) -> IntArray:
        """Row numbers [N] -> facts [N, 3]."""
        rest, larger = np.divmod(self.codes[numbers // 2], self.num_entities)
        attribute, smaller = np.divmod(rest, self.num_entities)
        swapped = numbers % 2 == 1
        return np.stack([attribute, np.where(swapped, larger, smaller), np.where(swapped, smaller, larger)], axis=1)

    def sample(self, count: int, random: RandomState) -> IntArray:
        """As `tasks.examples.sample`, over the facts."""
        return self.rows(random.permutation(len(self))[:count])


@dataclass(frozen=True)
class AttributeWorld:
    values: IntArray  # [E, A]
    ood: NDArray[np.bool_]  # [E, A]
    pool: PairFacts  # both ID, for training
    iid: PairFacts  # both ID, held out
    cross: PairFacts  # one ID, one OOD; empty if not asked for
    both_ood: PairFacts

    def atomic(self, ood: bool) -> IntArray:
        """[N, 3] rows entity, attribute, value, attribute by attribute."""
        attributes, entities = np.nonzero((self.ood == ood).T)
        return np.stack([entities, attributes, self.values[entities, attributes]], axis=1)

    def labels(self, facts: IntArray) -> IntArray:
        """Facts [N, 3] (attribute, e1, e2) -> 0 first smaller, 1 equal, 2 first larger [N]."""
        first, second = self.values[facts[:, 1], facts[:, 0]], self.values[facts[:, 2], facts[:, 0]]
        return np.sign(first - second) + 1


class AttributeTask(Task, ABC):
    """Fields, vocabulary and world that both tasks share. Paper defaults."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    num_entities: int = Field(1_000, gt=1)
    num_attributes: int = Field(20, gt=0)
    num_values: int = Field(20, gt=1, description="ordinal values of an attribute; all attributes share their tokens")
    ood_fraction: float = Field(0.1, ge=0, lt=1, description="entities of each attribute that are out of distribution")
    iid_fraction: float = Field(0.1, ge=0, lt=1, description="held-out share of the pairs of in-distribution entities")
    test_size: int = Field(3_000, gt=0, description="most rows of an evaluation split")
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check_entities(self) -> AttributeTask:
        if self._num_id < 2:
            raise ValueError(
                f"task.ood_fraction {self.ood_fraction:g} leaves {self._num_id} of {self.num_entities} entities in "
                "distribution, too few for a pair; lower task.ood_fraction or raise task.num_entities"
            )
        return self

    @property
    def vocab_size(self) -> int:
        labels = NUM_LABELS * self.num_attributes
        return self.num_entities + self.num_attributes + self.num_values + len(SPECIAL_TOKENS) + labels + 1

    def vocabulary(self) -> tuple[str, ...]:
        entities = numbered("e_", self.num_entities)
        attributes = numbered("attr_", self.num_attributes)
        labels = [label for k in range(self.num_attributes) for label in numbered(f"attr_{k}_", NUM_LABELS)]
        return (*entities, *attributes, *numbered("", self.num_values), *SPECIAL_TOKENS, *labels, PAD)

    def world(self) -> AttributeWorld:
        return self._draw_world(RandomState(self.seed), cross=True)

    @property
    def _num_id(self) -> int:
        """In-distribution entities of each attribute."""
        return round((1 - self.ood_fraction) * self.num_entities)

    def _draw_world(self, random: RandomState, cross: bool) -> AttributeWorld:
        """The order of the draws is the published generators', so a seed gives their world."""
        e, a = self.num_entities, self.num_attributes
        values = random.randint(0, self.num_values, size=(e, a))
        ood = np.ones((e, a), bool)
        smaller, larger = np.triu_indices(e, 1)
        codes = smaller * e + larger
        kinds: dict[str, list[IntArray]] = {"pool": [], "iid": [], "cross": [], "both_ood": []}
        for attribute in range(a):
            ood[random.permutation(e)[: self._num_id], attribute] = False
            num_ood = ood[smaller, attribute].astype(np.int8) + ood[larger, attribute]
            inside = codes[num_ood == 0] + attribute * e * e
            held_out = random.random_sample(len(inside)) < self.iid_fraction
            kinds["pool"].append(inside[~held_out])
            kinds["iid"].append(inside[held_out])
            kinds["both_ood"].append(codes[num_ood == 2] + attribute * e * e)
            kinds["cross"].append(codes[num_ood == 1] + attribute * e * e if cross else codes[:0])
        facts = {name: PairFacts(np.concatenate(parts), e) for name, parts in kinds.items()}
        return AttributeWorld(values.astype(np.int64), ood, **facts)

    def _special(self, token: str) -> int:
        return self.num_entities + self.num_attributes + self.num_values + SPECIAL_TOKENS.index(token)

    def _token_rows(self, count: int, columns: Sequence[IntArray | str]) -> IntArray:
        """Columns of ids, or special tokens repeated in every row -> [count, len(columns)]."""
        return np.column_stack(
            [np.full(count, self._special(column)) if isinstance(column, str) else column for column in columns]
        )

    def _atomic_ids(self, facts: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Atomic facts [N, 3] -> ids of entity, attribute and value [N]."""
        entity, attribute, value = facts.T
        return entity, self.num_entities + attribute, self.num_entities + self.num_attributes + value

    def _pair_ids(self, facts: IntArray, labels: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Pair facts [N, 3] -> ids of attribute, both entities and label [N]."""
        attribute, first, second = facts.T
        first_label = self.num_entities + self.num_attributes + self.num_values + len(SPECIAL_TOKENS)
        return self.num_entities + attribute, first, second, first_label + NUM_LABELS * attribute + labels
