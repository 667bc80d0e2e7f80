"""Chains of facts: after x → y and y → z, does the model answer x ⇝ z in one step? (arXiv 2405.04669, section 5.2)

Words of three disjoint alphabets form triples. All three sentences of a training triple are trained; of a validation
triple x → y and y → z are trained and x ⇝ z is asked.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from tasks.entities import Facts, FactTask, Panel, check_sizes, letters, sentences, split, words, woven
from tasks.reverse import limited

ONE_HOP, TWO_HOP = 0, 1


class Chain(FactTask):
    """Sentences `x → y`, `y → z` and `x ⇝ z`."""

    relations: ClassVar[tuple[str, ...]] = ("→", "⇝")

    word_size: int = Field(1, ge=1, le=16, description="tokens of an entity")
    num_triples: int | None = Field(None, description="default: twice the alphabet, as far as there are words")
    train_fraction: float = Field(0.7, gt=0, lt=1, description="triples whose three sentences are all trained")
    original_limits: bool = Field(
        False, description="at word_size 3 keep 100 training and 50 validation triples, as the published code does"
    )

    @model_validator(mode="after")
    def _check(self) -> Chain:
        self._count()
        return self

    @property
    def entity_length(self) -> int:
        return self.word_size

    @property
    def num_train(self) -> int:
        num_train, num_validation = self._sizes()
        return 3 * num_train + 2 * num_validation

    def _count(self) -> int:
        return check_sizes(self.entity_vocab_size, self.word_size, self.num_triples, self.train_fraction, "num_triples")

    def _sizes(self) -> tuple[int, int]:
        count = self._count()
        return limited(round(self.train_fraction * count), count, self.word_size, self.original_limits)

    def draw(self) -> Facts:
        random = RandomState(self.seed)
        size = self.entity_vocab_size // 4
        alphabets = np.split(letters(random, self, 3 * size), 3)
        x, y, z = words(random, alphabets, self.word_size, self._count())
        train, validation = split(random, len(x), self.train_fraction)
        num_train, num_validation = self._sizes()
        train, validation = train[:num_train], validation[:num_validation]
        first, second, both = sentences(x, ONE_HOP, y), sentences(y, ONE_HOP, z), sentences(x, TWO_HOP, z)
        rows = np.concatenate(
            [woven(first[train], second[train], both[train]), woven(first[validation], second[validation])]
        )
        if self.word_size > 1:
            return Facts(rows, both[validation], alphabets)
        panels = {
            f"{name}_{hop}": Panel(source[part, 0], target[part, 0])
            for name, part in (("train", train), ("val", validation))
            for hop, source, target in (("x0y", x, y), ("y0z", y, z), ("x1z", x, z))
        }
        groups = {"relation": np.array([ONE_HOP, TWO_HOP]), "x": x[:, 0], "y": y[:, 0], "z": z[:, 0]}
        return Facts(rows, both[validation], alphabets, panels, groups)
