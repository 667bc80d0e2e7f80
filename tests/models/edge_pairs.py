"""A small task of clean and corrupted inputs: random tokens, others from the middle on in the corrupted row."""

import torch
from pydantic import Field

from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task


class RandomPairs(Task):
    """Rows of `length` clean and `length` corrupted tokens, answered at the last place and, in every other row, at the
    one before it too. Token 0 is no input."""

    size: int = Field(61, gt=3)
    length: int = Field(8, gt=3)
    num_examples: int = Field(40, gt=0)
    pairs: bool = True
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def max_length(self) -> int:
        return 2 * self.length if self.pairs else self.length

    @property
    def num_answers(self) -> int:
        return 2

    def build(self) -> Dataset:
        source = torch.Generator().manual_seed(self.seed)
        train, test = self._split(source), self._split(source)
        kinds = torch.where(torch.arange(self.size) < self.size // 2, 0, -1)
        vocabulary = tuple(f"t{index}" for index in range(self.size))
        return Dataset(vocabulary, train, {"test": test}, Answer(slice(0, 2), kinds), {})

    def _split(self, source: torch.Generator) -> Split:
        clean, other, targets = (
            torch.randint(1, self.size, (self.num_examples, n), generator=source) for n in (self.length,) * 2 + (2,)
        )
        changed = torch.arange(self.length) >= self.length // 2
        tokens = torch.cat([clean, torch.where(changed, other, clean)], 1) if self.pairs else clean
        positions = torch.tensor([self.length - 1, self.length - 2]).expand(self.num_examples, -1)
        targets[1::2, 1] = IGNORE
        return Split(tokens, positions, targets)
