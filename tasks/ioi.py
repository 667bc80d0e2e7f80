"""Indirect object identification: `Then, Mary and John went to the store. John gave a ring to` -> ` Mary`.

Wang et al. 2023 (arXiv 2211.00593), with the frames of Bhaskar et al. 2024 (arXiv 2406.16778). The corrupted text has
four different names in place of the two that occur twice each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.random import RandomState
from pydantic import Field

from tasks.circuit_draws import Cases, DrawnTask, distinct, read_lines
from tasks.circuit_files import Row
from tasks.circuit_text import Pair, Sentence

SINGLE_FRAME = 14  # of IOI-t1: "Friends ... found ..."
TEST_FRAMES = (6, 10)  # held out in both orders: every word of theirs occurs in other frames too
NAMES_OF_A_PAIR = 6  # of the clean and the corrupted text together


class Ioi(DrawnTask):
    """15 frames in two orders: ABBA (the pair's second name gives) and BABA (the first).

    Four of the 30 make up the split `test`; the other splits have different texts of the other 26.
    """

    frames: Literal["all", "t1"] = Field(
        "all", description="t1: one frame (in both orders) in all splits, with different texts"
    )

    @property
    def names(self) -> tuple[str, ...]:
        return read_lines("male_names") + read_lines("female_names")

    def all_words(self) -> Sequence[Sentence]:
        names, places, objects = (np.arange(len(words)) for words in self._words())
        longest = max(map(len, (names, places, objects)))
        template = np.resize(self._templates("all"), max(longest, 30))
        first = np.resize(names, len(template))
        second = (first + 1) % len(names)
        columns = [template, first, second, second, first, np.resize(places, len(template))]
        rows = np.column_stack([*columns, np.resize(objects, len(template))])
        with_both = rows.copy()
        with_both[:, 0] = 0  # a frame with place and object: none of their words is left out
        return self.sentences(np.concatenate([rows, with_both]))

    def draw(self, random: RandomState) -> Mapping[str, Cases]:
        """Cases: frame * 2 + order, both names of the pair, giver, receiver, place, object (0 where there is none)."""
        sizes = self.sizes
        if self.frames == "t1":
            templates = np.array([2 * SINGLE_FRAME, 2 * SINGLE_FRAME + 1])
            found = self._distinct(templates, sum(sizes.values()), random)
            return dict(zip(sizes, np.split(found, np.cumsum(list(sizes.values()))[:-1]), strict=True))
        both = self._distinct(self._templates("train"), self.train_size + self.validation_size, random)
        train, validation = np.split(both, [self.train_size])
        return {
            "train": train,
            "validation": validation,
            "test": self._distinct(self._templates("test"), self.test_size, random),
        }

    def corrupt(self, cases: Cases, random: RandomState) -> Cases:
        """Four names drawn without replacement, none of them in the clean text, each of as many tokens as the name in
        whose place it stands."""
        counts, rows = self.word_tokens(self.names), np.arange(len(cases))
        order = random.random_sample((len(cases), len(self.names)))
        order[rows[:, None], cases[:, 1:3]] = np.inf
        drawn = cases.copy()
        for column in range(1, 5):
            other_count = counts != counts[cases[:, column]][:, None]
            drawn[:, column] = (order + other_count).argmin(1)
            order[rows, drawn[:, column]] = np.inf
        return drawn

    def sentences(self, cases: Cases) -> list[Sentence]:
        names, places, objects = self._words()
        frames = [frame.removesuffix(" {receiver}") for frame in read_lines("ioi_frames")]
        return [
            Sentence(
                frames[template // 2].format(
                    pair=f"{names[first]} and {names[second]}",
                    giver=names[giver],
                    place=places[place],
                    object=objects[thing],
                ),
                f" {names[receiver]}",
                f" {names[giver]}",
            )
            for template, first, second, giver, receiver, place, thing in cases.tolist()
        ]

    def read_row(self, row: Row) -> Pair:
        """`ioi_sentences` (or `text`), `corr_ioi_sentences`, and the names `a` and `b`; the last word is the answer."""
        clean, corrupted = row.text("ioi_sentences", "text").split(), row.text("corr_ioi_sentences").split()
        others = [name for name in (row.text("a"), row.text("b")) if name != clean[-1]]
        return Pair(_last_word(clean, others[0]), _last_word(corrupted, ""), row.source)

    def _words(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        return self.names, read_lines("places"), read_lines("objects")

    def _usable_names(self) -> Cases:
        """Numbers of the names that have counterparts of as many tokens: two in a text, four in the other."""
        counts = self.word_tokens(self.names)
        return np.flatnonzero(np.bincount(counts)[counts] >= NAMES_OF_A_PAIR)

    def _templates(self, which: str) -> Cases:
        frames = np.arange(len(read_lines("ioi_frames")))
        test = np.isin(frames, TEST_FRAMES)
        kept = {"all": frames, "train": frames[~test], "test": frames[test]}[which]
        return (2 * kept[:, None] + np.arange(2)).reshape(-1)

    def _distinct(self, templates: Cases, count: int, random: RandomState) -> Cases:
        _, places, objects = map(len, self._words())
        names = self._usable_names()
        frames = read_lines("ioi_frames")
        has_place = np.array(["{place}" in frame for frame in frames])
        has_object = np.array(["{object}" in frame for frame in frames])

        def draw(number: int) -> Cases:
            template = templates[random.randint(len(templates), size=number)]
            first = random.randint(len(names), size=number)
            second = (first + 1 + random.randint(len(names) - 1, size=number)) % len(names)
            receiver, giver = names[first], names[second]
            baba = template % 2 == 1
            pair = np.where(baba, giver, receiver), np.where(baba, receiver, giver)
            place = random.randint(places, size=number) * has_place[template // 2]
            thing = random.randint(objects, size=number) * has_object[template // 2]
            return np.column_stack([template, *pair, giver, receiver, place, thing])

        return distinct(draw, count, "sentences")


def _last_word(words: Sequence[str], distractor: str) -> Sentence:
    return Sentence(" ".join(words[:-1]), f" {words[-1]}", f" {distractor}")
