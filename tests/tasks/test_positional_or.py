"""Rows of positional OR: all problems, each once."""

from collections import Counter

import pytest
import torch
from problem_lines import lines_of, prompts_and_answers

from groundswell.config import ConfigError
from tasks.positional_or import PositionalOr


def meaning(line: str) -> tuple[int, int, int]:
    """Checks a line; its lengths and the place of the one."""
    prompt, _, answer = line.partition("=")
    first, second = prompt.split("+")
    place = answer.index("1")
    assert answer == "".join("1" if index == place else "0" for index in range(max(len(first), len(second))))
    shorter, longer = sorted((first, second), key=len)
    if len(first) == len(second) and "1" in longer:
        shorter, longer = longer, shorter
    assert shorter.index("1") == place and shorter.count("1") == 1 and "1" not in longer
    return len(first), len(second), place


def test_every_problem_once() -> None:
    task = PositionalOr(max_first=6, max_second=4, test_fraction=0.1)
    lines = lines_of(task.enumerate_rows())
    expected = [(i, j, t) for i in range(1, 7) for j in range(1, 5) for t in range(min(i, j))]
    assert [meaning(line) for line in lines] == expected
    dataset = task.build()
    parts = [[p + a for p, a in prompts_and_answers(split)] for split in (dataset.train, dataset.evaluation["test"])]
    assert Counter(parts[0] + parts[1]) == Counter(lines)
    assert len(parts[1]) == round(0.1 * len(lines)) and len(parts[0]) == task.num_train
    assert parts[0] != sorted(parts[0], key=lines.index)


def test_the_published_size() -> None:
    task = PositionalOr()
    assert (task.num_problems, task.num_train) == (2870, 2841)
    assert PositionalOr(seed=1).build().manifest["sha256"] != task.build().manifest["sha256"]


def test_a_fair_coin() -> None:
    lines = lines_of(PositionalOr(max_first=40, max_second=40).enumerate_rows())
    equal = [line for line in lines if len(set(map(len, line.partition("=")[0].split("+")))) == 1]
    heads = sum("1" in line.split("+")[0] for line in equal)
    assert len(equal) == 820 and abs(heads - 410) < 60


def test_cells_have_different_problems() -> None:
    task = PositionalOr(max_first=5, max_second=5, test_lengths=(3, 9))
    for first, second, count, expected in [(4, 9, 100, 4), (30, 30, 7, 7), (1, 1, 5, 1)]:
        split = task.cell(first, second, count, seed=2)
        lines = [p + a for p, a in prompts_and_answers(split)]
        assert len(split) == expected == len({meaning(line) for line in lines})
        assert {meaning(line)[:2] for line in lines} == {(first, second)}
        prompt, answer = task.cell_shape(first, second)
        assert split.tokens.shape[1] == prompt + answer - 1 and split.targets.shape[1] == answer
    assert torch.equal(task.cell(9, 9, 4, 1).tokens, PositionalOr(seed=3).cell(9, 9, 4, 1).tokens)
    assert {name: len(split) for name, split in task.build().evaluation.items()} == {
        "test": 1,
        "length_3": 3,
        "length_9": 9,
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_first": 2, "min_first": 3}, "min_first:? 3 is more than max_first 2"),
        ({"max_first": 1, "max_second": 1}, "test_fraction:? 0.01 leaves nothing"),
    ],
)
def test_impossible_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PositionalOr.from_dict(fields)
