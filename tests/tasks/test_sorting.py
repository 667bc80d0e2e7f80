"""Rows of the sorting task."""

from collections import Counter

import numpy as np
import pytest
import torch
from problem_lines import lines_of, prompts_and_answers

from groundswell.config import ConfigError
from tasks.arithmetic_vocabulary import SYMBOLS
from tasks.sorting import Sorting, ascending


def rows(task: Sorting, count: int = 600) -> list[str]:
    return lines_of(task.train_rows(np.arange(count)), "sort")


def read(line: str, reverse: str = "all") -> tuple[list[tuple[str, str]], list[str]]:
    """Symbols with the digits of their numbers, most significant first; symbols of the answer."""
    prompt, _, answer = line.partition("=")
    pairs = [entry.split(":") for entry in prompt.split(",")]
    return [(name, digits[::-1] if reverse == "all" else digits) for name, digits in pairs], answer.split(",")


@pytest.mark.parametrize("reverse", ["all", "none"])
def test_rows_are_sorted(reverse: str) -> None:
    task = Sorting(max_digits=3, max_numbers=6, reverse=reverse)
    alphabet = [symbol for symbol in SYMBOLS if symbol not in ",:D"]
    kinds, most, starts = Counter(), {}, set()
    for line in rows(task, 18 * 40):
        pairs, answer = read(line, reverse)
        assert answer == [name for name, _ in sorted(pairs, key=lambda pair: int(pair[1]))]
        assert all(digits[0] != "0" for _, digits in pairs)
        start = alphabet.index(pairs[0][0])
        assert [name for name, _ in pairs] == [alphabet[(start + place) % 99] for place in range(len(pairs))]
        kinds[len(pairs)] += 1
        most[len(pairs)] = max(most.get(len(pairs), 0), *(len(digits) for _, digits in pairs))
        starts.add(start)
    assert kinds == dict.fromkeys(range(1, 7), 3 * 40)
    assert set(most.values()) == {3} and len(starts) == 99


def test_counts_of_digits_are_uniform() -> None:
    cell = lines_of(Sorting().cell_rows(4, 5, 2_000, seed=0), "sort")
    lengths = np.bincount([len(digits) for line in cell for _, digits in read(line)[0]])
    assert lengths[0] == 0 and len(lengths) == 5
    assert ((lengths[1:] - 2_500) ** 2 / 2_500).sum() < 21.1  # 3 degrees of freedom, p = 0.0001


def test_ties_keep_their_order_and_long_numbers_are_compared_whole() -> None:
    random = np.random.RandomState(0)
    digits = random.randint(0, 2, size=(50, 9, 40)).astype(np.uint8)
    digits[:, 3], digits[:, 5] = digits[:, 7], digits[:, 1]
    digits[:, 2, :20] = digits[:, 4, :20]
    exists = np.arange(9) < random.randint(1, 10, size=(50, 1))
    order = ascending(digits, exists)
    for row, places, there in zip(digits, order, exists, strict=True):
        numbers = [int("".join(map(str, number[::-1]))) for number in row]
        right = sorted(np.flatnonzero(there).tolist(), key=numbers.__getitem__)
        assert places[: len(right)].tolist() == right


def test_alphabets() -> None:
    plain = {name for line in rows(Sorting(max_digits=1, max_numbers=3), 3_000) for name in line.split("=")[0][0]}
    assert plain == set(SYMBOLS) - set(",:D")
    firsts = Counter(line[0] for line in rows(Sorting(max_digits=1, max_numbers=3, alphabet="original"), 20_600))
    assert set(firsts) == set(SYMBOLS)
    assert firsts["A"] == pytest.approx(400, abs=80)  # drawn as start 0 and as start 102
    assert firsts["B"] == pytest.approx(200, abs=60)


def test_index_hints() -> None:
    plain = Sorting(max_digits=3, max_numbers=3)
    for line in rows(plain.with_overrides({"index_hints": True}), 200):
        prompt = line.partition("=")[0]
        numbers = [entry[2:] for entry in prompt.split(",")]
        letters = max((number[::2] for number in numbers), key=len)
        assert all(letters.startswith(number[::2]) and number[1::2].isdigit() for number in numbers)


def test_layout_and_cells() -> None:
    task = Sorting(max_digits=4, max_numbers=5)
    split = task.build().train.select(torch.arange(300))
    assert split.tokens.shape == (300, task.max_length) == (300, 5 * 7 + 10 - 1)
    assert split.targets.shape == (300, 10)
    assert [p + a for p, a in prompts_and_answers(split, "sort")] == rows(task, 300)
    cell = task.cell(30, 12, 50, seed=3)
    lines = [p + a for p, a in prompts_and_answers(cell, "sort")]
    assert {len(read(line)[0]) for line in lines} == {12}
    assert max(len(digits) for line in lines for _, digits in read(line)[0]) == 30
    assert cell.targets.shape[1] == task.cell_shape(30, 12)[1] == 24
    assert cell.positions[:, 0].max() < task.cell_shape(30, 12)[0]
    assert torch.equal(cell.tokens, Sorting(seed=9).cell(30, 12, 50, seed=3).tokens)


def test_published_sizes() -> None:
    assert Sorting().row_shape()[0] == 150  # sort-10x10 as published
    assert (Sorting().vocab_size, Sorting().trained_lengths) == (118, (10, 10))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_numbers: Input should be less than or equal to 102"):
        Sorting.from_dict({"max_numbers": 103})
    with pytest.raises(ConfigError, match="max_numbers:? 100 is more than the 99 symbols"):
        Sorting.from_dict({"max_numbers": 100})
    assert Sorting(max_numbers=100, alphabet="original").row_shape()
    with pytest.raises(ConfigError, match="there are 99 symbols"):
        Sorting().cell(3, 100, 5, 0)
