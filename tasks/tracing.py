"""What a task tells those who look inside a network: prompts, the intermediate facts in them, and counterfactuals.

N examples of T prompt tokens. A counterfactual changes the prompt where a role stands and would change the answer.
All draws are seeded example by example from sorted candidates, so they depend on nothing but the data and the seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Dataset, Split
from tasks.vocabulary import IntArray


@dataclass(frozen=True)
class Role:
    """Positions `start` to `stop - 1`, whose states are replaced by those of counterfactual prompts.

    `prompts` [N, stop]: up to the last replaced position, equal to the example's own before `start`. One token of each
    is drawn from `candidates` (N arrays of token ids, ascending); where there is none, the prompt is the example's own.
    """

    start: int
    stop: int
    prompts: Tensor
    candidates: Sequence[IntArray]

    @property
    def possible(self) -> NDArray[np.bool_]:
        """Which examples have a counterfactual [N]."""
        return np.array([len(choices) > 0 for choices in self.candidates], dtype=bool)


@dataclass(frozen=True)
class Reading:
    """Tokens [N] that a network is thought to hold at `position` on its way to the answer."""

    position: int
    tokens: Tensor


@dataclass(frozen=True)
class TracingExamples:
    prompts: Tensor  # [N, T]
    answers: Tensor  # [N], the first answer token, which follows the prompt
    rows: Tensor  # [N], places in the split
    position_names: tuple[str, ...]  # of the T positions
    readings: Mapping[str, Reading]
    roles: Mapping[str, Role] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)


class Traceable(ABC):
    """A task that can be traced."""

    @abstractmethod
    def tracing_examples(self, dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
        """`count` examples of an evaluation split (all, if it has fewer). Raises ConfigError that says why not."""


def choose_rows(dataset: Dataset, split: str, count: int, seed: int) -> IntArray:
    """Places in the split, in the order of the published code: numpy's choice without replacement."""
    if split not in dataset.evaluation:
        known = ", ".join(dataset.evaluation)
        raise ConfigError(f"split: the task has no evaluation split '{split}'; it has {known}")
    size = len(dataset.evaluation[split])
    if not size:
        raise ConfigError(f"split: '{split}' has no examples; choose another, or a task with more of them")
    return RandomState(seed).choice(size, count, replace=False) if count < size else np.arange(size)


def prompts_of_length(split: Split, length: int) -> NDArray[np.bool_]:
    """Which rows have prompts of that many tokens [N]."""
    return (split.positions[:, 0] + 1 == length).numpy()


def make_role(prompts: IntArray, start: int, stop: int, candidates: Sequence[IntArray], place: int, seed: int) -> Role:
    """Put one of each example's candidates (ascending token ids) at `place`.

    The draw of an example depends on the seed, its own prompt and the place alone.
    """
    counterfactual = prompts[:, :stop].copy()
    for row, choices in enumerate(candidates):
        if len(choices):
            drawn = np.random.default_rng([seed, place, *prompts[row].tolist()]).integers(len(choices))
            counterfactual[row, place] = choices[drawn]
    return Role(start, stop, torch.from_numpy(counterfactual), candidates)
