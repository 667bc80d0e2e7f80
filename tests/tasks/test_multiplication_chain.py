"""Products: every published line from its operands, operands that never meet in two splits."""

import math

import numpy as np
import pytest
from chain_data import published
from numpy.random import RandomState

from groundswell.config import ConfigError
from tasks.chain_symbols import row_keys, write_folder
from tasks.chain_text import read_lines
from tasks.multiplication_chain import MultiplicationChain

FILES = [f"{n}_by_{n}_mult/{name}.txt" for n in (4, 5) for name in ("train", "valid", "test_bigbench")]


def numbers(rows: np.ndarray, digits: int) -> list[tuple[int, int]]:
    return [tuple(int("".join(map(str, part[::-1]))) for part in np.split(row, [digits])) for row in rows]


def spoken(number: int, width: int) -> str:
    return " ".join(f"{number:0{width}d}"[::-1])


def line(first: int, second: int, digits: int) -> str:
    """The rule of the published files with Python's integers."""
    chain, total = [], 0
    for place in range(digits):
        partial = first * (second // 10**place % 10) * 10**place
        total += partial
        chain.append(spoken(partial, digits + 1 + place))
        if 0 < place < digits - 1:
            chain[-1] += f" ( {spoken(total, digits + 1 + place)} )"
    question = f"{spoken(first, digits)} * {spoken(second, digits)}"
    return f"{question}||{' + '.join(chain)} #### {spoken(first * second, 2 * digits)}"


def test_every_published_line() -> None:
    for path in published(*FILES):
        digits = int(path.parent.name[0])
        task = MultiplicationChain(digits=digits)
        examples = read_lines(path).examples
        inputs = np.stack([task._operands(example) for example in examples])
        assert task.lines(inputs) == path.read_text().splitlines() and len(examples) >= 1_000


@pytest.mark.parametrize("digits", [1, 2, 3, 4, 7, 11, 30])
def test_lines_of_any_size(digits: int) -> None:
    sizes = {"train_size": 30, "validation_size": 5, "test_size": 5}
    task = MultiplicationChain(digits=digits, **sizes, context=10_000)
    drawn = task.draw()
    for rows in drawn.values():
        assert task.lines(rows) == [line(*pair, digits) for pair in numbers(rows, digits)]
    example = task.texts("train")[0]
    symbols = (
        digits * (digits + 1) + math.comb(digits, 2) + digits - 1 + sum(digits + 3 + i for i in range(1, digits - 1))
    )
    assert len(example.chain.split()) == symbols
    widths = task.widths()
    assert widths.chain == symbols + 2 and widths.text == 2 * digits + 3 + symbols + 2 + 2 + 2 * digits + 2


@pytest.mark.parametrize(
    ("digits", "sizes"), [(1, (55, 7, 6)), (2, (7_500, 150, 150)), (3, (5_000, 300, 300)), (4, (5_000, 400, 300))]
)
def test_no_operands_in_two_splits(digits: int, sizes: tuple[int, int, int]) -> None:
    fields = dict(zip(("train_size", "validation_size", "test_size"), sizes, strict=True))
    task = MultiplicationChain(digits=digits, **fields)
    pairs = {name: numbers(rows, digits) for name, rows in task.draw().items()}
    assert [len(found) for found in pairs.values()] == list(sizes)
    assert len(set(pairs["train"])) == len(pairs["train"])
    seen: set[tuple[int, int]] = set()
    for found in pairs.values():
        unordered = {tuple(sorted(pair)) for pair in found}
        assert not seen & unordered
        seen |= unordered
    assert all(
        10 ** (digits - 1) <= number < 10**digits for found in pairs.values() for pair in found for number in pair
    )
    for name in ("validation", "test"):
        assert len({tuple(sorted(pair)) for pair in pairs[name]}) == len(pairs[name])


def test_operands_are_even() -> None:
    found = np.array(numbers(MultiplicationChain(train_size=20_000).draw()["train"], 4))
    for operand in found.T:
        counts, _ = np.histogram(operand, 9, (1_000, 10_000))
        assert ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum() < 30  # chi-square, 8 degrees: p = 0.0002


def test_operands_of_a_folder(tmp_path) -> None:
    written = MultiplicationChain(digits=2, train_size=10, validation_size=20, test_size=30, seed=5)
    paths = write_folder(written, tmp_path)
    assert sorted(path.name for path in paths) == ["test_bigbench.txt", "train.txt", "valid.txt"]
    assert read_lines(tmp_path / "train.txt").examples[0].line == written.lines(written.draw()["train"])[0]
    task = MultiplicationChain(digits=2, files=str(tmp_path), train_size=6_000, validation_size=15, test_size=100)
    drawn, held_out = task.draw(), written.draw()
    assert np.array_equal(drawn["validation"], held_out["validation"][:15])
    assert np.array_equal(drawn["test"], held_out["test"])
    keys = set(row_keys(drawn["train"], 10).tolist())
    for name in ("validation", "test"):
        for rows in (drawn[name], np.roll(drawn[name], 2, 1)):
            assert not keys & set(row_keys(rows, 10).tolist())
    (tmp_path / "test_bigbench.txt").unlink()
    drawn = task.draw()
    assert len(drawn["test"]) == 100 and np.array_equal(drawn["validation"], held_out["validation"][:15])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1 * 2 1||3 #### 4", "is not '1 1 * 2 1||2 2 0 + 0 1 1 0 #### 2 3 1 0'"),
        ("1 1 1 * 2 1 1||3 #### 4", "is not two numbers of 2 digits"),
        ("1 0 * 2 1||3 #### 4", "is not two numbers of 2 digits"),
        ("1 1 + 2 1||3 #### 4", "is not two numbers of 2 digits"),
    ],
)
def test_lines_that_are_no_products(text: str, message: str, tmp_path) -> None:
    (tmp_path / "valid.txt").write_text(f"{line(12, 34, 2)}\n{text}\n")
    task = MultiplicationChain(digits=2, files=str(tmp_path), train_size=10, validation_size=10, test_size=10)
    with pytest.raises(ConfigError, match="valid.txt line 2: ") as error:
        task.build()
    assert message in str(error.value)


def test_fields_that_cannot_work(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train_size: 100 .* of 81 pairs"):
        MultiplicationChain.from_dict({"digits": 1, "train_size": 100, "validation_size": 1, "test_size": 1})
    with pytest.raises(ConfigError, match="has none of valid.txt, test_bigbench.txt"):
        MultiplicationChain.from_dict({"files": str(tmp_path)})
    with pytest.raises(ConfigError, match="has 71 tokens, at most 70 are read"):
        MultiplicationChain(train_size=5, context=70).build()
    assert MultiplicationChain(train_size=5, context=70, form="none").build().train.tokens.shape[1] == 22


def test_keys_of_long_numbers() -> None:
    """Beyond 18 digits a key is no integer, and still tells rows apart."""
    rows = RandomState(0).randint(10, size=(50, 40))
    rows[1], rows[2] = rows[0], rows[0]
    rows[2, -1] = (rows[2, -1] + 1) % 10
    keys = row_keys(rows, 10)
    assert keys[0] == keys[1] != keys[2] and len(set(keys.tolist())) == 49
    assert len(set(row_keys(np.eye(40, dtype=np.int64), 10).tolist())) == 40
