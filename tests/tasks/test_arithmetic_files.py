"""Text and tokenised folders: written, read back, as a task; what wrong files say."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from problem_lines import lines_of, prompts_and_answers

from groundswell.config import ConfigError
from tasks import arithmetic_files
from tasks.arithmetic import Arithmetic
from tasks.arithmetic_files import (
    TOKENIZED,
    read_text,
    read_tokenized,
    shuffle_and_split,
    split_sizes,
    write_tokenized,
)
from tasks.arithmetic_folder import ArithmeticFolder
from tasks.arithmetic_text import main
from tasks.arithmetic_vocabulary import VOCABULARIES
from tasks.positional_or import PositionalOr
from tasks.sorting import Sorting

SUMS = ["2+1=3", "5+14=64", "4+242=642", "32+9=23", "12+58=601", "46+231=691"]
TASK = Arithmetic(max_first=3, max_second=3)


def write_lines(folder: Path, lines: list[str], name: str = "sums.txt") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "sums", SUMS)


@pytest.mark.parametrize("vocabulary, line", [("pad", "2 1+ 1=22"), ("index", "aβ+Ω1=a1"), ("sort", "A:1,ω:2=A,ω")])
def test_ids_of_text(tmp_path: Path, vocabulary: str, line: str) -> None:
    known = VOCABULARIES[vocabulary]
    rows = read_text(write_lines(tmp_path / "x", [line, "1=1"]), known)
    assert rows[0].tolist() == [*known.encode(line), 3]
    assert rows[1].tolist() == [5, 17, 5, 3, *[0] * (len(line) - 3)]


def test_files_in_order_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_lines(tmp_path / "x", SUMS[3:], "b.txt")
    (folder / "a.txt").write_bytes("\r\n".join(SUMS[:3]).encode())  # of another system, without a newline at the end
    whole = read_text(folder, VOCABULARIES["pad"])
    assert [VOCABULARIES["pad"].decode(row) for row in whole.tolist()] == SUMS
    monkeypatch.setattr(arithmetic_files, "READ_BYTES", 10)
    assert np.array_equal(read_text(folder, VOCABULARIES["pad"]), whole)


def test_the_split_rule() -> None:
    assert [split_sizes(40, 0.05), split_sizes(6, 0.05), split_sizes(100, 0.0), split_sizes(100, 0.01)] == [
        (38, 2), (0, 6), (0, 100), (99, 1),
    ]  # fmt: skip
    rows = np.arange(50, dtype=np.uint8)[:, None]
    first, again, other = (shuffle_and_split(rows, 0.1, seed) for seed in (0, 0, 1))
    assert np.array_equal(first["test"], again["test"]) and not np.array_equal(first["test"], other["test"])
    assert sorted([*first["train"][:, 0], *first["test"][:, 0]]) == list(range(50)) and len(first["test"]) == 5


def test_tokenised_and_read_back(tmp_path: Path, sums: Path) -> None:
    rows = read_text(sums, VOCABULARIES["pad"])
    for number, (train, test) in enumerate([(rows[:4], rows[4:]), (rows[:0], rows)]):
        target = write_tokenized(tmp_path / str(number), {"train": train, "test": test}, "pad")
        loaded = read_tokenized(target, VOCABULARIES["pad"])
        assert list(loaded) == ["train", "test"] and np.array_equal(loaded["test"], test)
        assert loaded["train"].tolist() == train.tolist()


def test_layout_of_the_tokenised_folder(tmp_path: Path, sums: Path) -> None:
    """The files and keys that `datasets.load_from_disk` needs (checked once against datasets 3.6)."""
    rows = np.tile(read_text(sums, VOCABULARIES["pad"]), (500, 1))
    target = write_tokenized(tmp_path, {"train": rows, "test": rows[:1]}, "pad")
    assert json.loads((target / "dataset_dict.json").read_text()) == {"splits": ["train", "test"]}
    state = json.loads((target / "train/state.json").read_text())
    assert state["_data_files"] == [{"filename": "data-00000-of-00001.arrow"}] and len(state["_fingerprint"]) == 16
    info = json.loads((target / "train/dataset_info.json").read_text())
    assert list(info["features"]) == ["input_ids"]
    with pa.memory_map(str(target / "train/data-00000-of-00001.arrow")) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    assert table.schema.field("input_ids").type == pa.list_(pa.int64())
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] == info["features"]
    assert table.column("input_ids").to_pylist() == rows.tolist()


def test_columns_of_other_types_and_widths(tmp_path: Path, sums: Path) -> None:
    """Rows that were not padded, int32, several files, and an empty split without a type."""
    target = write_tokenized(
        tmp_path, {"train": read_text(sums, VOCABULARIES["pad"]), "test": np.zeros((0, 1), "u1")}, "pad"
    )
    state = target / "train/state.json"
    lists = [[[5, 14, 5, 17, 6, 3]], [[9, 14, 5, 8, 17, 10, 8, 3]]]
    for number, rows in enumerate(lists):
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        with (
            pa.OSFile(str(state.parent / f"{number}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
    state.write_text(json.dumps({"_data_files": [{"filename": "0.arrow"}, {"filename": "1.arrow"}]}))
    loaded = read_tokenized(target, VOCABULARIES["pad"])
    assert loaded["train"].tolist() == [[5, 14, 5, 17, 6, 3, 0, 0], [9, 14, 5, 8, 17, 10, 8, 3]]
    assert len(loaded["test"]) == 0


# ---- as a task ----


def test_a_text_folder_as_a_task(sums: Path) -> None:
    task = ArithmeticFolder(path=sums, test_ratio=0.34, shuffle=False)
    dataset = task.build()
    train = dataset.train.select(torch.arange(len(dataset.train)))
    assert [p + a for p, a in prompts_and_answers(train)] == SUMS[:4]
    assert [p + a for p, a in prompts_and_answers(dataset.evaluation["test"])] == SUMS[4:]
    assert train.tokens.shape == (4, task.max_length) == (4, 10)
    assert train.targets.shape == (4, task.num_answers) == (4, 4)
    shuffled = ArithmeticFolder(path=sums, test_ratio=0.34).build()
    assert prompts_and_answers(shuffled.evaluation["test"]) != prompts_and_answers(dataset.evaluation["test"])


@pytest.mark.parametrize("form, place", [("auto", ""), ("tokenized", ""), ("auto", TOKENIZED)])
def test_a_tokenised_folder_as_a_task(sums: Path, form: str, place: str) -> None:
    rows = read_text(sums, VOCABULARIES["pad"])
    write_tokenized(sums, {"train": rows[1:], "test": rows[:1]}, "pad")
    dataset = ArithmeticFolder(path=sums / place, form=form).build()
    assert [p + a for p, a in prompts_and_answers(dataset.evaluation["test"])] == SUMS[:1]
    assert len(ArithmeticFolder(path=sums, form="text", test_ratio=0.5).build().train) == 3


def test_spaces_removed_and_all_tokens(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "x", ["2 + 1 = 3", " 1 2+ 1=22"])
    task = ArithmeticFolder(path=folder, test_ratio=0.5, shuffle=False)
    assert task.max_length == 10
    tight = task.with_overrides({"remove_spaces": True, "loss_on": "all"})
    assert tight.max_length == tight.num_answers == 7
    assert [p + a for p, a in prompts_and_answers(tight.build().evaluation["test"])] == ["12+1=22"]


def test_cells_come_from_a_named_task(sums: Path) -> None:
    task = ArithmeticFolder(path=sums, test_ratio=0.5, cells=TASK)
    assert torch.equal(task.cell(2, 5, 10, 0).tokens, TASK.cell(2, 5, 10, 0).tokens)
    assert task.trained_lengths == (3, 3) and task.cell_shape(2, 5) == TASK.cell_shape(2, 5)
    longer = task.with_overrides({"test_lengths": (2, 6)})
    evaluation = longer.build().evaluation
    assert list(evaluation) == ["test", "length_2", "length_6"]
    assert {split.tokens.shape[1] for split in evaluation.values()} == {longer.evaluation_length} == {21}
    assert (task.longest_number, longer.longest_test_number) == (3, 7)
    assert ArithmeticFolder.from_text(task.canonical_json()) == task
    with pytest.raises(ConfigError, match="test_lengths:? need problems of these lengths; set task.cells.class"):
        longer.with_overrides({"cells": None})
    with pytest.raises(ConfigError, match="task.cells: say which task"):
        task.with_overrides({"cells": None}).cell(2, 5, 10, 0)
    with pytest.raises(ConfigError, match="cells:? its vocabulary is sort"):
        task.with_overrides({"cells": Sorting()})


# ---- wrong files ----


@pytest.mark.parametrize(
    "line, message",
    [
        ("5+14", r"x.txt line 3: no '=' between prompt and answer; mend the line"),
        ("", r"x.txt line 3: no '='"),
        ("5+1=6=6", r"x.txt line 3: 2 '=' where one must be"),
        ("A:5,B:3=B,A", r"x.txt line 3: ',' is not in the vocabulary pad; set task.vocabulary=index, which has all"),
        ("D:5=D", r"set task.vocabulary=index"),
        ("5*1=6€", r"line 3: '\*' is not in the vocabulary pad; no vocabulary has all of it"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write_lines(tmp_path / "x", ["1+1=2", "1+2=3", line, "1+4=5"], "x.txt")
    with pytest.raises(ConfigError, match=message) as caught:
        ArithmeticFolder.from_dict({"path": str(folder), "test_ratio": 0.5})
    assert "\n" not in str(caught.value)


def test_wrong_folders_are_named(tmp_path: Path, sums: Path) -> None:
    def refused(message: str, **fields: object) -> None:
        with pytest.raises(ConfigError, match=message):
            ArithmeticFolder.from_dict({"path": str(sums), "test_ratio": 0.5, **fields})

    refused("no .txt file in", path=str(tmp_path / "none"))
    refused("has no training rows; set task.test_ratio higher", test_ratio=0.0)
    refused("no dataset_dict.json in .*; set task.form=text", form="tokenized")
    (sums / "broken.txt").write_bytes(b"\xff\xfe1+1=2\n")
    refused("broken.txt is not UTF-8")


def test_wrong_tokenised_folders_are_named(tmp_path: Path) -> None:
    def refused(number: int, rows: list[list[int]], message: str, written: str = "pad", read: str = "pad") -> None:
        target = write_tokenized(tmp_path / str(number), {"train": np.array(rows, dtype=np.uint8)}, written)
        with pytest.raises(ConfigError, match=message):
            read_tokenized(target, VOCABULARIES[read])

    refused(
        0, [[5, 14, 5, 17, 6, 3], [5, 57, 5, 17, 6, 3]], "has id 57, and the vocabulary pad ends at 18; set task.vocab"
    )
    refused(
        1,
        [[5, 14, 5, 17, 6, 3], [5, 14, 5, 16, 6, 3]],
        "has a row with 0 '=', a problem has one; mend it: 5 14 5 16 6 3",
    )
    refused(2, [[5, 14, 17, 17, 6, 3]], "has a row with 2 '='")
    refused(3, [[5, 14, 5, 17, 6, 6]], r"has a row with 0 \[EOS\]")
    refused(
        4, [[20, 16, 5, 17, 20, 3]], "was written in the vocabulary sort; set task.vocabulary=sort", "sort", "index"
    )
    refused(5, [[200, 16, 5, 17, 20, 3]], "has id 200.*tokenise it again")
    state = tmp_path / "1" / TOKENIZED / "train/state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../../secret.arrow"}]}))
    with pytest.raises(ConfigError, match="cannot name a file"):
        read_tokenized(tmp_path / "1" / TOKENIZED, VOCABULARIES["pad"])
    state.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_tokenized(tmp_path / "1" / TOKENIZED, VOCABULARIES["pad"])
    (tmp_path / "2" / TOKENIZED / "train/data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="write the folder again"):
        read_tokenized(tmp_path / "2" / TOKENIZED, VOCABULARIES["pad"])


# ---- the command ----


@pytest.mark.parametrize(
    "arguments, folder, file, task",
    [
        (
            ["--task.max_first", "3", "--task.max_second", "3"],
            "+_bucket_method_n_3_m_3_50_p_00_reverse_all",
            "+_n_3_m_3_examples_50.txt",
            TASK,
        ),
        (
            ["--task.operation=multiplication", "--task.reverse", "none", "--task.keep_zero"],
            "x_bucket_method_n_20_m_20_50_p_00_keep_0_for_len_1",
            "x_n_20_m_20_examples_50.txt",
            Arithmetic(operation="multiplication", reverse="none", keep_zero=True),
        ),
        (
            ["--task.index_hints", "--task.vocabulary", "index", "--task.space_probability", "0.3"],
            "+_bucket_method_n_20_m_20_50_p_03_reverse_all_with_index_hints_circular",
            "+_n_20_m_20_examples_50.txt",
            Arithmetic(index_hints=True, vocabulary="index", space_probability=0.3),
        ),
        (
            ["--task.sampling", "numbers", "--task.reverse", "answer", "--task.prepend_zeros", "2"],
            "+_n_20_m_20",
            "+_n_20_m_20_examples_50_diff_lens_prepend_2zeros_reverse_ans_seed_0.txt",
            Arithmetic(sampling="numbers", reverse="answer", prepend_zeros=2),
        ),
        (
            ["--task.class", "tasks.sorting.Sorting", "--task.max_digits", "3"],
            "sort_bucket_uniform_distribution_max_digits_n_3_max_length_m_10_50_p_00_reverse_all",
            "sort_maximum_number_of_digts_3_maximum_length_10_examples_50.txt",
            Sorting(max_digits=3),
        ),
    ],
    ids=["bucket", "multiplication", "hints and spaces", "plain", "sorting"],
)
def test_training_rows_are_written(
    tmp_path: Path, arguments: list[str], folder: str, file: str, task: Arithmetic
) -> None:
    assert main(["write", str(tmp_path), "--count", "50", "--tokenize", "--test-ratio", "0.1", *arguments]) == 0
    text = (tmp_path / folder / file).read_text(encoding="utf-8")
    assert text.splitlines() == lines_of(task.train_rows(np.arange(50)), task.characters.name)
    read = ArithmeticFolder(path=tmp_path / folder, vocabulary=task.characters.name).build()
    again = ArithmeticFolder(
        path=tmp_path / folder, vocabulary=task.characters.name, form="text", test_ratio=0.1, shuffle=False
    ).build()
    assert (len(read.train), len(read.evaluation["test"])) == (45, 5)
    assert read.manifest["sha256"] == again.manifest["sha256"]


def test_cells_and_all_of_positional_or_are_written(tmp_path: Path) -> None:
    assert main(["write", str(tmp_path), "--cell", "3", "5"]) == 0
    lines = (tmp_path / "+_n_3_m_5/+_n_3_m_5_examples_100_diff_lens_exact_seed_42.txt").read_text().splitlines()
    assert lines == lines_of(Arithmetic().cell_rows(3, 5, 100, 42))
    positional = ["--task.class", "tasks.positional_or.PositionalOr"]
    assert (
        main(
            [
                "write",
                str(tmp_path),
                *positional,
                "--task.max_first",
                "4",
                "--task.max_second",
                "4",
                "--task.test_fraction",
                "0.1",
            ]
        )
        == 0
    )
    written = tmp_path / "positional_or_n_4_m_4/positional_or_one_vec_zeros_n_4_m_4_examples_30.txt"
    task = PositionalOr(max_first=4, max_second=4, test_fraction=0.1)
    assert written.read_text().splitlines() == lines_of(task.enumerate_rows())
    assert main(["write", str(tmp_path), *positional, "--cell", "3", "5"]) == 0
    assert len((tmp_path / "n_3_m_5/positional_arithmetic_n_3_m_5.txt").read_text().splitlines()) == 3


def test_what_the_command_refuses(tmp_path: Path, sums: Path) -> None:
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(ConfigError, match=message):
            main(list(arguments))

    main(["write", str(tmp_path), "--count", "5"])
    refused("exists already; remove it", "write", str(tmp_path), "--count", "5")
    refused("'task' has no field 'operatio'", "write", str(tmp_path), "--task.operatio", "x")
    refused(
        "positional OR has 2870 problems",
        "write",
        str(tmp_path),
        "--count",
        "5",
        "--task.class",
        "tasks.positional_or.PositionalOr",
    )
    refused("count: must be at least 1", "write", str(tmp_path), "--count", "0")
    refused("only `groundswell arithmetic write` has a task", "tokenize", str(sums), "--task.seed", "1")
    refused("test_ratio: must be from 0 up to 1", "tokenize", str(sums), "--test-ratio", "1.5")
    assert main(["tokenize", str(sums), "--test-ratio", "0.5"]) == 0
    refused("exists already", "tokenize", str(sums))
