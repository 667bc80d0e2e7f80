"""Decimal numbers of any length as arrays, and random draws that are a pure function of a row's number.

A number is a row of digits, units first ([N, W] uint8, zeros above its length), so column k is the place 10^k. All
operations run over whole arrays; no number becomes a Python object.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.vocabulary import IntArray

Digits = NDArray[np.uint8]  # [N, W]
Words = NDArray[np.uint64]
Mask = NDArray[np.bool_]

# Increment and multipliers of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; multipliers: Stafford's variant 13).
GOLDEN, FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
HALF = np.uint64(32)


def key_of(*parts: Any) -> int:
    """A 64-bit key for a stream of draws, from what the stream is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST_MULTIPLIER)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(SECOND_MULTIPLIER)
    return words ^ (words >> np.uint64(31))


class Draws:
    """Random words of rows: word (row, column) depends on the key, the row's number and the column alone.

    Each row is a SplitMix64 sequence that starts at a hash of the key and the row's number.
    """

    def __init__(self, key: int, rows: IntArray) -> None:
        self._states = _mix(_mix(rows.astype(np.uint64)) ^ np.uint64(key))
        self._column = 0

    def words(self, count: int) -> Words:
        """The next columns [N, count]."""
        columns = np.arange(self._column + 1, self._column + count + 1, dtype=np.uint64)
        self._column += count
        return _mix(self._states[:, None] + columns * np.uint64(GOLDEN))

    def below(self, bound: Any, count: int = 1) -> IntArray:
        """Integers 0 <= n < bound [N, count]. `bound` (< 2^32) is a number or broadcasts to [N, count]."""
        return scale(self.words(count), bound).astype(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) [N, count]."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scale(words: Words, bound: Any) -> Words:
    """Words to integers below `bound`, by the upper half of the product (Lemire, arXiv 1805.10941, section 3)."""
    return ((words >> HALF) * np.asarray(bound, dtype=np.uint64)) >> HALF


def shuffled(rows: IntArray, size: int, key: int) -> IntArray:
    """Numbers below `size` [N], such that each `size` rows in a row number hold each of them once, in random order."""
    blocks, which = np.unique(rows // size, return_inverse=True)
    order = np.argsort(Draws(key, blocks).words(size), axis=1)
    return order[which.reshape(-1), rows % size]


def random_digits(words: Words, lengths: IntArray, zero_allowed: bool = False) -> Digits:
    """Uniform numbers of exactly these lengths [N] from words [N, W]; `zero_allowed`: one of one digit may be 0."""
    width = words.shape[1]
    lowest = lowest_digits(lengths, width, zero_allowed)
    digits = lowest + scale(words, 10 - lowest.astype(np.uint64)).astype(np.uint8)
    return digits * (np.arange(width) < lengths[:, None])


def lowest_digits(lengths: IntArray, width: int, zero_allowed: bool) -> Digits:
    """The smallest digit of each place [N, W]: 1 at the leading one."""
    leading = np.arange(width) == lengths[:, None] - 1
    if zero_allowed:
        leading &= lengths[:, None] > 1
    return leading.astype(np.uint8)


def _pairs_without_carry() -> tuple[NDArray[np.uint8], IntArray]:
    """Digit pairs [2, 2, 55, 2] whose sum is below 10, by the smallest digits of both, and how many there are."""
    pairs, counts = np.zeros((2, 2, 55, 2), dtype=np.uint8), np.zeros((2, 2), dtype=np.int64)
    for a, b in np.ndindex(2, 2):
        found = [(x, y) for x in range(a, 10) for y in range(b, 10 - x)]
        pairs[a, b, : len(found)], counts[a, b] = found, len(found)
    return pairs, counts


PAIRS_WITHOUT_CARRY, NUM_PAIRS_WITHOUT_CARRY = _pairs_without_carry()


def random_digits_without_carry(
    draws: Draws, first_lengths: IntArray, second_lengths: IntArray, width: int, zero_allowed: bool = False
) -> tuple[Digits, Digits]:
    """Uniform pairs of numbers of these lengths among those whose sum carries nowhere: each [N, W].

    Columns are independent of each other under that condition, so one draw a column is exact: no rejection.
    """
    first = lowest_digits(first_lengths, width, zero_allowed)
    second = lowest_digits(second_lengths, width, zero_allowed)
    words = draws.words(width)
    drawn = scale(words, NUM_PAIRS_WITHOUT_CARRY[first, second])
    pairs = PAIRS_WITHOUT_CARRY[first, second, drawn.astype(np.int64)]  # [N, W, 2]
    alone = np.where(  # where only one number has a digit
        np.arange(width) < np.maximum(first_lengths, second_lengths)[:, None],
        first + second + scale(words, 10 - (first + second).astype(np.uint64)).astype(np.uint8),
        0,
    )
    in_first, in_second = (np.arange(width) < lengths[:, None] for lengths in (first_lengths, second_lengths))
    both = in_first & in_second
    return (
        np.where(both, pairs[:, :, 0], np.where(in_first, alone, 0)).astype(np.uint8),
        np.where(both, pairs[:, :, 1], np.where(in_second, alone, 0)).astype(np.uint8),
    )


def widen(digits: NDArray[Any], width: int) -> NDArray[Any]:
    """More places, which are zero [N, width]."""
    wide = np.zeros((len(digits), width), dtype=digits.dtype)
    wide[:, : digits.shape[1]] = digits
    return wide


def _shift_up(flags: NDArray[Any]) -> NDArray[Any]:
    """What leaves one place enters the next."""
    shifted = np.zeros_like(flags)
    shifted[:, 1:] = flags[:, :-1]
    return shifted


def _carry_ones(columns: NDArray[Any]) -> Digits:
    """Columns 0..18 [N, W] -> digits. The last place below that is not 9 says whether a carry comes in."""
    places = 2 * np.arange(1, columns.shape[1] + 1, dtype=np.int16)
    deciding = np.maximum.accumulate(np.where(columns != 9, places + (columns > 9), 0), axis=1)
    return ((columns + _shift_up(deciding & 1)) % 10).astype(np.uint8)


def add(first: Digits, second: Digits) -> Digits:
    """Sums [N, max(W) + 1]."""
    width = max(first.shape[1], second.shape[1]) + 1
    return _carry_ones(widen(first, width) + widen(second, width))


def subtract(first: Digits, second: Digits) -> tuple[Digits, Mask]:
    """|first - second| [N, max(W)], and where the difference is below zero [N]."""
    width = max(first.shape[1], second.shape[1])
    columns = widen(first, width).astype(np.int8) - widen(second, width).astype(np.int8)
    places = 2 * np.arange(1, width + 1, dtype=np.int16)
    deciding = np.maximum.accumulate(np.where(columns != 0, places + (columns < 0), 0), axis=1)
    negative = deciding[:, -1] % 2 == 1
    borrows = (deciding > 0) & ((deciding % 2 == 1) != negative[:, None])
    magnitudes = np.where(negative[:, None], -columns, columns) - _shift_up(borrows)
    return (magnitudes % 10).astype(np.uint8), negative


def multiply(first: Digits, second: Digits) -> Digits:
    """Products [N, W1 + W2]."""
    width = first.shape[1] + second.shape[1]
    columns = np.zeros((len(first), width), dtype=np.int32)
    wide = second.astype(np.int32)
    for place in range(first.shape[1]):
        columns[:, place : place + second.shape[1]] += first[:, place, None] * wide
    while (columns > 18).any():
        columns = columns % 10 + _shift_up(columns // 10)
    return _carry_ones(columns)


def count_digits(digits: Digits) -> IntArray:
    """Digits of each number without leading zeros [N]; zero has one."""
    above = np.where(digits > 0, np.arange(1, digits.shape[1] + 1, dtype=np.int64), 1)
    return above.max(axis=1)


def printed(digits: Digits, lengths: IntArray, reverse: bool) -> Digits:
    """In the order in which they are written, from column 0 on [N, W]: units first where `reverse`, else last."""
    if reverse:
        return digits
    source = np.maximum(lengths[:, None] - 1 - np.arange(digits.shape[1]), 0)
    return np.take_along_axis(digits, source, axis=1)
