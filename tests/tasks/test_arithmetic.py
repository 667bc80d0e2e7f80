"""Rows of the arithmetic task: right results, the format of each option, distributions, cells."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from problem_lines import lines_of, prompts_and_answers

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Examples
from tasks import arithmetic_examples
from tasks.arithmetic import Arithmetic
from tasks.arithmetic_vocabulary import EOS, EQUALS, PAD, SYMBOLS

RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}


def rows(task: Arithmetic, count: int = 600) -> list[str]:
    return lines_of(task.train_rows(np.arange(count)), task.vocabulary)


def read(line: str, reverse: str = "all") -> tuple[int, str, int, int]:
    """First operand, operator, second operand, result."""
    first, operator, second, result = re.fullmatch(r"(\d+)([-+x])(\d+)=(\d+-|-?\d+)", line).groups()
    order = {"all": (-1, -1), "answer": (1, -1), "none": (1, 1)}[reverse]
    return int(first[:: order[0]]), operator, int(second[:: order[0]]), int(result[:: order[1]])


@pytest.mark.parametrize("reverse", ["all", "answer", "none"])
@pytest.mark.parametrize("operation", ["addition", "subtraction", "mixed", "multiplication"])
def test_results_are_right(operation: str, reverse: str) -> None:
    task = Arithmetic(operation=operation, reverse=reverse, max_first=5, max_second=7)
    lines = rows(task)
    operators = Counter()
    for line in lines:
        first, operator, second, result = read(line, reverse)
        assert RESULT[operator](first, second) == result, line
        assert first > 0 and second > 0
        operators[operator] += 1
        numbers = re.findall(r"\d+", line)
        leading = [number[-1] if reversed_ else number[0] for number, reversed_ in zip(
            numbers, [reverse == "all", reverse == "all", reverse != "none"], strict=True)]  # fmt: skip
        assert all(digit != "0" for digit, number in zip(leading, numbers, strict=True) if len(number) > 1), line
    expected = {"addition": "+", "subtraction": "-", "mixed": "+-", "multiplication": "x"}[operation]
    assert set(operators) == set(expected)
    if operation == "mixed":
        assert abs(operators["+"] - operators["-"]) <= 2 * 35


def test_every_pair_of_lengths_equally_often() -> None:
    task = Arithmetic(max_first=4, max_second=3, min_second=2)
    counts = Counter(tuple(map(len, re.findall(r"\d+", line)[:2])) for line in rows(task, 8 * 25))
    assert counts == {(i, j): 25 for i in range(1, 5) for j in (2, 3)}


def test_a_row_depends_on_seed_and_number_alone() -> None:
    task = Arithmetic(max_first=6, max_second=6, operation="mixed", space_probability=0.2)
    whole = task.build().train.select(torch.arange(500))
    some = task.build().train.select(torch.tensor([499, 3, 3, 77]))
    for name in ("tokens", "positions", "targets"):
        assert torch.equal(getattr(whole, name)[[499, 3, 3, 77]], getattr(some, name))
    other = task.with_overrides({"seed": 1}).build().train.select(torch.arange(500))
    assert not torch.equal(whole.tokens, other.tokens)


@pytest.mark.parametrize(
    "rows",
    [
        [*range(3, 40)],
        [*range(30, 47), *range(3, 20), *range(41, 50)],
        [*range(40, 50), *range(10)],
        [5],
        [7, 3, 49, 3],
        [*range(20)] * 3,
    ],
    ids=["one run", "three runs", "around the end", "one row", "scattered", "again"],
)
def test_blocks_and_pieces_give_the_same_rows(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    task = Arithmetic(max_first=3, max_second=3, num_examples=50)
    whole = task.to_train_split(task.train_rows(np.arange(50)))
    for settings in ({}, {"BLOCK": 8, "KEPT_BLOCKS": 1}, {"PIECE": 7}):
        for name, value in settings.items():
            monkeypatch.setattr(arithmetic_examples, name, value)
        train = task.build().train
        for _ in range(2):
            split = train.select(torch.tensor(rows))
            for name in ("tokens", "positions", "targets"):
                assert torch.equal(getattr(split, name), getattr(whole, name)[rows])


def test_neighbours_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(arithmetic_examples, "BLOCK", 512)
    train = arithmetic_examples.MadeExamples(
        10_000, lambda rows: made.append(rows) or Arithmetic().cell(1, 1, len(rows), 0)
    )
    for step in range(20):
        starts = (100, 5_000)  # two runs of a pack
        train.select(torch.cat([torch.arange(start + 64 * step, start + 64 * (step + 1)) for start in starts]))
    assert len(made) == 3 + 4 and sum(map(len, made)) == 7 * arithmetic_examples.BLOCK


def test_layout_of_training_examples() -> None:
    task = Arithmetic(max_first=4, max_second=4, num_examples=1_000)
    train = task.build().train
    assert isinstance(train, Examples) and len(train) == 1_000
    split = train.select(torch.arange(200))
    assert split.tokens.shape == (200, task.max_length) == (200, 4 + 1 + 4 + 1 + 5)
    assert split.positions.shape == split.targets.shape == (200, task.num_answers) == (200, 6)
    assert (split.tokens.gather(1, split.positions[:, :1]) == EQUALS).all()
    lines = lines_of(task.train_rows(np.arange(200)))
    for line, tokens, targets, (prompt, answer) in zip(
        lines, split.tokens, split.targets, prompts_and_answers(split), strict=True
    ):
        assert prompt + answer == line
        counted = targets[targets != IGNORE]
        assert len(counted) == len(answer) + 1 and counted[-1] == EOS
        assert (targets[len(counted) :] == IGNORE).all()
        assert (tokens[len(line) + 1 :] == PAD).all()


def test_loss_on_all_tokens() -> None:
    answer = Arithmetic(max_first=3, max_second=3, space_probability=0.3)
    task = answer.with_overrides({"loss_on": "all"})
    split = task.build().train.select(torch.arange(100))
    assert split.targets.shape == (100, task.max_length) == (100, task.num_answers)
    following = torch.cat([split.tokens[:, 1:], torch.zeros(100, 1, dtype=torch.int64)], 1)
    longest = (split.tokens != PAD).sum(1) == task.max_length
    assert torch.equal(split.targets[~longest], torch.where(following == PAD, IGNORE, following)[~longest])
    tests = task.build().evaluation["test"]
    assert torch.equal(tests.targets, answer.build().evaluation["test"].targets)


def test_zero_padding_and_order() -> None:
    padded = rows(Arithmetic(max_first=3, max_second=2, prepend_zeros=2))
    for line in padded:
        first, second, result = re.findall(r"\d+", line)
        assert first.endswith("00") and second.endswith("00") and result.endswith("000")
        assert len(first) <= 5 and int(first[::-1]) + int(second[::-1]) == int(result[::-1])
    kept = rows(Arithmetic(max_first=4, max_second=2, keep_places=True, reverse="none"))
    assert {tuple(map(len, re.findall(r"\d+", line)[:2])) for line in kept} == {(4, 2)}
    assert all(RESULT["+"](*map(int, re.findall(r"\d+", line)[:2])) == int(line.split("=")[1]) for line in kept)


def test_zero_and_no_carry() -> None:
    with_zero = rows(Arithmetic(max_first=2, max_second=2, keep_zero=True), 2_000)
    single = [number for line in with_zero for number in re.findall(r"\d+", line)[:2] if len(number) == 1]
    assert abs(single.count("0") / len(single) - 0.1) < 0.03
    for line in rows(Arithmetic(max_first=3, max_second=4, no_carry=True)):
        first, second, result = re.findall(r"\d+", line)
        assert all(int(x) + int(y) < 10 for x, y in zip(first, second, strict=False))
        assert int(first[::-1]) + int(second[::-1]) == int(result[::-1])


@pytest.mark.parametrize("reverse", ["all", "none"])
def test_interleaved(reverse: str) -> None:
    options = {"max_first": 3, "max_second": 5, "reverse": reverse}
    plain, interleaved = (rows(Arithmetic(**options, interleave=flag)) for flag in (False, True))
    for line, other in zip(plain, interleaved, strict=True):
        first, second, result = re.findall(r"\d+", line)
        turns = "".join(a + b for a, b in zip(first, second, strict=False))
        assert other == f"{turns}{first[len(second) :]}{second[len(first) :]}={result}"


@pytest.mark.parametrize("reverse", ["all", "answer"])
def test_index_hints(reverse: str) -> None:
    options = {"operation": "subtraction", "max_first": 4, "max_second": 3, "vocabulary": "index", "reverse": reverse}
    plain, hinted = (rows(Arithmetic(**options, index_hints=flag)) for flag in (False, True))
    starts = set()
    for line, other in zip(plain, hinted, strict=True):
        numbers = re.findall(r"\d+", line)
        start = SYMBOLS.index(other[0])
        letters = (SYMBOLS + SYMBOLS)[start : start + 10]
        first, second, result = ("".join(map("".join, zip(letters, number, strict=False))) for number in numbers)
        assert other == f"{first}-{second}={result}{'-' if line.endswith('-') else ''}"
        starts.add(start)
    assert len(starts) > 90


def test_spaces_are_padding() -> None:
    options = {"max_first": 4, "max_second": 4}
    p = 0.3
    plain, spaced = (rows(Arithmetic(**options, space_probability=q), 3_000) for q in (0.0, p))
    assert [line.replace(" ", "") for line in spaced] == plain
    characters = sum(map(len, plain))
    assert sum(line.count(" ") for line in spaced) / characters == pytest.approx(p * (1 + 0.1 * p), rel=0.05)
    before = Counter(len(spaces) for line in spaced for spaces in re.findall(r"( *)[^ ]", line))
    assert before[2] / characters == pytest.approx(p * 0.1 * p, rel=0.2)
    task = Arithmetic(**options, space_probability=p)
    assert (task.train_rows(np.arange(3_000)).tokens[:, -1] == PAD).all()  # nothing was cut
    assert PAD not in task.cell(3, 3, 50, 0).tokens[:, :7]


def test_uniform_numbers() -> None:
    lines = rows(Arithmetic(sampling="numbers", max_first=2, max_second=3), 20_000)
    firsts = np.array([int(re.findall(r"\d+", line)[0][::-1]) for line in lines])
    counts = np.bincount(firsts, minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 162  # 99 degrees of freedom, p = 0.0001
    assert all(RESULT["+"](*(read(line)[::2])) == read(line)[3] for line in lines[:500])


def test_evaluation_splits() -> None:
    task = Arithmetic(max_first=3, max_second=3, num_examples=100, num_test=40, test_lengths=(1, 3, 6))
    dataset = task.build()
    assert list(dataset.evaluation) == ["test", "length_1", "length_3", "length_6"]
    assert {split.tokens.shape for split in dataset.evaluation.values()} == {(40, 6 + 1 + 6 + 1 + 7)}
    for length in (1, 3, 6):
        for prompt, answer in prompts_and_answers(dataset.evaluation[f"length_{length}"]):
            first, _, second, result = read(prompt + answer)
            assert first + second == result
            assert tuple(map(len, re.findall(r"\d+", prompt))) == (length, length)
    held_out = lines_of(task.train_rows(np.arange(100, 140)))
    assert [prompt + answer for prompt, answer in prompts_and_answers(dataset.evaluation["test"])] == held_out
    assert dataset.manifest["counts"] == {"train": 100, "test": 40, "length_1": 40, "length_3": 40, "length_6": 40}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"operation": "multiplication"},
        {"operation": "subtraction"},
        {"operation": "mixed"},
        {"index_hints": True, "vocabulary": "index"},
        {"interleave": True},
        {"prepend_zeros": 2},
        {"keep_places": True, "max_first": 5, "max_second": 2},
        {"no_carry": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("first, second", [(1, 1), (3, 8), (8, 3)])
def test_cells(options: dict, first: int, second: int) -> None:
    task = Arithmetic(**options)
    split = task.cell(first, second, 300, seed=4)
    prompt, answer = task.cell_shape(first, second)
    assert (split.positions[:, 0] == prompt - 1).all()
    width = split.targets.shape[1]  # that of the longest answer there is, which needs luck when lengths differ
    assert width <= answer
    assert split.tokens.shape == (300, prompt + width - 1)
    assert (split.targets[:, -1] != IGNORE).any()
    if first == second or options.get("operation") == "multiplication":
        assert width == answer
    plain = [len(re.sub("[^0-9]", "", text)) for text, _ in prompts_and_answers(split, task.vocabulary)]
    if not (options.get("keep_places") or options.get("prepend_zeros")):
        assert set(plain) == {first + second}


def test_a_cell_is_seeded_and_belongs_to_the_problem_alone() -> None:
    task = Arithmetic(max_first=3, max_second=3)
    cell = task.cell(4, 6, 20, seed=1)
    other = Arithmetic(max_first=9, max_second=9, seed=5, num_test=3)
    assert torch.equal(cell.tokens, other.cell(4, 6, 20, seed=1).tokens)
    assert torch.equal(cell.tokens[:7], task.cell(4, 6, 7, seed=1).tokens)
    assert not torch.equal(cell.tokens, task.cell(4, 6, 20, seed=2).tokens)
    assert not torch.equal(cell.tokens[:, :4], task.cell(4, 5, 20, seed=1).tokens[:, :4])


@pytest.mark.parametrize("operation", ["addition", "multiplication"])
def test_long_operands(operation: str) -> None:
    split = Arithmetic(operation=operation).cell(160, 120, 5, seed=0)
    for prompt, answer in prompts_and_answers(split):
        first, operator, second, result = read(prompt + answer)
        assert RESULT[operator](first, second) == result
        assert (len(str(first)), len(str(second))) == (160, 120)


def test_published_sizes() -> None:
    assert Arithmetic().row_shape()[0] == 64  # addition-20 as published
    assert Arithmetic(operation="multiplication", max_first=15, max_second=15).row_shape()[0] == 63
    assert Arithmetic().trained_lengths == (20, 20)
    assert (Arithmetic().vocab_size, Arithmetic(vocabulary="index").vocab_size) == (19, 121)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_first": 0}, "max_first: Input should be greater than or equal to 1"),
        ({"min_first": 5, "max_first": 3}, r"min_first:? 5 is more than max_first 3"),
        ({"index_hints": True}, "index_hints:? need letters; set task.vocabulary=index"),
        ({"index_hints": True, "vocabulary": "index", "max_first": 102}, "102 letters"),
        ({"index_hints": True, "vocabulary": "index", "interleave": True}, "cannot be combined with interleave"),
        ({"operation": "mixed", "interleave": True}, "interleave:? writes no operator"),
        ({"operation": "subtraction", "no_carry": True}, "no_carry:? is about sums"),
        ({"sampling": "numbers", "no_carry": True}, "sampling:? numbers has neither"),
        ({"space_probability": 1.0}, "space_probability: Input should be less than 1"),
        ({"test_lengths": [0]}, "test_lengths:? must be different numbers of at least 1"),
        ({"test_lengths": [3, 3]}, "test_lengths:? must be different numbers"),
        ({"vocabulary": "sort"}, "vocabulary: Input should be 'pad' or 'index'"),
    ],
)
def test_impossible_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Arithmetic.from_dict(fields)


def test_impossible_cells_are_refused() -> None:
    with pytest.raises(ConfigError, match="no numbers of 0 and 3 digits"):
        Arithmetic().cell(0, 3, 5, 0)
    with pytest.raises(ConfigError, match="102 letters, but 103 digits"):
        Arithmetic(index_hints=True, vocabulary="index").cell_shape(102, 5)
