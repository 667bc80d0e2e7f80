"""Greater-than: `The war lasted from 1732 to 17` -> any of `33` to `99`.

Hanna et al. 2023 (arXiv 2305.00586), with the frames of Bhaskar et al. 2024 (arXiv 2406.16778). The corrupted text has
another start. Only years that the tokenizer splits into two tokens of two digits are used. C = 100 candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Split
from tasks import circuit_grading
from tasks.circuit_draws import Cases, DrawnTask, distinct, read_lines
from tasks.circuit_files import Row
from tasks.circuit_text import Pair, Sentence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CENTURIES = tuple(range(10, 22))
YEARS = tuple(f"{year:02d}" for year in range(100))
SHARES = (0.5, 0.2, 0.3)  # of the shown two-digit years: train, validation, test
NEAR = 10  # years on either side that the narrow probability difference counts


class GreaterThan(DrawnTask):
    """The target is a later year, drawn evenly; the distractor column tells the shown two digits, which `grade` needs.

    The published script shows the year before the one that it grades by; here it is the same.
    """

    train_size: int = Field(150, gt=0, description="examples; of a file, at most so many, the first")
    validation_size: int = Field(150, gt=0)
    test_size: int = Field(5_000, gt=0)
    split_by: Literal["year", "text"] = Field(
        "year", description="year: no two splits show the same two digits; text: only their texts differ"
    )

    def answer(self) -> Answer:
        kinds = torch.full((self.vocab_size,), -1)
        kinds[self.candidates()] = 0
        return Answer(slice(0, 1), kinds)

    def candidates(self) -> Tensor:
        """Tokens of `00` to `99` [C]."""
        return torch.from_numpy(_year_tokens(self._tokenizer()))

    def all_words(self) -> Sequence[Sentence]:
        events, frames = len(read_lines("events")), len(read_lines("greater_than_frames"))
        row = np.arange(max(events, len(YEARS)))
        century = row % len(CENTURIES)
        columns = [row % frames, row % events, century, row % 100, (row * 7 + 1) % 100]
        return self.sentences(np.column_stack(columns))

    def draw(self, random: RandomState) -> Mapping[str, Cases]:
        """Cases: frame, event, century, shown year, answer."""
        usable = self._usable()
        sizes = self.sizes
        if self.split_by == "text":
            found = self._distinct(usable, sum(sizes.values()), random)
            return dict(zip(sizes, np.split(found, np.cumsum(list(sizes.values()))[:-1]), strict=True))
        years = random.permutation(np.flatnonzero(usable.any(0)))
        ends = np.round(np.cumsum(SHARES[:-1]) * len(years)).astype(int)
        parts = zip(sizes.items(), np.split(years, ends), strict=True)
        return {
            name: self._distinct(usable & np.isin(np.arange(100), part), size, random) for (name, size), part in parts
        }

    def corrupt(self, cases: Cases, random: RandomState) -> Cases:
        """Another century and year; frame and event stay."""
        century, year = np.nonzero(self._usable())
        chosen = random.randint(len(century), size=len(cases))
        drawn = cases.copy()
        drawn[:, 2], drawn[:, 3] = century[chosen], year[chosen]
        drawn[:, 4] = self._later(drawn[:, 2], drawn[:, 3], random)
        return drawn

    def sentences(self, cases: Cases) -> list[Sentence]:
        frames, events = read_lines("greater_than_frames"), read_lines("events")
        found = []
        for frame, event, number, shown, answer in cases.tolist():
            century = CENTURIES[number]
            prompt = frames[frame].format(event=events[event], start=f"{century}{YEARS[shown]}", century=century)
            found.append(Sentence(prompt, YEARS[answer], YEARS[shown]))
        return found

    def read_row(self, row: Row) -> Pair:
        """`prefix`, `digits`, `good` (the first of them is the target), `corr_prefix`, `corr_digits`."""
        good = row.values.get("good")
        if not (isinstance(good, list) and good):
            raise ConfigError(f"{row.source}: field 'good' is not a list of later years; mend it")
        shown, answer = row.number("digits"), Row(row.source, {"good": good[0]}).number("good")
        other = row.number("corr_digits")
        if not all(0 <= year < 100 for year in (shown, answer, other)):
            raise ConfigError(f"{row.source}: years are two digits, 0 to 99; mend digits, good and corr_digits")
        clean = Sentence(row.text("prefix").rstrip(), YEARS[answer], YEARS[shown])
        corrupted = Sentence(row.text("corr_prefix").rstrip(), YEARS[min(other + 1, 99)], YEARS[other])
        return Pair(clean, corrupted, row.source)

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """Over the 100 two-digit tokens only, with d the shown year: `accuracy` (the best one is later than d),
        `exact_match` (it is the whole model's best), `kl`, `probability_difference` p(> d) - p(< d),
        `probability_difference_10` (the same among d - 10 to d + 10), `kendall_tau` with the whole model's logits."""
        if not self.pairs:
            raise ConfigError("task.pairs: must be true to grade years; without it the shown year is not kept")
        candidates = self.candidates().to(logits.device)
        found, whole = logits[:, 0, candidates], reference[:, 0, candidates]
        shown = (candidates == split.targets[:, 1:2]).long().argmax(-1)
        probabilities = found.float().softmax(-1)
        return {
            "accuracy": (found.argmax(-1) > shown).float(),
            "exact_match": (found.argmax(-1) == whole.argmax(-1)).float(),
            "kl": circuit_grading.kl(found, whole),
            "probability_difference": circuit_grading.probability_difference(probabilities, shown),
            "probability_difference_10": circuit_grading.probability_difference(probabilities, shown, NEAR),
            "kendall_tau": circuit_grading.kendall_tau(found, whole),
        }

    def _usable(self) -> NDArray[np.bool_]:
        """[centuries, 100]: years the tokenizer splits evenly that have such years before and after them."""
        whole = _even_years(self._tokenizer())
        before = whole.cumsum(1) - whole
        return whole & (before > 0) & (before < whole.sum(1, keepdims=True) - 1)

    def _later(self, century: Cases, shown: Cases, random: RandomState) -> Cases:
        """A year after the shown one [N], each of them equally likely."""
        whole = _even_years(self._tokenizer())[century]
        later = whole & (np.arange(100) > shown[:, None])
        return (random.random_sample(later.shape) * later).argmax(1)

    def _distinct(self, usable: NDArray[np.bool_], count: int, random: RandomState) -> Cases:
        century, year = np.nonzero(usable)
        if not len(century):
            raise ConfigError("task.tokenizer: splits too few years into two tokens of two digits; take another")
        events, frames = len(read_lines("events")), len(read_lines("greater_than_frames"))

        def draw(number: int) -> Cases:
            chosen = random.randint(len(century), size=number)
            words = random.randint(frames, size=number), random.randint(events, size=number)
            return np.column_stack([*words, century[chosen], year[chosen]])

        rows = distinct(draw, count, "sentences")
        return np.column_stack([rows, self._later(rows[:, 2], rows[:, 3], random)])


@lru_cache(maxsize=8)
def _year_tokens(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Tokens of `00` to `99` without a space before them [C]."""
    ids = [tokenizer.token_to_id(year) for year in YEARS]
    if None in ids:
        raise ConfigError(
            f"task.tokenizer: has no token '{YEARS[ids.index(None)]}'; take one with a token for every two digits"
        )
    return np.array(ids)


@lru_cache(maxsize=8)
def _even_years(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """[centuries, 100]: does a year have its century's token and then that of its two digits?"""
    ids = _year_tokens(tokenizer)
    found = np.zeros((len(CENTURIES), len(YEARS)), dtype=bool)
    for row, century in enumerate(CENTURIES):
        start = tokenizer.encode(f"from {century}").ids
        texts = [f"from {century}{year}" for year in YEARS]
        encoded = tokenizer.encode_batch(texts)
        found[row] = [each.ids == [*start, int(token)] for each, token in zip(encoded, ids, strict=True)]
    return found
