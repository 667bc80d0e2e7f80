"""Language modelling on text: JSON lines, a local tokenizer, rows of one length.

Every token but the first of a row is an answer token. N rows of T tokens, A = T - 1.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import check_name
from groundswell.protocols import IGNORE, Answer, Dataset, Split, Task
from tasks.tokenizer_files import (
    END_OF_TEXT,
    TOKENIZER_CONFIG,
    eos_token,
    load_tokenizer,
    load_vocabulary,
    tokenizer_key,
)

TRAIN, VALIDATION, SUFFIX = "train", "validation", ".jsonl"
BATCH = 1_000  # documents tokenised together
DIGEST_ROWS = 4_096


class Text(Task):
    """Next-token prediction on documents. Data and tokenizer must not change while runs on them are compared.

    Two builds of one config are equal: documents keep their order, and a document is held out by its text's hash.
    """

    path: str = Field(description="a .jsonl file, or a folder with train.jsonl and <split>.jsonl for each other split")
    tokenizer: str = Field(description="tokenizer.json of the tokenizers library, or a local folder that has one")
    length: int = Field(gt=1, description="tokens of a row")
    field: str = Field("text", description="of a line's JSON object: the document")
    packing: Literal["packed", "padded"] = Field(
        "packed",
        description="packed: documents end to end, each closed by the separator, cut into rows (the rest that fills no "
        "row is dropped); padded: one document a row with the tokenizer's own special tokens, cut at length",
    )
    separator: str | None = Field(
        None, description="token that closes each document; packed: by default the tokenizer's end-of-text token"
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="of a single file's documents, held out")
    max_documents: int | None = Field(None, gt=0, description="the first so many of each file")

    @model_validator(mode="after")
    def _check(self) -> Text:
        self._files()
        self._separator_id()
        return self

    @property
    def vocab_size(self) -> int:
        return len(load_vocabulary(*tokenizer_key(self.tokenizer)))

    @property
    def max_length(self) -> int:
        return self.length

    @property
    def num_answers(self) -> int:
        return self.length - 1

    def build(self) -> Dataset:
        """Raises ConfigError for a line that is no document, with its number, and where a split fills no row."""
        rows: dict[str, _Rows] = {}
        files = self._files()
        for split, path in files.items():
            documents = self._documents(path)
            while batch := list(islice(documents, BATCH)):
                for name, texts in self._assign(split, batch, single=len(files) == 1).items():
                    rows.setdefault(name, _Rows(self.length)).extend(self._encode(texts))
        names = files if len(files) > 1 else (TRAIN, VALIDATION)
        splits = {name: self._split(name, rows.get(name, _Rows(self.length))) for name in names}
        train = splits.pop(TRAIN)
        counts = {TRAIN: len(train), **{name: len(split) for name, split in splits.items()}}
        manifest: dict[str, Any] = {
            "spec": self.to_dict(),
            "counts": counts,
            "train_blocks": {"text": len(train)},
            "documents": {name: rows[name].num_documents for name in counts},
            "tokens": {name: rows[name].num_tokens for name in counts},
            "sha256": _digest({TRAIN: train, **splits}),
        }
        vocabulary = load_vocabulary(*tokenizer_key(self.tokenizer))
        return Dataset(vocabulary, train, splits, Answer(slice(0, self.num_answers)), manifest)

    # ---- files ----

    def _files(self) -> dict[str, Path]:
        """Split -> file, the training split first; a single file is all there is of "train"."""
        path = Path(self.path)
        if not path.is_dir():
            if not path.is_file():
                raise ValueError(f"path {path}: no such file; give a {SUFFIX} file or a folder with {TRAIN}{SUFFIX}")
            return {TRAIN: path}
        files = {file.stem: file for file in sorted(path.glob(f"*{SUFFIX}"))}
        if TRAIN not in files or len(files) == 1:
            missing = f"<split>{SUFFIX}, for instance {VALIDATION}{SUFFIX}" if TRAIN in files else f"{TRAIN}{SUFFIX}"
            raise ValueError(f"path {path}: has no {missing}; add it, or give one {SUFFIX} file")
        for name in files:
            check_name(name, "task.path: split")
        return {TRAIN: files.pop(TRAIN), **files}

    def _documents(self, path: Path) -> Iterator[str]:
        """One document after the other; empty lines and empty documents are passed over."""
        with path.open("rb") as file:
            found = (text for number, line in enumerate(file, 1) if (text := self._document(path, number, line)))
            yield from islice(found, self.max_documents)

    def _document(self, path: Path, number: int, line: bytes) -> str:
        if not line.strip():
            return ""
        try:
            values = json.loads(line)
        except ValueError as error:  # bad JSON or bad UTF-8
            raise ConfigError(f"{path}: line {number} is not JSON ({error}); write one object a line") from None
        text = values.get(self.field) if isinstance(values, dict) else None
        if not isinstance(text, str):
            raise ConfigError(
                f"{path}: line {number} has no text field '{self.field}'; mend the line or set task.field"
            )
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can escape halves of a character
            raise ConfigError(f"{path}: line {number} is not Unicode text; mend the line") from None
        return text

    def _assign(self, split: str, documents: list[str], single: bool) -> dict[str, list[str]]:
        """Documents by split. Equal texts always fall on the same side."""
        if not single:
            return {split: documents}
        parts: dict[str, list[str]] = {TRAIN: [], VALIDATION: []}
        for text in documents:
            share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
            parts[VALIDATION if share < self.validation_fraction else TRAIN].append(text)
        return {name: texts for name, texts in parts.items() if texts}

    # ---- tokens ----

    def _separator_id(self) -> int | None:
        """None: documents are not closed (padded without a separator)."""
        path, changed = tokenizer_key(self.tokenizer)
        tokenizer = load_tokenizer(path, changed)
        if self.separator is not None:
            found = tokenizer.token_to_id(self.separator)
            if found is None:
                raise ValueError(f"separator '{self.separator}' is not a token of {path}; name one of its tokens")
            return found
        if self.packing == "padded":
            return None
        named = eos_token(path.with_name(TOKENIZER_CONFIG))
        ids = (tokenizer.token_to_id(token) for token in ([named] if named else END_OF_TEXT))
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise ValueError(f"separator is required: {path} names no end-of-text token; set task.separator to a token")
        return found

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of each document as it goes into the rows."""
        packed, separator = self.packing == "packed", self._separator_id()
        closing = [] if separator is None else [separator]
        encodings = load_tokenizer(*tokenizer_key(self.tokenizer)).encode_batch_fast(
            texts, add_special_tokens=not packed
        )
        for encoding in encodings:
            ids = encoding.ids + closing
            yield ids if packed else ids[: self.length]

    def _split(self, name: str, rows: _Rows) -> Split:
        tokens, targets = rows.packed() if self.packing == "packed" else rows.padded()
        if not len(tokens):
            needed = self.length if self.packing == "packed" else 2
            raise ConfigError(
                f"{self.path}: split '{name}' has {rows.num_tokens} tokens in {rows.num_documents} documents, a row "
                f"needs {needed}; give more text, a smaller task.length or another task.validation_fraction"
            )
        positions = torch.arange(self.num_answers).expand(len(tokens), -1)
        return Split(tokens, positions, targets)


class _Rows:
    """Documents of one split end to end in one growing buffer: the text itself is never all in memory."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = array("q")
        self.ends = array("q")  # of each document

    def extend(self, documents: Iterator[list[int]]) -> None:
        for ids in documents:
            self.tokens.extend(ids)
            self.ends.append(len(self.tokens))

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def _flat(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.tokens, dtype=np.int64)) if self.tokens else torch.empty(0).long()

    def packed(self) -> tuple[Tensor, Tensor]:
        """-> tokens [N, T], targets [N, T - 1] (a view)."""
        count = self.num_tokens // self.length
        tokens = self._flat()[: count * self.length].view(count, self.length)
        return tokens, tokens[:, 1:]

    def padded(self) -> tuple[Tensor, Tensor]:
        """-> tokens [N, T], 0 behind the document, targets [N, T - 1], IGNORE there. One token alone has no target."""
        ends = torch.tensor(self.ends, dtype=torch.int64)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]) if len(ends) else ends
        kept = ends - starts > 1
        starts, lengths = starts[kept], (ends - starts)[kept]
        inside = torch.arange(self.length) < lengths[:, None]
        tokens = torch.zeros(len(lengths), self.length, dtype=torch.int64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            tokens[row, :length] = self._flat()[start : start + length]
        return tokens, tokens[:, 1:].masked_fill(~inside[:, 1:], IGNORE)


def _digest(splits: Mapping[str, Split]) -> str:
    """sha256 over names, shapes, tokens and targets, a few rows at a time."""
    total = hashlib.sha256()
    for name, split in splits.items():
        for tensor in (split.tokens, split.targets):
            total.update(f"{name} {tuple(tensor.shape)}\n".encode())
            for rows in tensor.split(DIGEST_ROWS):
                total.update(rows.numpy().tobytes())
    return total.hexdigest()
