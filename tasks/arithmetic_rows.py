"""Rows of token ids as they are put together and as the engine reads them.

A problem is built as a wide array of characters with a mask of those that are really there; packing pushes them to the
left. No sample is ever a Python object. N rows of L tokens: prompt, `=`, answer, EOS, PAD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from groundswell.protocols import IGNORE, Split
from tasks.arithmetic_vocabulary import EOS, EQUALS, FIRST_DIGIT, PAD, Ids
from tasks.numbers import Digits, Draws, Mask, widen
from tasks.vocabulary import IntArray

LossOn = Literal["answer", "all"]
SPACE_DECAY = 0.1  # after each space the probability of one more falls by this (generators of the original)
MOST_SPACES = 4  # before one character; a fifth has a probability below 1e-10


@dataclass(frozen=True)
class Rows:
    """N problems with their answers and EOS, right-padded."""

    tokens: Ids  # [N, L]
    equals: IntArray  # [N], the place of `=`

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: IntArray) -> Rows:
        return Rows(self.tokens[rows], self.equals[rows])

    @property
    def lengths(self) -> IntArray:
        """Tokens through EOS [N]."""
        there = self.tokens[:, ::-1] != PAD
        return np.where(there.any(axis=1), there.shape[1] - there.argmax(axis=1), 0)


@dataclass(frozen=True)
class Text:
    """A part of each row: ids [N, W] and which of them are written [N, W]."""

    ids: Ids
    written: Mask


def same(ids: int | Ids, count: int) -> Text:
    """One character in every row, or one of each row's own ([N])."""
    column = np.full((count, 1), ids, dtype=np.uint8) if isinstance(ids, int) else ids[:, None]
    return Text(column, np.ones((count, 1), dtype=bool))


def number(digits: Digits, lengths: IntArray) -> Text:
    """Digits in the order in which they are written."""
    return Text(digits + np.uint8(FIRST_DIGIT), np.arange(digits.shape[1]) < lengths[:, None])


def alternate(first: Text, second: Text) -> Text:
    """A character of each in turn, as wide as twice the wider one."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    ids = np.stack([widen(part.ids, width) for part in (first, second)], axis=2)
    written = np.stack([widen(part.written, width) for part in (first, second)], axis=2)
    return Text(ids.reshape(len(ids), -1), written.reshape(len(ids), -1))


def join(parts: Sequence[Text]) -> Text:
    return Text(
        np.concatenate([part.ids for part in parts], axis=1), np.concatenate([part.written for part in parts], axis=1)
    )


def with_spaces(text: Text, draws: Draws, probability: float, most: int) -> Text:
    """A random number of spaces before each character, as PAD: one more while a draw is below the probability, which
    falls tenfold with each. At most `most` in a row; those over it are left out."""
    count, width = text.ids.shape
    uniform = draws.uniform(width * MOST_SPACES).reshape(count, width, MOST_SPACES)
    more = np.logical_and.accumulate(uniform < probability * SPACE_DECAY ** np.arange(MOST_SPACES), axis=2)
    more &= text.written[:, :, None]
    more &= (more.reshape(count, -1).cumsum(axis=1) <= most).reshape(more.shape)
    ids = np.concatenate([np.full_like(more, PAD, dtype=np.uint8), text.ids[:, :, None]], axis=2)
    written = np.concatenate([more, text.written[:, :, None]], axis=2)
    return Text(ids.reshape(count, -1), written.reshape(count, -1))


def pack(text: Text, length: int) -> Ids:
    """What is written, pushed to the left: [N, length]. `length` must hold the longest row."""
    packed = np.full((len(text.ids), length), PAD, dtype=np.uint8)
    packed[np.arange(length) < text.written.sum(axis=1)[:, None]] = text.ids[text.written]
    return packed


def pack_rows(prompt: Text, answer: Text, length: int | None = None) -> Rows:
    """Prompt through `=`, then the answer and EOS. `length` None: as long as the longest row."""
    text = join([prompt, answer, same(EOS, len(prompt.ids))])
    equals = prompt.written.sum(axis=1) - 1
    return Rows(pack(text, int(text.written.sum(axis=1).max(initial=1)) if length is None else length), equals)


def to_split(rows: Rows, length: int, num_answers: int, loss_on: LossOn = "answer") -> Split:
    """tokens [N, length], positions and targets [N, num_answers].

    `positions` are the places from `=` on; a next token that is PAD (a space, or nothing) is never a target. With
    `loss_on` all, every place of a row is one (`mask_before_equals=False` of the original); num_answers = length then.
    """
    count, stored = rows.tokens.shape
    whole = np.zeros((count, max(stored, length + 1)), dtype=np.uint8)
    whole[:, :stored] = rows.tokens
    start = np.zeros((count, 1), dtype=np.int64) if loss_on == "all" else rows.equals[:, None]
    positions = np.minimum(start + np.arange(num_answers), length - 1)
    targets = np.take_along_axis(whole, positions + 1, axis=1).astype(np.int64)
    beyond = start + np.arange(num_answers) >= length
    targets[(targets == PAD) | beyond] = IGNORE
    tokens = whole[:, :length].astype(np.int64)
    return Split(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(targets))


def find_equals(tokens: Ids) -> IntArray:
    """The place of the first `=` of each row [N]; the row's length where there is none."""
    found = tokens == EQUALS
    return np.where(found.any(axis=1), found.argmax(axis=1), tokens.shape[1]).astype(np.int64)


def longest_run(tokens: Ids) -> int:
    """Most digits side by side in any row of [N, L]."""
    run, most = np.zeros(len(tokens), dtype=np.int64), 0
    for column in tokens.T:
        run = np.where((column >= FIRST_DIGIT) & (column < FIRST_DIGIT + 10), run + 1, 0)
        most = max(most, int(run.max(initial=0)))
    return most
