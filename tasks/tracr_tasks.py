"""Sequences for transformers compiled from RASP programs: reversal, and the running fraction of one token.

Lindner et al. 2023 (arXiv 2301.05062), with the data of Bhaskar et al. 2024 (arXiv 2406.16778): every sequence of one
length, BOS first. Training and evaluation use them all. Token ids are those of the compiled models: tokens, BOS and the
compiler's padding in alphabetical order. Shapes: N sequences, T = 1 + length tokens, A outputs.

These models have an output at every position, not a next token: targets[n, a] is what stands at positions[n, a].
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from numpy.random import RandomState
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Answer, Dataset, Split, Task
from tasks import circuit_grading
from tasks.examples import make_dataset
from tasks.vocabulary import IntArray

BOS, PADDING = "BOS", "compiler_pad"
MOST_SEQUENCES = 2**20
TOLERANCE = 0.05  # of a right fraction


def _order(symbol: str) -> tuple[bool, int, str]:
    """As the compiler sorts tokens: numbers by value, then words."""
    return (False, int(symbol), "") if symbol.isdigit() else (True, 0, symbol)


class TracrTask(Task):
    """`Split.tokens` [N, 2T]: the clean sequence, then one in which every token is another. Without `pairs` [N, T]."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    symbols: tuple[str, ...]
    size: int = Field(gt=0, le=64, description="symbols of a sequence")
    pairs: bool = Field(True, description="with corrupted sequences")
    seed: int = Field(0, ge=0, lt=2**32, description="of the corrupted sequences")

    @model_validator(mode="after")
    def _check(self) -> TracrTask:
        special = next((symbol for symbol in self.symbols if symbol in (BOS, PADDING)), None)
        if special or len(set(self.symbols)) < len(self.symbols) or len(self.symbols) < 2:
            raise ValueError(f"symbols must be two or more different ones, none of them {BOS} or {PADDING}")
        if len(self.symbols) ** self.size > MOST_SEQUENCES:
            raise ValueError(f"size {self.size} gives more than {MOST_SEQUENCES} sequences; take a smaller one")
        return self

    @property
    def vocab_size(self) -> int:
        return len(self.symbols) + 2

    @property
    def text_length(self) -> int:
        return 1 + self.size

    @property
    def max_length(self) -> int:
        return 2 * self.text_length if self.pairs else self.text_length

    @property
    def num_train(self) -> int:
        return len(self.symbols) ** self.size

    def vocabulary(self) -> tuple[str, ...]:
        return tuple(sorted((*self.symbols, BOS, PADDING), key=_order))

    def build(self) -> Dataset:
        """The same rows in `train`, `validation` and `test`."""
        numbers = np.arange(self.num_train)[:, None] // len(self.symbols) ** np.arange(self.size)[::-1]
        drawn = numbers % len(self.symbols)  # [N, size] numbers of symbols
        positions = torch.arange(self.text_length - self.num_answers, self.text_length)
        tokens = [self._tokens(drawn)]
        if self.pairs:
            others = RandomState(self.seed).randint(1, len(self.symbols), size=drawn.shape)
            tokens.append(self._tokens((drawn + others) % len(self.symbols)))
        split = Split(
            torch.from_numpy(np.concatenate(tokens, 1)),
            positions.repeat(len(drawn), 1),
            torch.from_numpy(self._targets(tokens[0])),
        )
        answer = Answer(slice(0, self.num_answers))
        return make_dataset(self, self.vocabulary(), {"all": split}, {"validation": split, "test": split}, answer)

    @abstractmethod
    def _targets(self, tokens: IntArray) -> IntArray:
        """Clean tokens [N, T] -> targets [N, A]."""

    def _tokens(self, drawn: IntArray) -> IntArray:
        """Numbers of symbols [N, size] -> tokens [N, T]."""
        ids = np.array([self.vocabulary().index(symbol) for symbol in self.symbols])
        return np.insert(ids[drawn], 0, self.vocabulary().index(BOS), axis=1)

    def _check_width(self, logits: Tensor, width: int) -> None:
        if logits.shape[-1] != width:
            raise ConfigError(f"task: {logits.shape[-1]} outputs a position where {width} are graded; take its model")


class TracrReverse(TracrTask):
    """Outputs [N, size, symbols] of all positions but BOS; output k is the k-th symbol in alphabetical order."""

    symbols: tuple[str, ...] = Field(("1", "2", "3"), description="tokens of the sequences")
    size: int = Field(3, gt=0, le=64, description="symbols of a sequence")

    @property
    def num_answers(self) -> int:
        return self.size

    def _targets(self, tokens: IntArray) -> IntArray:
        outputs = sorted(self.symbols, key=_order)
        place = np.array([outputs.index(token) if token in outputs else -1 for token in self.vocabulary()])
        return place[tokens[:, :0:-1]]

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """`accuracy`: all outputs are right; `exact_match`: all are the whole model's; `kl` in nats, summed over
        positions."""
        self._check_width(logits, len(self.symbols))
        return {
            "accuracy": (logits.argmax(-1) == split.targets).all(-1).float(),
            "exact_match": circuit_grading.exact_match(logits, reference, split.targets),
            "kl": circuit_grading.kl(logits, reference).sum(-1),
        }


class TracrProportion(TracrTask):
    """Outputs [N, T, 1]: at every position, BOS too, the fraction of `counted` among the symbols so far.

    Targets are whole numbers: how many of `counted` there are so far. The fraction is target / position, 0 at BOS.
    """

    symbols: tuple[str, ...] = Field(("a", "b", "c", "x"), description="tokens of the sequences")
    size: int = Field(4, gt=0, le=64, description="symbols of a sequence")
    counted: str = Field("x", description="the symbol whose fraction is asked for")

    @model_validator(mode="after")
    def _check_counted(self) -> TracrProportion:
        if self.counted not in self.symbols:
            raise ValueError(f"counted '{self.counted}' is no symbol; choose one of {', '.join(self.symbols)}")
        return self

    @property
    def num_answers(self) -> int:
        return self.text_length

    def _targets(self, tokens: IntArray) -> IntArray:
        return (tokens == self.vocabulary().index(self.counted)).cumsum(1)

    def fractions(self, split: Split) -> Tensor:
        """What the model should put out [N, T]."""
        return split.targets / split.positions.clamp(min=1)

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """`accuracy`: all outputs are within 0.05 of the fraction; `exact_match`: all within 0.05 of the whole model's;
        `kl` in nats of the softmax over positions, as the published loss has it."""
        self._check_width(logits, 1)
        found, whole = logits[..., 0], reference[..., 0]
        return {
            "accuracy": ((found - self.fractions(split)).abs() <= TOLERANCE).all(-1).float(),
            "exact_match": ((found - whole).abs() <= TOLERANCE).all(-1).float(),
            "kl": circuit_grading.kl(found, whole),
        }
