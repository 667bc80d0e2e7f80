"""Clean and corrupted texts from a file with tagged answers."""

import json
from pathlib import Path

import pytest
import torch

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE
from tasks.paired_text import PairedText

ROWS = [
    {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "1 + 4 = <predict>5</predict>", "split": "train"},
    {"clean": "5 + 1 = <predict>6</predict>", "corrupted": "1 + 1 = <predict>2</predict>", "split": "train"},
    {"clean": "2 + 2 = <predict>4 of 4</predict>", "corrupted": "2 + 4 = <predict>6 of 6</predict>", "split": "test"},
]


def write(path: Path, rows: list[dict], **changes: str) -> str:
    """The last row with changed fields."""
    rows = [*rows[:-1], rows[-1] | changes]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_rows(tmp_path: Path) -> None:
    task = PairedText(path=write(tmp_path / "rows.jsonl", ROWS))
    dataset = task.build()
    assert dataset.manifest["counts"] == {"train": 2, "test": 1}
    assert (task.text_length, task.num_answer_tokens, task.num_answers) == (6, 3, 3)
    tokenizer = task._tokenizer()
    test = dataset.evaluation["test"]
    clean, corrupted = test.tokens[0].chunk(2)
    assert tokenizer.decode(clean.tolist()) == "2 + 2 = 4 of" and tokenizer.decode(corrupted.tolist()) == "2 + 4 = 6 of"
    assert test.positions.tolist() == [[3, 4, 5]]
    assert tokenizer.decode(test.targets[0].tolist()) == " 4 of 4"
    assert dataset.train.targets[:, 1:].eq(IGNORE).all() and dataset.train.positions.tolist() == [[3, 3, 3]] * 2
    assert tokenizer.decode(dataset.train.tokens[0].tolist(), skip_special_tokens=False).count("<pad>") == 4


def test_objects_over_several_lines(tmp_path: Path) -> None:
    plain, pretty = PairedText(path=write(tmp_path / "rows.jsonl", ROWS)), tmp_path / "pretty.jsonl"
    pretty.write_text("\n\n".join(json.dumps(row, indent=4) for row in ROWS), encoding="utf-8")
    assert PairedText(path=str(pretty)).build().manifest["sha256"] == plain.build().manifest["sha256"]


def test_without_splits_rows_are_held_out_by_hash(tmp_path: Path) -> None:
    rows = [
        {"clean": f"{n} = <predict>{n}</predict>", "corrupted": f"{n} = <predict>1</predict>"} for n in range(10, 90)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    counts = PairedText(path=path, validation_fraction=0.3).build().manifest["counts"]
    assert sum(counts.values()) == 80 and 10 < counts["validation"] < 40
    same = PairedText(path=path, validation_fraction=0).build()
    assert torch.equal(same.train.tokens, same.evaluation["validation"].tokens)


def test_a_split_alone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS, split="train")
    with pytest.raises(ConfigError, match="no row is of split any other than train"):
        PairedText(path=path).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": "2 + 2 = 4"}, "line 3: field 'clean' has no single <predict>answer</predict>"),
        ({"corrupted": "</predict>2 + 2 =<predict> 4"}, "line 3: field 'corrupted' has no single"),
        ({"clean": "<predict>4</predict>"}, "line 3: field 'clean' has nothing before or between its tags"),
        ({"clean": "2 = <predict>4</predict> again"}, "line 3: field 'clean' goes on after </predict>"),
        ({"corrupted": "2 + 4 = <predict>6</predict>"}, "line 3: the clean text has 7 tokens, the corrupted one 5"),
        ({"corrupted": ""}, "line 3: field 'corrupted' is not a text"),
        ({"split": "../test"}, "line 3: split: '../test' cannot name a file"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS, **changes)
    with pytest.raises(ConfigError) as raised:
        PairedText(path=path).build()
    assert f"rows.jsonl {message}" in str(raised.value) and "\n" not in str(raised.value)


def test_splits_everywhere_or_nowhere(tmp_path: Path) -> None:
    rows = [*ROWS, {key: ROWS[0][key] for key in ("clean", "corrupted")}]
    with pytest.raises(ConfigError, match="line 4: some rows have the key 'split' and some have not"):
        PairedText(path=write(tmp_path / "rows.jsonl", rows)).build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no JSON object"),
        ('{"clean": 1,\n\n}', "line 3 is not JSON"),
        ('{"a": 1}\n[2]', "line 2 is not an object"),
        ('{"a": 1}', "line 1: has no field 'clean'"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        PairedText.from_dict({"path": str(tmp_path / "rows.jsonl")}).build()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        PairedText.from_dict({"path": str(tmp_path / "nothing.jsonl")})
