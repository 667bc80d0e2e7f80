"""Files of clean and corrupted texts: JSON objects one after the other, a line each or over several lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from groundswell.config import ConfigError
from groundswell.files import check_name

SUFFIX, TRAIN = ".jsonl", "train"


class Row(NamedTuple):
    """One object and where it stands."""

    source: str
    values: dict[str, Any]

    def text(self, *names: str) -> str:
        """The first of these fields that the object has. Raises ConfigError where none is a text."""
        for name in names:
            if name in self.values:
                value = self.values[name]
                if isinstance(value, str) and value.strip():
                    return value
                raise ConfigError(f"{self.source}: field '{name}' is not a text; mend it")
        raise ConfigError(f"{self.source}: has no field '{names[0]}'; add it")

    def number(self, name: str) -> int:
        """A whole number, also one that is written as text ("07")."""
        try:
            return int(self.values[name])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{self.source}: field '{name}' is not a whole number; add or mend it") from None


def read_objects(path: str | Path) -> tuple[Row, ...]:
    """All objects of a file. Raises ConfigError with the line of what is not one."""
    try:
        return _read_objects(Path(path), Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a file of JSON objects") from None


@lru_cache(maxsize=8)
def _read_objects(path: Path, changed: int) -> tuple[Row, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    rows = tuple(Row(f"{path} line {line}", values) for line, values in _objects(path, text))
    if not rows:
        raise ConfigError(f"{path}: has no JSON object; write one a line")
    return rows


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder, place, line = json.JSONDecoder(), 0, 1
    while True:
        start = _skip(text, place)
        line += text.count("\n", place, start)
        if start == len(text):
            return
        try:
            values, stop = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            wrong = line + text.count("\n", start, error.pos)
            raise ConfigError(f"{path}: line {wrong} is not JSON ({error.msg}); write one object a line") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: line {line} is not an object; write {{...}} with the fields of an example")
        yield line, values
        line += text.count("\n", start, stop)
        place = stop


def _skip(text: str, place: int) -> int:
    """The next place that is no white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def split_files(folder: str | Path) -> dict[str, Path]:
    """Split -> file, the training split first. Raises ValueError for a folder without train.jsonl and another."""
    files = {file.stem: file for file in sorted(Path(folder).glob(f"*{SUFFIX}"))}
    if TRAIN not in files or len(files) == 1:
        missing = f"<split>{SUFFIX}, for instance validation{SUFFIX}" if TRAIN in files else f"{TRAIN}{SUFFIX}"
        raise ValueError(f"path {folder}: has no {missing}; add it")
    for name in files:
        check_name(name, "task.path: split")
    return {TRAIN: files.pop(TRAIN), **files}


def read_splits(folder: str | Path) -> dict[str, tuple[Row, ...]]:
    return {name: read_objects(path) for name, path in split_files(folder).items()}
