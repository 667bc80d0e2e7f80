"""Random tokens of any size: for measurements and plans, where only shapes matter."""

from __future__ import annotations

from typing import ClassVar

from numpy.random import RandomState
from pydantic import Field, model_validator

from groundswell.protocols import Answer, Dataset, Task
from tasks.examples import answer_split, make_dataset
from tasks.vocabulary import numbered


class RandomTokens(Task):
    """Rows of independent, uniform tokens; the last `num_answers` of each are asked for. Nothing in them can be learnt
    but by heart."""

    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    vocabulary: int = Field(50_257, gt=1, description="different tokens")
    length: int = Field(1_024, gt=0, description="tokens that go in")
    answers: int = Field(1, gt=0, description="tokens at the end that are asked for; length: all of them")
    num_examples: int = Field(1_024, gt=0, description="training rows")
    num_test: int = Field(64, gt=0, description="test rows")
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _check(self) -> RandomTokens:
        if self.answers > self.length:
            raise ValueError(f"answers {self.answers} is more than length {self.length}; set task.length higher")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def max_length(self) -> int:
        return self.length

    @property
    def num_answers(self) -> int:
        return self.answers

    @property
    def num_train(self) -> int:
        return self.num_examples

    def build(self) -> Dataset:
        shape = (self.num_examples + self.num_test, self.length + 1)
        rows = RandomState(self.seed).randint(0, self.vocabulary, size=shape)
        prompt = self.length + 1 - self.answers
        train = answer_split(rows[: self.num_examples], prompt, self.length, pad=0)
        test = answer_split(rows[self.num_examples :], prompt, self.length, pad=0)
        vocabulary = tuple(numbered("", self.vocabulary))
        return make_dataset(
            self, vocabulary, {"train": train}, {"train": train, "test": test}, Answer(slice(-self.answers, None))
        )
