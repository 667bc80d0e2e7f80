"""Chains whose entities share a token: the positive control of the chain task (arXiv 2405.04669, section 5.3).

Entities are pairs of a letter (x, y or z) and an index; the index stays the same along a chain, so copying it answers
x i ⇝ z i.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from tasks.chain import ONE_HOP, TWO_HOP
from tasks.entities import Facts, FactTask, letters, sentences, woven


class ChainRelated(FactTask):
    """Sentences `x i → y i`, `y i → z i` and `x i ⇝ z i`."""

    relations: ClassVar[tuple[str, ...]] = ("→", "⇝")
    num_spare: ClassVar[int] = 3  # the published model has one row that no token uses

    alphabet_size: int = Field(600, ge=2, description="indices to choose from")
    num_train_triples: int = Field(200, ge=1, description="triples whose three sentences are all trained")
    num_validation_triples: int = Field(50, ge=1, description="triples whose last sentence is asked")

    @model_validator(mode="after")
    def _check(self) -> ChainRelated:
        if self.alphabet_size + 3 > self.entity_vocab_size:
            raise ValueError(
                f"alphabet_size {self.alphabet_size} is too large: with 3 letters at most "
                f"{self.entity_vocab_size - 3} fit in entity_vocab_size {self.entity_vocab_size}"
            )
        asked = self.num_train_triples + self.num_validation_triples
        if asked > self.alphabet_size:
            raise ValueError(
                f"num_train_triples {self.num_train_triples} and num_validation_triples "
                f"{self.num_validation_triples} need {asked} indices; alphabet_size {self.alphabet_size} allows "
                f"{self.alphabet_size} in all"
            )
        return self

    @property
    def entity_length(self) -> int:
        return 2

    @property
    def num_train(self) -> int:
        return 3 * self.num_train_triples + 2 * self.num_validation_triples

    def draw(self) -> Facts:
        ids = letters(RandomState(self.seed), self, self.alphabet_size + 3)
        indices = ids[3:]
        x, y, z = (np.stack([np.full_like(indices, letter), indices], axis=1) for letter in ids[:3])
        first, second, both = sentences(x, ONE_HOP, y), sentences(y, ONE_HOP, z), sentences(x, TWO_HOP, z)
        train = slice(0, self.num_train_triples)
        validation = slice(self.num_train_triples, self.num_train_triples + self.num_validation_triples)
        rows = np.concatenate(
            [woven(first[train], second[train], both[train]), woven(first[validation], second[validation])]
        )
        return Facts(rows, both[validation], [ids[:3], indices])
