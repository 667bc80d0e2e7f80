"""Chains of thought from files of `question||chain #### answer` lines: GSM8K and products as published, or your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from pydantic import Field, model_validator

from groundswell.files import check_name
from groundswell.protocols import Dataset
from tasks.chain_of_thought import ChainOfThought
from tasks.chain_text import Example, ReadLines, read_lines
from tasks.chain_tokens import closed_words

TEST_FILES = ("test.txt", "test_bigbench.txt")  # what the published data sets call their test split


class ChainFiles(ChainOfThought):
    """Examples keep the order of their lines. Files and tokenizer must not change while runs on them are compared.

    Without a tokenizer the vocabulary is every word, digit and other character of all files.
    """

    path: str = Field(description="folder of the files")
    train: str = Field("train.txt", description="file in that folder (or a path of its own)")
    validation: str = Field("valid.txt", description="likewise")
    test: str | None = Field(None, description="likewise; default: test.txt or test_bigbench.txt where there is one")
    others: tuple[str, ...] = Field((), description="files of further splits, which are called as the files are")
    train_size: int | None = Field(None, gt=0, description="at most so many examples of the file, the first")
    validation_size: int | None = Field(None, gt=0, description="likewise")
    test_size: int | None = Field(None, gt=0, description="likewise")
    skip_bad_lines: bool = Field(
        False, description="pass over lines without exactly one || or without ####, instead of stopping there"
    )

    @model_validator(mode="after")
    def _check_files(self) -> ChainFiles:
        for name, path in self._files().items():
            if not path.is_file():
                raise ValueError(f"{name} {path}: no such file; set task.path, and task.{name} to a file in it")
        return self

    def words(self) -> tuple[str, ...]:
        return _words(*self._reading())

    def examples(self) -> Mapping[str, Sequence[Example]]:
        return {name: lines.examples for name, lines in _read(*self._reading()).items()}

    def changed(self) -> tuple[int, ...]:
        return (*super().changed(), *(path.stat().st_mtime_ns for path in self._files().values()))

    def build(self) -> Dataset:
        """The manifest adds skipped_lines: line numbers of each split."""
        dataset = super().build()
        skipped = {name: list(lines.skipped) for name, lines in _read(*self._reading()).items()}
        return replace(dataset, manifest={**dataset.manifest, "skipped_lines": skipped})

    def _files(self) -> dict[str, Path]:
        """Split -> file."""
        folder = Path(self.path)
        named = {"train": self.train, "validation": self.validation}
        test = self.test or next((file for file in TEST_FILES if (folder / file).is_file()), None)
        if test is not None:
            named["test"] = test
        for file in self.others:
            name = check_name(Path(file).stem, "task.others: split")
            if name in named:
                raise ValueError(f"others '{file}': there is a split '{name}' already; rename the file")
            named[name] = file
        return {name: folder / file for name, file in named.items()}

    def _reading(self) -> tuple[tuple[tuple[str, Path, int | None], ...], bool, tuple[int, ...]]:
        """What the examples are a function of: split, file and most examples; skip_bad_lines; times of change."""
        files, sizes = self._files(), {name: getattr(self, f"{name}_size") for name in ("train", "validation", "test")}
        parts = tuple((name, path, sizes.get(name)) for name, path in files.items())
        return parts, self.skip_bad_lines, self.changed()


Parts = tuple[tuple[str, Path, int | None], ...]


@lru_cache(maxsize=2)
def _read(parts: Parts, skip_bad_lines: bool, changed: tuple[int, ...]) -> Mapping[str, ReadLines]:
    return {name: read_lines(path, skip_bad_lines, most) for name, path, most in parts}


@lru_cache(maxsize=2)
def _words(parts: Parts, skip_bad_lines: bool, changed: tuple[int, ...]) -> tuple[str, ...]:
    read = _read(parts, skip_bad_lines, changed).values()
    return closed_words(example.text("") for lines in read for example in lines.examples)
