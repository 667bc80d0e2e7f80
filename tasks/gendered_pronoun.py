"""Gendered pronouns: `So Mary is such a good cook, isn't` -> ` she`.

Athwin et al. 2023 ("Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small"), as used by
Bhaskar et al. 2024 (arXiv 2406.16778). The corrupted text has a name of the other gender.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from groundswell.config import ConfigError
from tasks.circuit_draws import Cases, DrawnTask, read_lines
from tasks.circuit_files import Row
from tasks.circuit_text import Pair, Sentence

PRONOUNS = (" he", " she")


class GenderedPronoun(DrawnTask):
    """Different pairs of frame and name in every split, with as many names of either gender (by one, if odd)."""

    train_size: int = Field(150, gt=0, description="examples; of a file, at most so many, the first")
    validation_size: int = Field(150, gt=0)
    test_size: int = Field(3_000, gt=0)

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """As many for `he` as for `she`."""
        male, female = read_lines("male_names"), read_lines("female_names")
        count = min(len(male), len(female))
        return male[:count], female[:count]

    def all_words(self) -> Sequence[Sentence]:
        frames, names = len(read_lines("pronoun_frames")), len(self.names[0])
        numbers = np.arange(max(frames, names))
        both = [np.column_stack([numbers % frames, np.full_like(numbers, g), numbers % names]) for g in (0, 1)]
        return self.sentences(np.concatenate(both))

    def draw(self, random: RandomState) -> Mapping[str, Cases]:
        """Cases: frame, gender, name. Genders alternate."""
        frames, names = len(read_lines("pronoun_frames")), self._usable_names()
        each = min(map(len, names))
        asked = sum(self.sizes.values())
        if asked > 2 * frames * each:
            raise ConfigError(f"task: {asked} sentences are asked for, there are {2 * frames * each}; ask for fewer")
        cases = np.empty((2 * frames * each, 3), dtype=np.int64)
        for gender in (0, 1):
            frame, name = np.divmod(random.permutation(frames * each), each)
            cases[gender::2] = np.column_stack([frame, np.full_like(name, gender), names[gender][name]])
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(cases[: ends[-1]], ends[:-1]), strict=True))

    def corrupt(self, cases: Cases, random: RandomState) -> Cases:
        """A name of the other gender, of as many tokens."""
        counts = np.array([self.word_tokens(names) for names in self.names])
        drawn = cases.copy()
        drawn[:, 1] = 1 - cases[:, 1]
        other_count = counts[drawn[:, 1]] != counts[cases[:, 1], cases[:, 2]][:, None]
        drawn[:, 2] = (random.random_sample(other_count.shape) + other_count).argmin(1)
        return drawn

    def _usable_names(self) -> list[Cases]:
        """Numbers of the names of each gender for which the other has one of as many tokens."""
        counts = [self.word_tokens(names) for names in self.names]
        return [np.flatnonzero(np.isin(counts[gender], counts[1 - gender])) for gender in (0, 1)]

    def sentences(self, cases: Cases) -> list[Sentence]:
        frames, names = read_lines("pronoun_frames"), self.names
        return [
            Sentence(frames[frame].format(name=names[gender][name]), PRONOUNS[gender], PRONOUNS[1 - gender])
            for frame, gender, name in cases.tolist()
        ]

    def read_row(self, row: Row) -> Pair:
        """`prefix`, `pronoun`, `corr_prefix`, `corr_pronoun`."""
        answer, other = (f" {row.text(name).strip()}" for name in ("pronoun", "corr_pronoun"))
        clean = Sentence(row.text("prefix").rstrip(), answer, other)
        return Pair(clean, Sentence(row.text("corr_prefix").rstrip(), other, answer), row.source)
