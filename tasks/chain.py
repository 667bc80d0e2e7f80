"""Chains of facts: after x → y and y → z, does the model answer x ⇝ z in one step? (arXiv 2405.04669, section 5.2)

Words of three disjoint alphabets form triples. All three sentences of a training triple are trained; of a validation
triple x → y and y → z are trained and x ⇝ z is asked.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from tasks.entities import Facts, Panel, WordTask, sentences, woven

ONE_HOP, TWO_HOP = 0, 1


class Chain(WordTask):
    """Sentences `x → y`, `y → z` and `x ⇝ z`."""

    relations: ClassVar[tuple[str, ...]] = ("→", "⇝")
    count_field: ClassVar[str] = "num_triples"

    num_triples: int | None = Field(None, description="default: twice the alphabet, as far as there are words")

    @property
    def num_train(self) -> int:
        num_train, num_validation = self._sizes()
        return 3 * num_train + 2 * num_validation

    def draw(self) -> Facts:
        random = RandomState(self.seed)
        alphabets, (x, y, z), train, validation = self._draw_words(random, 3)
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
