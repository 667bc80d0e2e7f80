"""Documents to rows, packed and padded; what is held out; what wrong files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_files import END, WORDS, documents, write_documents, write_tokenizer

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE
from tasks import text
from tasks.text import Text

SPECIAL = ("<unk>", "<s>", END)
ID = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}


def make(folder: Path, texts: list[str] | None = None, **fields: Any) -> Text:
    write_documents(folder / "text.jsonl", texts)
    settings = {"path": str(folder / "text.jsonl"), "tokenizer": str(write_tokenizer(folder)), "length": 8} | fields
    return Text.from_dict(settings)


def in_a_folder(folder: Path, **splits: list[str]) -> dict[str, str]:
    for name, texts in splits.items():
        write_documents(folder / "data" / f"{name}.jsonl", texts)
    return {"path": str(folder / "data")}


def ids(*words: str) -> list[int]:
    return [ID[word] for word in words]


def test_packed_rows(tmp_path: Path) -> None:
    train = ["w0 w1 w2", "", "w3", "w4 w5 w6 w7 w8 w9"]
    task = make(tmp_path, **in_a_folder(tmp_path, train=train, test=["w9 w9 w9"], other=["w1 w2 w3"]), length=4)
    dataset = task.build()
    stream = [*ids("w0", "w1", "w2", END), *ids("w3", END, "w4", "w5"), *ids("w6", "w7", "w8", "w9")]  # END is cut off
    assert dataset.train.tokens.flatten().tolist() == stream
    assert torch.equal(dataset.train.targets, dataset.train.tokens[:, 1:])
    assert dataset.train.positions.tolist() == [[0, 1, 2]] * 3
    assert list(dataset.evaluation) == ["other", "test"]
    assert dataset.evaluation["test"].tokens.tolist() == [ids("w9", "w9", "w9", END)]
    assert dataset.manifest["documents"] == {"train": 3, "other": 1, "test": 1}
    assert dataset.manifest["tokens"] == {"train": 13, "other": 4, "test": 4}
    assert dataset.answer.columns == slice(0, 3)
    assert dataset.vocabulary == (*SPECIAL, *WORDS)


def test_packed_rows_share_memory(tmp_path: Path) -> None:
    train = make(tmp_path).build().train
    assert train.targets.untyped_storage().data_ptr() == train.tokens.untyped_storage().data_ptr()
    assert train.positions.stride(0) == 0


def test_padded_rows(tmp_path: Path) -> None:
    """With the tokenizer's own special tokens; a document cut at the length has a target everywhere."""
    texts = ["w0 w1", "w2", "w3 w4 w5 w6 w7"]
    fields = in_a_folder(tmp_path, train=texts, test=["w1"]) | {"packing": "padded", "length": 4}
    train = make(tmp_path, **fields).build().train
    assert train.tokens.tolist() == [
        [*ids("<s>", "w0", "w1"), 0],
        [*ids("<s>", "w2"), 0, 0],
        ids("<s>", "w3", "w4", "w5"),
    ]
    assert train.targets.tolist() == [
        [*ids("w0", "w1"), IGNORE],
        [*ids("w2"), IGNORE, IGNORE],
        ids("w3", "w4", "w5"),
    ]
    closed = make(tmp_path, **fields, separator=END).build().train
    assert closed.targets.tolist() == [ids("w0", "w1", END), [*ids("w2", END), IGNORE], ids("w3", "w4", "w5")]


def test_a_document_of_one_token_has_no_padded_row(tmp_path: Path) -> None:
    fields = in_a_folder(tmp_path, train=["w0", "w1 w2", "w3"], test=["w1 w1"]) | {"packing": "padded"}
    task = make(tmp_path, **fields)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert task.build().train.tokens[:, :3].tolist() == [[*ids("w1", "w2"), 0]]


def test_validation_documents_are_held_out_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    settings = {"packing": "padded", "length": 3, "validation_fraction": 0.2}
    whole = make(tmp_path, texts, **settings).build()
    held_out = {tuple(row) for row in whole.evaluation["validation"].tokens.tolist()}
    train = {tuple(row) for row in whole.train.tokens.tolist()}
    assert held_out.isdisjoint(train) and len(held_out | train) == len(texts)
    assert 0.15 < len(held_out) / len(texts) < 0.25
    monkeypatch.setattr(text, "BATCH", 7)  # neither order, repetition nor batches decide
    again = make(tmp_path, (texts[::-1] + texts)[: len(texts) + 50], **settings).build()
    assert {tuple(row) for row in again.evaluation["validation"].tokens.tolist()} == held_out


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(tmp_path).build()
    monkeypatch.setattr(text, "BATCH", 7)
    monkeypatch.setattr(text, "DIGEST_ROWS", 3)
    assert make(tmp_path).build().manifest == expected.manifest


def test_the_first_documents_only(tmp_path: Path) -> None:
    some, all_of_them = make(tmp_path, max_documents=50).build(), make(tmp_path, documents()[:50]).build()
    assert some.manifest["sha256"] == all_of_them.manifest["sha256"]
    assert sum(some.manifest["documents"].values()) == 50


def test_another_text_is_another_data_set(tmp_path: Path) -> None:
    one, other = make(tmp_path).build(), make(tmp_path, documents()[1:]).build()
    assert one.manifest["sha256"] != other.manifest["sha256"]


def test_what_closes_a_document(tmp_path: Path) -> None:
    """The field first, then the tokenizer's configuration, then the usual names."""
    folder = write_tokenizer(tmp_path)
    fields = in_a_folder(tmp_path, train=["w1 w2"], test=["w3 w4"]) | {"tokenizer": str(folder), "length": 3}

    def last(**more: Any) -> int:
        return int(Text.from_dict(fields | more).build().train.tokens[0, -1])

    assert last() == ID[END]
    for token in ("w5", {"content": "w5", "lstrip": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert last() == ID["w5"]
    assert last(separator="w6") == ID["w6"]
    assert last(tokenizer=str(folder / "tokenizer.json"), separator=END) == ID[END]


def test_a_tokenizer_with_unused_ids(tmp_path: Path) -> None:
    task = make(tmp_path)
    write_tokenizer(tmp_path, gap=True)
    assert task.vocab_size == len(SPECIAL) + len(WORDS) + 1
    dataset = task.build()
    assert len(set(dataset.vocabulary)) == task.vocab_size and dataset.vocabulary[-1] == WORDS[-1]


def test_released_tokenizers_load_too(tmp_path: Path) -> None:
    """As transformers saves one."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    task = make(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w7").save_pretrained(tmp_path / "saved")
    saved = task.with_overrides({"tokenizer": str(tmp_path / "saved")}).build()
    assert saved.train.tokens.eq(ID["w7"]).sum() > task.build().train.tokens.eq(ID["w7"]).sum()


# ---- mistakes ----


def refused(task: Text, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task.build()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        ('{"body": "w1"}', "line 3 has no text field 'text'"),
        ('{"text": 5}', "line 3 has no text field 'text'"),
        ('["w1"]', "line 3 has no text field 'text'"),
        ('{"text": "\\ud800"}', "line 3 is not Unicode"),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, part: str, tmp_path: Path) -> None:
    task = make(tmp_path)
    bad = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "w1"}\n\n' + bad + b"\n")
    refused(task, "text.jsonl", part)


def test_too_little_text(tmp_path: Path) -> None:
    refused(make(tmp_path, ["w1 w2"] * 4), "split '", "a row needs 8", "task.length")
    fields = in_a_folder(tmp_path, train=["w1"] * 9, test=["w2"])
    refused(make(tmp_path, **fields), "split 'test' has 2 tokens in 1 documents")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"path: nowhere\.jsonl: no such file"),
        ({"tokenizer": "nowhere"}, r"tokenizer: nowhere: No such file"),
        ({"separator": "none"}, r"separator: 'none' is not a token of"),
        ({"length": 1}, "length: "),
        ({"validation_fraction": 0}, "validation_fraction: "),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **fields)


def test_wrong_folders_and_tokenizers(tmp_path: Path) -> None:
    for splits, part in (({"test": ["w1"]}, "has no train.jsonl"), ({"train": ["w1"]}, "has no <split>.jsonl")):
        folder = tmp_path / part.split()[-1]
        with pytest.raises(ConfigError, match=part):
            folder.mkdir()
            make(folder, **in_a_folder(folder, **splits))
    write_documents(tmp_path / "text.jsonl")
    fields = {
        "path": str(tmp_path / "text.jsonl"),
        "tokenizer": str(write_tokenizer(tmp_path, end="[EOT]")),
        "length": 8,
    }
    with pytest.raises(ConfigError, match=r"separator.* names no end-of-text token; set task\.separator"):
        Text.from_dict(fields)
    assert Text.from_dict(fields | {"packing": "padded"}).vocab_size == len(ID)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.* cannot be read"):
        Text.from_dict(fields)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not a JSON object"):
        Text.from_dict(fields)
