"""Lines of text drawn as the original draws them, number by number from Python's `random`, in its order.

For comparisons with files that the original has made. The tasks draw the same distributions faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from tasks.arithmetic_vocabulary import SYMBOLS

Operator = Literal["+", "-", "x"]


def bucket_lines(
    random: Random,
    n: int,
    m: int,
    operation: Operator,
    limit: int,
    start: int = 1,
    p: float = 0.0,
    reverse_all: bool = False,
    reverse_answer: bool = False,
    keep_0_for_len_1: bool = False,
    no_carry_addition: bool = False,
    index_hints: bool = False,
) -> list[str]:
    """`limit` lines over all pairs of operand lengths in turn. Both reversals together leave the result unreversed, as
    in the original; with hints the original has no line at all, and this is the evident one."""
    pairs = _pairs(range(start, n + 1), range(start, m + 1))
    lines = []
    for _ in range(limit):
        i, j = next(pairs)
        lowest = [0 if keep_0_for_len_1 and length == 1 else 10 ** (length - 1) for length in (i, j)]
        a, b = random.randint(lowest[0], 10**i - 1), random.randint(lowest[1], 10**j - 1)
        if no_carry_addition and operation == "+":
            a, b = _without_carry(random, i, j)
        parts = [str(a), str(b), str(_result(a, b, operation))]
        if reverse_answer:
            parts[2] = parts[2][::-1]
        if reverse_all:
            parts = [part[::-1] for part in parts]
        if index_hints:
            letters = pick_symbols(random, max(map(len, parts)))
            parts = [with_hints(part, letters) for part in parts]
        lines.append(_spaced(random, f"{parts[0]}{operation}{parts[1]}={parts[2]}", p))
    return lines


def plain_lines(
    random: Random,
    n: int,
    m: int,
    operation: Operator,
    num_examples: int,
    exact: bool = False,
    keep_places: bool = False,
    prepend_zeros: int = 0,
    p: float = 0.0,
    reverse_all: bool = False,
    reverse_answer: bool = False,
    no_carry_addition: bool = False,
    interleave: bool = False,
) -> list[str]:
    """Operands of exactly n and m digits (`exact`, or without carries), else uniform below 10^n and 10^m."""
    lines = []
    for _ in range(num_examples):
        if exact:
            a, b = random.randint(10 ** (n - 1), 10**n - 1), random.randint(10 ** (m - 1), 10**m - 1)
        elif no_carry_addition and operation == "+":
            a, b = _without_carry(random, n, m)
        else:
            a, b = random.randint(0, 10**n - 1), random.randint(0, 10**m - 1)
        zeros = "0" * prepend_zeros
        first, second = (zeros + str(x).zfill(width if keep_places else 0) for x, width in ((a, n), (b, m)))
        result = str(_result(a, b, operation))
        if prepend_zeros:
            result = f"0{zeros}{result}"
        if reverse_all:
            first, second = first[::-1], second[::-1]
        if reverse_all or reverse_answer:
            result = result[::-1]
        prompt = _interleaved(first, second) if interleave else f"{first}{operation}{second}"
        lines.append(_spaced(random, f"{prompt}={result}", p))
    return lines


def sorting_lines(
    random: Random, max_digits: int, max_length: int, limit: int, reverse_all: bool = False, index_hints: bool = False
) -> list[str]:
    """`limit` arrays of exactly `max_length` numbers."""
    lines = []
    for _ in range(limit):
        names, letters = pick_symbols(random, max_length), pick_symbols(random, max_digits)
        values, entries = [], []
        for name in names:
            digits = random.randint(1, max_digits)
            values.append(random.randint(10 ** (digits - 1), 10**digits - 1))
            text = str(values[-1])[::-1] if reverse_all else str(values[-1])
            entries.append(f"{name}:{with_hints(text, letters) if index_hints else text}")
        order = sorted(range(max_length), key=values.__getitem__)
        lines.append(f"{','.join(entries)}={','.join(names[place] for place in order)}")
    return lines


def sorting_bucket_lines(
    random: Random, max_digits: int, max_length: int, limit: int, reverse_all: bool = False, index_hints: bool = False
) -> list[str]:
    """As many lines of each array length and each count of digits, as `limit` has room for."""
    each = limit // (max_length * max_digits)
    return [
        line
        for length in range(1, max_length + 1)
        for digits in range(1, max_digits + 1)
        for line in sorting_lines(random, digits, length, each, reverse_all, index_hints)
    ]


def or_lines(random: Random, n: int, m: int, exact: bool = False, most: int | None = None) -> list[str]:
    """Positional OR: all problems up to these lengths (`exact`: of these), or a random `most` of them all."""
    lines = []
    for i in [n] if exact else range(1, n + 1):
        for j in [m] if exact else range(1, m + 1):
            for place in range(min(i, j)):
                in_first = random.random() > 0.5 if i == j else i < j
                first, second = _one_hot(i, place if in_first else None), _one_hot(j, None if in_first else place)
                lines.append(f"{first}+{second}={_one_hot(max(i, j), place)}")
    return lines if most is None else random.sample(lines, min(len(lines), most))


def pick_symbols(random: Random, count: int) -> str:
    """A stretch of the cyclic alphabet. A start beyond its end is drawn too, and is its beginning."""
    start = random.randint(0, len(SYMBOLS))
    return (SYMBOLS + SYMBOLS)[start : start + count] if start < len(SYMBOLS) else SYMBOLS[:count]


def with_hints(number: str, letters: str) -> str:
    return "".join(letter + digit for letter, digit in zip(letters, number, strict=False))


def _pairs(first: range, second: range) -> Iterator[tuple[int, int]]:
    while True:
        yield from ((i, j) for i in first for j in second)


def _without_carry(random: Random, i: int, j: int) -> tuple[int, int]:
    while True:
        a, b = random.randint(10 ** (i - 1), 10**i - 1), random.randint(10 ** (j - 1), 10**j - 1)
        if all(int(x) + int(y) < 10 for x, y in zip(str(a)[::-1], str(b)[::-1], strict=False)):
            return a, b


def _result(a: int, b: int, operation: Operator) -> int:
    return {"+": a + b, "-": a - b, "x": a * b}[operation]


def _interleaved(first: str, second: str) -> str:
    turns = "".join(a + b for a, b in zip(first, second, strict=False))
    return turns + first[len(second) :] + second[len(first) :]


def _spaced(random: Random, line: str, p: float) -> str:
    if not p:
        return line
    spaced = ""
    for character in line:
        chance = p
        while random.random() < chance:
            chance *= 0.1
            spaced += " "
        spaced += character
    return spaced


def _one_hot(length: int, place: int | None) -> str:
    return "".join("1" if index == place else "0" for index in range(length))
