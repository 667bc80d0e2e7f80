"""Clean and corrupted texts of one's own, with the answer in `<predict></predict>`.

{"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>", "split": "train"}
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.files import check_name
from tasks.circuit_files import TRAIN, Row, read_objects
from tasks.circuit_text import CircuitTask, Pair, Sentence

OPEN, CLOSE = "<predict>", "</predict>"
VALIDATION = "validation"


class PairedText(CircuitTask):
    """Rows belong to the split that their key `split` names; either all or none of them have it.

    Without it a row is held out for validation by its clean text's hash. An answer takes the space before it along.
    """

    has_distractor: ClassVar[bool] = False

    path: str = Field(description="JSON objects with clean, corrupted and, if wanted, split; one a line, or longer")
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="of rows without a split, held out; 0: all rows are trained on and evaluated"
    )

    @model_validator(mode="after")
    def _check_path(self) -> PairedText:
        self._rows()
        return self

    @property
    def default_length(self) -> int:
        return self._measured()[0]

    def coverage(self) -> Sequence[Sentence]:
        return [sentence for pairs in self.sentence_pairs().values() for pair in pairs for sentence in pair[:2]]

    def sentence_pairs(self) -> Mapping[str, Sequence[Pair]]:
        splits: dict[str, list[Pair]] = {TRAIN: []}
        for row in self._rows():
            splits.setdefault(self._split_of(row), []).append(read_pair(row))
        if "split" not in self._rows()[0].values and self.validation_fraction == 0:
            splits[VALIDATION] = splits[TRAIN]
        if not splits[TRAIN] or len(splits) == 1:
            missing = TRAIN if not splits[TRAIN] else f"any other than {TRAIN}"
            raise ConfigError(
                f'{self.path}: no row is of split {missing}; give rows a key "split", or set '
                "task.validation_fraction=0 to evaluate on the rows that are trained on"
            )
        return splits

    def _rows(self) -> tuple[Row, ...]:
        return read_objects(self.path)

    def _split_of(self, row: Row) -> str:
        if ("split" in row.values) != ("split" in self._rows()[0].values):
            raise ConfigError(f"{row.source}: some rows have the key 'split' and some have not; write it everywhere")
        if "split" in row.values:
            return check_name(row.text("split"), f"{row.source}: split")
        share = int.from_bytes(hashlib.sha256(row.text("clean").encode()).digest()[:8]) / 2**64
        return VALIDATION if share < self.validation_fraction else TRAIN


def read_pair(row: Row) -> Pair:
    return Pair(_sentence(row, "clean"), _sentence(row, "corrupted"), row.source)


def _sentence(row: Row, name: str) -> Sentence:
    """Raises ConfigError for a text that does not end in one tagged answer."""
    text = row.text(name)
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(CLOSE) < text.index(OPEN):
        raise ConfigError(f"{row.source}: field '{name}' has no single {OPEN}answer{CLOSE}; put tags around the answer")
    before, _, rest = text.partition(OPEN)
    answer, _, after = rest.partition(CLOSE)
    if after.strip():
        raise ConfigError(
            f"{row.source}: field '{name}' goes on after {CLOSE}; a causal model does not see it: end with the answer"
        )
    prompt = before.rstrip()
    if not prompt.strip() or not answer.strip():
        raise ConfigError(f"{row.source}: field '{name}' has nothing before or between its tags; write a prompt")
    return Sentence(prompt, f"{before[len(prompt) :]}{answer.rstrip()}")
