"""Facts in two directions: after x → y, does the model know y ← x? (the reversal curse, arXiv 2405.04669, section 5.1)

Words of two disjoint alphabets, a quarter of the token ids each, form pairs. Training pairs are stated both ways; of a
validation pair one direction, drawn at random, is trained and the other one asked.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from tasks.entities import Facts, Panel, WordTask, sentences, woven

FORWARD, BACKWARD = 0, 1


class Reverse(WordTask):
    """Sentences `x → y` and `y ← x`."""

    count_field: ClassVar[str] = "num_pairs"

    num_pairs: int | None = Field(None, description="default: twice the alphabet, as far as there are words")

    @property
    def num_train(self) -> int:
        num_train, num_validation = self._sizes()
        return 2 * num_train + num_validation

    def draw(self) -> Facts:
        random = RandomState(self.seed)
        alphabets, (x, y), train, validation = self._draw_words(random, 2)
        forward, backward = sentences(x, FORWARD, y), sentences(y, BACKWARD, x)
        trained_forward = random.randint(2, size=len(validation)) == 1
        seen = np.where(trained_forward[:, None], forward[validation], backward[validation])
        unseen = np.where(trained_forward[:, None], backward[validation], forward[validation])
        rows = np.concatenate([woven(forward[train], backward[train]), seen])
        if self.word_size > 1:
            return Facts(rows, unseen, alphabets)
        panels = {
            "train_forward": Panel(x[train, 0], y[train, 0]),
            "train_backward": Panel(y[train, 0], x[train, 0]),
            "val_seen": Panel(seen[:, 0], seen[:, 2]),
            "val_unseen": Panel(unseen[:, 0], unseen[:, 2]),
        }
        groups = {"relation": np.array([FORWARD, BACKWARD]), "x": x[:, 0], "y": y[:, 0]}
        return Facts(rows, unseen, alphabets, panels, groups)
