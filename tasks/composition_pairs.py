"""Two-hop questions in pairs, for circuits of networks that were trained on `tasks.composition`: a clean question
`<h><r1><r2>` about h -r1-> b -r2-> t, and a counterpart about other facts.

Shapes: N examples. A path is a row h, r1, r2, t, b of token ids.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Dataset, Split, Task
from tasks import circuit_grading
from tasks.composition import Composition
from tasks.examples import make_dataset
from tasks.vocabulary import IntArray

Corruption = Literal["all", "bridge", "relation", "same_bridge"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
PROMPT = 3  # tokens of a question
R1, R2 = 1, 2  # places in it


class CompositionPairs(Task):
    """`Split.tokens` [N, 6]: the clean question, then its counterpart. Without `pairs` [N, 3].

    Counterparts are questions over training edges that training paths use (as in causal tracing), drawn by the seed and
    the clean question alone. Targets are the clean answer and, as a distractor, the counterpart's. Splits: `train` and
    `validation` divide the facts of `split`; `held_out` are those of `test_inferred_iid` that are not trained on.
    Questions without a counterpart are left out.
    """

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    base: Composition = Field(description="the task of the network's own run, seed included")
    split: Literal["train_inferred", "test_inferred_iid"] = Field(
        "train_inferred", description="evaluation split of it that the clean questions are from"
    )
    corrupt: Corruption = Field(
        "all",
        description="the counterpart is any question with another answer; or has the same r2 behind another bridge "
        "entity; or another r2 behind the same h and r1; or same_bridge: another h and r1 with the same bridge and r2",
    )
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="of the clean questions, not trained on")
    pairs: bool = Field(True, description="with counterparts")
    seed: int = Field(0, ge=0, lt=2**32, description="of counterparts and of the division into splits")

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def max_length(self) -> int:
        return 2 * PROMPT if self.pairs else PROMPT

    @property
    def num_answers(self) -> int:
        return 2

    def build(self) -> Dataset:
        """Raises ConfigError where no question has a counterpart."""
        base = self.base.build()
        asked, held_out = self._paths(base.evaluation[self.split]), self._paths(base.evaluation["test_inferred_iid"])
        order = np.random.default_rng([self.seed, 1]).permutation(len(asked))
        num_validation = round(self.validation_fraction * len(asked))
        train, validation = asked[np.sort(order[num_validation:])], asked[np.sort(order[:num_validation])]
        if self.split == "test_inferred_iid":
            held_out = validation
        return make_dataset(
            self,
            base.vocabulary,
            {"pairs": self._split(train)},
            {"validation": self._split(validation), "held_out": self._split(held_out)},
            Answer(slice(0, 1)),
        )

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """`logit_difference`: of the answer and the counterpart's; `kl` in nats; `moved`: is the counterpart's the
        answer given?"""
        found, targets = logits[:, 0], split.targets
        return {
            "accuracy": (found.argmax(-1) == targets[:, 0]).float(),
            "exact_match": circuit_grading.exact_match(logits[:, :1], reference[:, :1], targets[:, :1]),
            "logit_difference": circuit_grading.difference(found, targets[:, 0], targets[:, 1]),
            "moved": (found.argmax(-1) == targets[:, 1]).float(),
            "kl": circuit_grading.kl(found, reference[:, 0]),
        }

    def counterparts(self, prompts: IntArray, corrupt: Corruption | None = None) -> tuple[IntArray, NDArray[np.bool_]]:
        """Questions [N, 3] -> paths of their counterparts [N, 5], by default of the task's own kind, and which of them
        have one [N]; the others' rows are their own paths."""
        return self._counterparts(self.paths_of(prompts), corrupt or self.corrupt)

    def paths_of(self, prompts: IntArray) -> IntArray:
        """Questions [N, 3] -> paths [N, 5]. Raises ConfigError for one that is no two-hop question."""
        paths = known_paths(self.base)[0]
        codes, asked = (self._codes(rows) for rows in (paths, prompts))
        order = np.argsort(codes)
        places = order[np.searchsorted(codes, asked, sorter=order).clip(max=len(codes) - 1)]
        if (codes[places] != asked).any():
            raise ConfigError("task.base: a question leads nowhere in its graph; give the task of the network's run")
        return paths[places]

    def _codes(self, rows: IntArray) -> IntArray:
        size = self.vocab_size
        return (rows[:, 0] * size + rows[:, R1]) * size + rows[:, R2]

    def _paths(self, split: Split) -> IntArray:
        return self.paths_of(split.tokens[:, :PROMPT].numpy())

    def _counterparts(self, paths: IntArray, corrupt: Corruption) -> tuple[IntArray, NDArray[np.bool_]]:
        known, usable = known_paths(self.base)
        known = known[usable]
        drawn, found = paths.copy(), np.zeros(len(paths), bool)
        for row, path in enumerate(paths):
            choices = np.flatnonzero(_fits(known, path, corrupt))
            if len(choices):
                random = np.random.default_rng([self.seed, CORRUPTIONS.index(corrupt), *path[:PROMPT].tolist()])
                drawn[row], found[row] = known[choices[random.integers(len(choices))]], True
        return drawn, found

    def _split(self, paths: IntArray) -> Split:
        others, found = self._counterparts(paths, self.corrupt)
        if not found.any():
            raise ConfigError(f"task.corrupt {self.corrupt}: no question of the graph has such a counterpart")
        clean, others = paths[found], others[found]
        tokens = [clean[:, :PROMPT], others[:, :PROMPT]] if self.pairs else [clean[:, :PROMPT]]
        targets = np.stack([clean[:, PROMPT], others[:, PROMPT]], 1)
        positions = torch.full((len(clean), 2), PROMPT - 1)
        return Split(torch.from_numpy(np.concatenate(tokens, 1)), positions, torch.from_numpy(targets))


def _fits(known: IntArray, path: IntArray, corrupt: Corruption) -> NDArray[np.bool_]:
    """Which of the paths [M, 5] may stand against this one [5]."""
    head, first, second, answer, bridge = path[:, None] == known.T
    same_edge = head & first
    return {
        "all": ~answer,
        "bridge": second & ~bridge & ~answer,
        "relation": same_edge & ~second & ~answer,
        "same_bridge": second & bridge & ~same_edge,
    }[corrupt]


@lru_cache(maxsize=4)
def known_paths(base: Composition) -> tuple[IntArray, NDArray[np.bool_]]:
    """All paths of the graph [M, 5], and which go over two in-distribution edges [M]."""
    graph = base.graph()
    rows, first_ood, second_ood = graph.paths()
    bridges = np.repeat(graph.tails.ravel(), graph.tails.shape[1])
    tokens: NDArray[Any] = np.column_stack([rows, bridges])
    tokens[:, [R1, R2]] += base.num_entities
    return tokens, ~first_ood & ~second_ood
