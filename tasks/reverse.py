"""Facts in two directions: after x → y, does the model know y ← x? (the reversal curse, arXiv 2405.04669, section 5.1)

Words of two disjoint alphabets, a quarter of the token ids each, form pairs. Training pairs are stated both ways; of a
validation pair one direction, drawn at random, is trained and the other one asked.
"""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState
from pydantic import Field, model_validator

from tasks.entities import Facts, FactTask, Panel, check_sizes, letters, sentences, split, words, woven

FORWARD, BACKWARD = 0, 1
ORIGINAL_LIMITS = (100, 50)  # a left-over of the published generator: training and validation facts at word_size 3


class Reverse(FactTask):
    """Sentences `x → y` and `y ← x`."""

    word_size: int = Field(1, ge=1, le=16, description="tokens of an entity")
    num_pairs: int | None = Field(None, description="default: twice the alphabet, as far as there are words")
    train_fraction: float = Field(0.7, gt=0, lt=1, description="pairs that are stated both ways")
    original_limits: bool = Field(
        False, description="at word_size 3 keep 100 training and 50 validation pairs, as the published code does"
    )

    @model_validator(mode="after")
    def _check(self) -> Reverse:
        check_sizes(self.entity_vocab_size, self.word_size, self.num_pairs, self.train_fraction, "num_pairs")
        return self

    @property
    def entity_length(self) -> int:
        return self.word_size

    @property
    def num_train(self) -> int:
        num_train, num_validation = self._sizes()
        return 2 * num_train + num_validation

    def _sizes(self) -> tuple[int, int]:
        count = check_sizes(self.entity_vocab_size, self.word_size, self.num_pairs, self.train_fraction, "num_pairs")
        return limited(round(self.train_fraction * count), count, self.word_size, self.original_limits)

    def draw(self) -> Facts:
        random = RandomState(self.seed)
        size = self.entity_vocab_size // 4
        alphabets = np.split(letters(random, self, 2 * size), 2)
        count = check_sizes(self.entity_vocab_size, self.word_size, self.num_pairs, self.train_fraction, "num_pairs")
        x, y = words(random, alphabets, self.word_size, count)
        train, validation = split(random, count, self.train_fraction)
        num_train, num_validation = self._sizes()
        train, validation = train[:num_train], validation[:num_validation]
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


def limited(num_train: int, count: int, word_size: int, original: bool) -> tuple[int, int]:
    """Training and validation facts."""
    num_validation = count - num_train
    if original and word_size == 3:
        return min(num_train, ORIGINAL_LIMITS[0]), min(num_validation, ORIGINAL_LIMITS[1])
    return num_train, num_validation
