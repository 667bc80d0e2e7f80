"""From rows of token ids to splits and data sets. N rows of L tokens (prompt and answer), T = L - 1 model inputs.

All draws come from numpy's `RandomState`: its stream is frozen for good, and the published generators use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState

from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task
from tasks.vocabulary import IntArray

DIGEST_ROWS = 4_096  # rows hashed together


def sample(rows: IntArray, count: int, random: RandomState) -> IntArray:
    """`count` rows without replacement in random order; all of them, shuffled, when there are fewer.

    Samples nest: at one state of `random`, a smaller sample is the beginning of a larger one.
    Consumes what `random.choice(len(rows), count, replace=False)` consumes, and draws the same rows.
    """
    return rows[random.permutation(len(rows))[:count]]


def answer_split(rows: IntArray, prompt_length: int, max_length: int, pad: int) -> Split:
    """Rows [N, L] of one shape, prompt first, then answer tokens -> tokens [N, max_length], right-padded."""
    count, length = rows.shape
    tokens = np.full((count, max_length), pad, dtype=np.int64)
    tokens[:, : length - 1] = rows[:, :-1]
    positions = np.tile(np.arange(prompt_length - 1, length - 1), (count, 1))
    targets = np.ascontiguousarray(rows[:, prompt_length:], dtype=np.int64)
    return Split(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(targets))


def row_texts(split: Split, vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Prompt and answer of each row as text. The answers must follow the prompt (`answer_split`)."""
    lengths = (split.positions[:, 0] + 1).tolist()
    rows = zip(split.tokens.tolist(), lengths, split.targets.tolist(), strict=True)
    return [
        (
            "".join([vocabulary[token] for token in tokens[:length]]),
            "".join([vocabulary[token] for token in targets if token != IGNORE]),
        )
        for tokens, length, targets in rows
    ]


def concatenate(*splits: Split) -> Split:
    if len(splits) == 1:  # a large data set is not held twice
        return splits[0]
    return Split(
        torch.cat([split.tokens for split in splits]),
        torch.cat([split.positions for split in splits]),
        torch.cat([split.targets for split in splits]),
    )


def make_dataset(
    task: Task,
    vocabulary: tuple[str, ...],
    train: Mapping[str, Split],
    evaluation: Mapping[str, Split],
    answer: Answer,
    candidates: Mapping[str, int] | None = None,
) -> Dataset:
    """Join the kinds of training row in their order and write the manifest.

    manifest: spec (the task), counts (rows of each split), train_blocks (rows of each kind, in the order of the
    training rows), candidates (facts there were to sample from), sha256 (over all tensors).
    """
    whole = concatenate(*train.values())
    manifest: dict[str, Any] = {
        "spec": task.to_dict(),
        "counts": {"train": len(whole), **{name: len(split) for name, split in evaluation.items()}},
        "train_blocks": {name: len(split) for name, split in train.items()},
        "candidates": dict(candidates or {}),
        "sha256": digest(whole, evaluation),
    }
    return Dataset(vocabulary, whole, dict(evaluation), answer, manifest)


def digest(train: Split, evaluation: Mapping[str, Split]) -> str:
    """sha256 over names, shapes and values of all splits that have rows."""
    total = hashlib.sha256()
    for name, split in [("train", train), *sorted(evaluation.items())]:
        for tensor in (split.tokens, split.positions, split.targets) if len(split) else ():
            total.update(f"{name} {tuple(tensor.shape)}\n".encode())
            for rows in tensor.split(DIGEST_ROWS):
                total.update(rows.contiguous().numpy().data)
    return total.hexdigest()
