"""Digit arithmetic against Python's integers; draws that depend on the row alone."""

import numpy as np
import pytest

from tasks.numbers import (
    Draws,
    add,
    count_digits,
    key_of,
    multiply,
    printed,
    random_digits,
    random_digits_without_carry,
    shuffled,
    subtract,
)


def values(digits: np.ndarray) -> list[int]:
    return [int("".join(map(str, row[::-1]))) for row in digits.tolist()]


def operands(width: int, other: int, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Random ones of all lengths, and those with the longest chains of carries and borrows."""
    draws = Draws(7, np.arange(count))
    a, b = (random_digits(draws.words(most), 1 + draws.below(most)[:, 0], zero_allowed=True) for most in (width, other))
    a[:5], b[:5] = 9, 0
    b[:3, 0], a[3:5] = 1, 0
    a[4, -1], b[4, 0] = 1, 1
    a[5:10], b[5:10] = 9, 9
    a[10, :], b[10, :] = 0, 0
    b[11, :], a[11, :] = 9, 0
    return a, b


@pytest.mark.parametrize("width, other", [(1, 1), (3, 3), (12, 5), (5, 12), (130, 120)])
def test_arithmetic_is_right(width: int, other: int) -> None:
    a, b = operands(width, other)
    pairs = list(zip(values(a), values(b), strict=True))
    assert values(add(a, b)) == [x + y for x, y in pairs]
    assert values(multiply(a, b)) == [x * y for x, y in pairs]
    magnitude, negative = subtract(a, b)
    signed = [-value if below else value for value, below in zip(values(magnitude), negative, strict=True)]
    assert signed == [x - y for x, y in pairs]
    assert not any(below for value, below in zip(values(magnitude), negative, strict=True) if value == 0)


def test_digits_are_counted_without_leading_zeros() -> None:
    a, _ = operands(6, 6)
    assert count_digits(a).tolist() == [len(str(value)) for value in values(a)]


def test_printed_order() -> None:
    digits, lengths = np.array([[1, 2, 3], [4, 5, 0]], dtype=np.uint8), np.array([3, 2])
    assert printed(digits, lengths, reverse=True).tolist() == [[1, 2, 3], [4, 5, 0]]
    written = printed(digits, lengths, reverse=False)
    assert [row[:length].tolist() for row, length in zip(written, lengths, strict=True)] == [[3, 2, 1], [5, 4]]


def test_a_draw_depends_on_key_row_and_column_alone() -> None:
    whole = Draws(1, np.arange(100))
    whole.words(3)
    alone = Draws(1, np.array([42]))
    alone.words(3)
    assert np.array_equal(whole.words(5)[42], alone.words(5)[0])
    words = {word for key in range(3) for word in Draws(key, np.arange(50)).words(20).reshape(-1).tolist()}
    assert len(words) == 3 * 50 * 20
    assert key_of("a", 1) == key_of("a", 1) != key_of("a", 2)


def test_draws_are_uniform() -> None:
    numbers = Draws(3, np.arange(20_000)).below(10, 5)
    counts = np.stack([np.bincount(column, minlength=10) for column in numbers.T])
    assert counts.shape == (5, 10)
    chi_squared = ((counts - 2_000) ** 2 / 2_000).sum(axis=1)
    assert (chi_squared < 33.7).all()  # 9 degrees of freedom, p = 0.0001
    assert abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.03
    uniform = Draws(3, np.arange(20_000)).uniform(1)
    assert 0 <= uniform.min() < uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01


def test_shuffled_holds_each_number_once_a_block() -> None:
    rows = np.arange(70)
    order = shuffled(rows, 7, key=5)
    assert (np.sort(order.reshape(10, 7), axis=1) == np.arange(7)).all()
    assert len({tuple(block) for block in order.reshape(10, 7).tolist()}) > 5
    assert shuffled(rows[33:36], 7, key=5).tolist() == order[33:36].tolist()
    assert shuffled(rows[::-1], 7, key=5).tolist() == order[::-1].tolist()


def test_numbers_of_a_length_are_uniform() -> None:
    count = 90_000
    drawn = random_digits(Draws(0, np.arange(count)).words(4), np.full(count, 2))
    found = np.bincount(values(drawn), minlength=100)
    assert found[:10].sum() == 0 and (found[10:] > 0).all()
    assert ((found[10:] - 1_000) ** 2 / 1_000).sum() < 150  # 89 degrees of freedom, p = 0.0001
    ones = random_digits(Draws(0, np.arange(1_000)).words(4), np.full(1_000, 1))
    assert set(values(ones)) == set(range(1, 10))
    zeros = random_digits(Draws(0, np.arange(1_000)).words(4), np.full(1_000, 1), zero_allowed=True)
    assert set(values(zeros)) == set(range(10))


def test_pairs_without_carry_are_uniform() -> None:
    """As many as rejection would keep: of two-digit and one-digit numbers, each pair equally often."""
    count = 81_000
    first, second = np.full(count, 2), np.full(count, 1)
    a, b = random_digits_without_carry(Draws(0, np.arange(count)), first, second, width=3)
    assert (a + b).max() < 10
    right = {(x, y) for x in range(10, 100) for y in range(1, 10) if x % 10 + y < 10}
    pairs, counts = np.unique(np.stack([values(a), values(b)]), axis=1, return_counts=True)
    assert set(map(tuple, pairs.T.tolist())) == right and len(right) == 405
    expected = count / len(right)
    assert ((counts - expected) ** 2 / expected).sum() < 520  # 404 degrees of freedom, p = 0.0001
