"""Data sets as folders of the published format: train.json, valid.json, test.json and vocab.json.

Rows are objects with `input_text`, `target_text` (the input, the answer and `</a>`) and `type`, in the test the split.
Token ids are places in vocab.json; one `<pad>` that no file mentions comes after them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from groundswell.config import ConfigError
from groundswell.files import atomic_write
from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task
from tasks import comparison, composition
from tasks.examples import digest, row_texts
from tasks.tracing import Traceable, TracingExamples
from tasks.vocabulary import ANSWER, PAD, STOP, IntArray, Vocabulary

TRAIN, VALID, TEST, VOCABULARY = "train.json", "valid.json", "test.json", "vocab.json"


class Folder(Task, Traceable):
    """A data set somebody generated before. The folder must not change while runs on it are compared or resumed."""

    path: Path = Field(description="folder with train.json, test.json and vocab.json")
    predict_stop: bool = Field(True, description="train on a closing </a> too; without it the row ends at the answer")

    @model_validator(mode="after")
    def _check(self) -> Folder:
        self._dataset()
        return self

    @property
    def vocab_size(self) -> int:
        return len(self._dataset().vocabulary)

    @property
    def max_length(self) -> int:
        return self._dataset().train_split.tokens.shape[1]

    @property
    def num_answers(self) -> int:
        return self._dataset().train_split.targets.shape[1]

    def build(self) -> Dataset:
        dataset = self._dataset()
        manifest = {"spec": self.to_dict(), **dataset.manifest}
        return Dataset(dataset.vocabulary, dataset.train, dataset.evaluation, dataset.answer, manifest)

    def tracing_examples(self, dataset: Dataset, split: str, count: int, seed: int) -> TracingExamples:
        """As the generator whose tokens the vocabulary has."""
        for token, generator in (("<r_0>", composition), ("<attr_0>", comparison)):
            if token in dataset.vocabulary:
                return generator.tracing_examples(dataset, split, count, seed)
        raise ConfigError(f"task: the data set in {self.path} is neither composition nor comparison; it has no roles")

    def _dataset(self) -> Dataset:
        names = (TRAIN, VALID, TEST, VOCABULARY)
        stamps = tuple(_stamp(self.path / name) for name in names)
        return _read_cached(self.path, self.predict_stop, stamps)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _read_cached(path: Path, predict_stop: bool, stamps: tuple[Any, ...]) -> Dataset:
    return read_folder(path, predict_stop)


def read_folder(path: str | Path, predict_stop: bool = True) -> Dataset:
    """Splits come from `type` in the test (one split "test" without it), in order of first appearance.

    valid.json may be missing; its rows are a split "valid" unless all of them are in the test too, as published.
    Raises ValueError that names the file and the remedy for anything missing or malformed.
    """
    folder = Path(path)
    vocabulary = _read_vocabulary(folder / VOCABULARY)
    rows = {TRAIN: _read_rows(folder / TRAIN), TEST: _read_rows(folder / TEST)}
    if (folder / VALID).exists():
        known = {row["target_text"] for row in rows[TEST]}
        valid = _read_rows(folder / VALID)
        if any(row["target_text"] not in known for row in valid):
            rows[VALID] = valid
    whole = _merge([_encode(folder / name, part, vocabulary, predict_stop) for name, part in rows.items()])
    split = whole.to_split(vocabulary.ids[PAD])
    try:
        columns = _answer_columns(split, vocabulary)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None

    train, start = split.select(slice(0, len(rows[TRAIN]))), len(rows[TRAIN])
    evaluation: dict[str, Split] = {}
    types: dict[str, list[int]] = {}
    for number, row in enumerate(rows[TEST], start):
        types.setdefault(str(row.get("type", "test")), []).append(number)
    for name, numbers in types.items():
        evaluation[name] = split.select(torch.tensor(numbers))
    if VALID in rows:
        evaluation["valid"] = split.select(slice(start + len(rows[TEST]), None))
    counts = {"train": len(train), **{name: len(part) for name, part in evaluation.items()}}
    manifest = {"counts": counts, "sha256": digest(train, evaluation)}
    return Dataset(vocabulary.tokens, train, evaluation, Answer(columns), manifest)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = f"task.path must be a folder with {TRAIN}, {TEST} and {VOCABULARY}"
        raise ValueError(f"{path}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}: not JSON ({error}); write the file again") from None


def _read_vocabulary(path: Path) -> Vocabulary:
    tokens = _read_json(path)
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)):
        raise ValueError(f"{path}: must be a list of token strings; write the file again")
    try:
        return Vocabulary(tokens if PAD in tokens else [*tokens, PAD])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = _read_json(path)
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f"{path}: must be a list of objects; write the file again")
    if not rows and path.name == TRAIN:
        raise ValueError(f"{path}: has no rows; give at least one to train on")
    for number, row in enumerate(rows):
        prompt, target = row.get("input_text"), row.get("target_text")
        if not (isinstance(prompt, str) and isinstance(target, str)):
            raise ValueError(f"{path}: row {number} lacks the text fields input_text and target_text; add them")
        if not (target.startswith(prompt) and prompt.endswith(">") and len(target) > len(prompt)):
            raise ValueError(
                f"{path}: row {number}: target_text must be input_text and then the answer tokens; mend the row"
            )
    return rows


class _Encoded:
    """N rows of ids end to end, with their lengths [N] and the lengths of their prompts [N]."""

    def __init__(self, ids: IntArray, lengths: IntArray, prompts: IntArray) -> None:
        self.ids, self.lengths, self.prompts = ids, lengths, prompts

    def to_split(self, pad: int) -> Split:
        """The model never sees a row's last token. tokens [N, T], right-padded; positions and targets [N, A]."""
        longest, most = int(self.lengths.max()), int((self.lengths - self.prompts).max())
        places = np.arange(longest)
        rows = np.full((len(self.lengths), longest), pad, dtype=np.int64)
        rows[places < self.lengths[:, None]] = self.ids
        tokens = np.where(places[:-1] < self.lengths[:, None] - 1, rows[:, :-1], pad)
        following = self.prompts[:, None] + np.arange(most)  # [N, A], the answers' places
        exists = following < self.lengths[:, None]
        answers = np.take_along_axis(rows, np.minimum(following, longest - 1), axis=1)
        positions, targets = np.where(exists, following - 1, 0), np.where(exists, answers, IGNORE)
        return Split(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(targets))


def _encode(path: Path, rows: Sequence[dict[str, Any]], vocabulary: Vocabulary, predict_stop: bool) -> _Encoded:
    texts = [row["target_text"] for row in rows]
    if not predict_stop:
        texts = [text.removesuffix(STOP) for text in texts]
    try:
        ids, lengths = vocabulary.encode_batch(texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    prompts = np.fromiter((row["input_text"].count(">") for row in rows), np.int64, len(rows))
    if (prompts >= lengths).any():
        number = int(np.argmax(prompts >= lengths))
        raise ValueError(f"{path}: row {number} has no answer but {STOP}; give one or set task.predict_stop=true")
    return _Encoded(ids, lengths, prompts)


def _merge(parts: Sequence[_Encoded]) -> _Encoded:
    return _Encoded(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.prompts for part in parts]),
    )


def _answer_columns(split: Split, vocabulary: Vocabulary) -> slice:
    """All without delimiters in the vocabulary, else the first, or the second where all answers begin with `<a>`."""
    if ANSWER not in vocabulary:
        return slice(0, 1) if STOP in vocabulary else slice(-split.targets.shape[1], None)
    opened = split.targets[:, 0] == vocabulary.ids[ANSWER]
    if opened.any() and not opened.all():
        raise ValueError(f"some answers begin with {ANSWER} and some do not; write all of them alike")
    return slice(1, 2) if opened.any() else slice(0, 1)


def write_folder(dataset: Dataset, path: str | Path, valid_split: str = "test_inferred_ood") -> None:
    """Write the four files. Row order is kept, so reading back gives the same tensors (splits without rows are lost).

    `</a>` is appended to targets that do not end with it, if the vocabulary has it. valid.json holds `valid_split`, or
    nothing. Training rows get a `type` where the manifest knows their kinds.
    """
    folder = Path(path)
    kinds = [kind for kind, count in dataset.manifest.get("train_blocks", {}).items() for _ in range(count)]
    train = _json_rows(dataset.train_split, dataset.vocabulary, kinds or [""] * len(dataset.train))
    tests = {
        name: _json_rows(split, dataset.vocabulary, [name] * len(split)) for name, split in dataset.evaluation.items()
    }
    atomic_write(folder / TRAIN, _json_list(train))
    atomic_write(folder / VALID, _json_list(tests.get(valid_split, [])))
    atomic_write(folder / TEST, _json_list([row for rows in tests.values() for row in rows]))
    atomic_write(folder / VOCABULARY, json.dumps([token for token in dataset.vocabulary if token != PAD]))


def _json_rows(split: Split, vocabulary: Sequence[str], types: Sequence[str]) -> list[str]:
    """One JSON object a row, as text: three times as fast as dumping dictionaries."""
    escaped = [json.dumps(token)[1:-1] for token in vocabulary]
    closing = STOP if STOP in vocabulary else ""
    endings = {kind: f', "type": {json.dumps(kind)}}}' if kind else "}" for kind in set(types)}
    rows = []
    for (prompt, answer), kind in zip(row_texts(split, escaped), types, strict=True):
        stop = "" if answer.endswith(closing) else closing
        rows.append(f'{{"input_text": "{prompt}", "target_text": "{prompt}{answer}{stop}"{endings[kind]}')
    return rows


def _json_list(rows: Sequence[str]) -> str:
    return f"[{', '.join(rows)}]"
