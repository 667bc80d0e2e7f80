import json
from pathlib import Path
from typing import Any

import pytest
import torch

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE
from tasks.composition import Composition
from tasks.folder import Folder, read_folder, write_folder


def row(prompt: str, answer: str, kind: str | None = None) -> dict[str, str]:
    return {"input_text": prompt, "target_text": prompt + answer} | ({"type": kind} if kind else {})


GOOD: dict[str, Any] = {
    "vocab.json": ["<x>", "<y>", "<a>", "</a>"],
    "train.json": [row("<x>", "<y></a>"), row("<x><y>", "<x></a>")],
    "test.json": [row("<y>", "<y></a>", "iid"), row("<x><x>", "<y></a>", "ood"), row("<y><y>", "<x></a>", "iid")],
}


def write(folder: Path, **changes: Any) -> Path:
    """GOOD with files replaced (text as it is, None: left out)."""
    for name, content in (GOOD | {f"{key}.json": value for key, value in changes.items()}).items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_rows_become_padded_tensors(tmp_path: Path) -> None:
    dataset = read_folder(write(tmp_path))
    x, y, _, stop, pad = range(5)
    assert dataset.vocabulary == ("<x>", "<y>", "<a>", "</a>", "<pad>")
    assert dataset.train.tokens.tolist() == [[x, y, pad], [x, y, x]]
    assert dataset.train.positions.tolist() == [[0, 1], [1, 2]]
    assert dataset.train.targets.tolist() == [[y, stop], [x, stop]]
    assert list(dataset.evaluation) == ["iid", "ood"]
    assert dataset.evaluation["iid"].tokens.tolist() == [[y, y, pad], [y, y, x]]
    assert dataset.answer.columns == slice(0, 1)


def test_without_stop_and_with_answers_of_several_lengths(tmp_path: Path) -> None:
    long = [row("<x>", "<y><y></a>"), row("<x><y>", "<x></a>")]
    dataset = read_folder(write(tmp_path, train=long), predict_stop=False)
    assert dataset.train.tokens.tolist() == [[0, 1], [0, 1]]
    assert dataset.train.positions.tolist() == [[0, 1], [1, 0]]
    assert dataset.train.targets.tolist() == [[1, 1], [0, IGNORE]]
    assert dataset.evaluation["ood"].targets.tolist() == [[1, IGNORE]]
    write_folder(dataset, tmp_path / "again")
    again = read_folder(tmp_path / "again", predict_stop=False)
    assert again.manifest["sha256"] == dataset.manifest["sha256"]


def test_answers_in_delimiters(tmp_path: Path) -> None:
    train, test = [row("<x>", "<a><y></a>")], [row("<y>", "<a><x></a>")]
    dataset = read_folder(write(tmp_path, train=train, test=test))
    assert dataset.answer.columns == slice(1, 2)
    assert list(dataset.evaluation) == ["test"]  # rows without a type


def test_validation_rows_that_are_no_test_rows_are_a_split(tmp_path: Path) -> None:
    write(tmp_path, valid=GOOD["test.json"][:2])
    assert "valid" not in read_folder(tmp_path).evaluation
    write(tmp_path, valid=[row("<y><x>", "<y></a>")])
    assert read_folder(tmp_path).evaluation["valid"].tokens.tolist() == [[1, 0, 1]]


def test_published_fields_are_written(tmp_path: Path) -> None:
    dataset = Composition(num_entities=20, num_relations=5, out_degree=5, phi=2, iid_fraction=0.1).build()
    write_folder(dataset, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.json", "train.json", "valid.json", "vocab.json"]
    files = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert "<pad>" not in files["vocab"] and len(files["vocab"]) == 20 + 5 + 6
    assert files["valid"] == [item for item in files["test"] if item["type"] == "test_inferred_ood"]
    assert list(dict.fromkeys(item["type"] for item in files["test"])) == list(dataset.evaluation)
    for item in files["train"]:
        answer = item["target_text"].removeprefix(item["input_text"])
        assert answer.startswith("<e_") and answer.endswith("></a>") and answer.count("<") == 2
        assert item["type"] in ("id_atomic", "ood_atomic", "train_inferred")


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    task = Folder(path=write(tmp_path))
    assert len(task.build().train) == 2
    write(tmp_path, train=[*GOOD["train.json"], row("<y><x>", "<y></a>")])
    assert len(task.build().train) == 3
    assert torch.equal(task.build().train.tokens[:2], torch.tensor([[0, 1, 4], [0, 1, 0]]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": None}, r"train\.json: No such file.*task\.path must be a folder with train\.json"),
        ({"vocab": None}, r"vocab\.json: No such file"),
        ({"test": '[{"input'}, r"test\.json: not JSON .*write the file again"),
        ({"train": {"rows": []}}, r"train\.json: must be a list of objects"),
        ({"train": []}, r"train\.json: has no rows"),
        ({"train": [{"input_text": "<x>"}]}, r"train\.json: row 0 lacks the text fields"),
        ({"train": [row("<x>", "")]}, r"train\.json: row 0: target_text must be input_text"),
        ({"test": [{"input_text": "<x>", "target_text": "<y></a>"}]}, r"test\.json: row 0: target_text must be"),
        ({"test": [row("<x>", "<z></a>")]}, r"test\.json: token '<z>' .*not in the vocabulary; add it"),
        ({"test": [row("<x>", " <y></a>")]}, r"test\.json: '<x> <y></a>' is not a row of"),
        ({"vocab": ["<x>", "<x>"]}, r"vocab\.json: token '<x>' occurs twice"),
        ({"vocab": ["x"]}, r"vocab\.json: 'x' is not a token"),
        ({"vocab": {"<x>": 0}}, r"vocab\.json: must be a list of token strings"),
        ({"train": [row("<x>", "<a><y></a>")]}, r"some answers begin with <a> and some do not"),
    ],
)
def test_a_malformed_folder_is_refused_at_validation(changes: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        Folder.from_dict({"path": str(tmp_path)})


def test_an_answer_that_is_only_the_stop_needs_the_stop(tmp_path: Path) -> None:
    write(tmp_path, train=[row("<x>", "</a>")])
    assert read_folder(tmp_path).train.targets[:, 0].tolist() == [3]
    with pytest.raises(ConfigError, match=r"train\.json: row 0 has no answer but </a>; .*task\.predict_stop=true"):
        Folder.from_dict({"path": str(tmp_path), "predict_stop": False})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_folder(write(tmp_path))
    before = (tmp_path / "train.json").read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(dataset, tmp_path)
    assert (tmp_path / "train.json").read_text() == before
    assert not list(tmp_path.glob(".*"))
