"""`groundswell answers score`: how many answers in files are right, of any language model.

A file is JSONL, `{"question": ..., "answer": ..., "completion": ...}` a line, or a cache of the GPT-4 baselines of
implicit chain of thought (Deng et al. 2023, arXiv 2311.01460): SQLite, table main(key, prompt, completion). An answer
is right when the text behind the completion's last `####` is the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import quote

import pandas as pd
import tyro
from rich.console import Console

from groundswell.config import ConfigError
from groundswell.report import Report, print_table
from tasks.chain_text import MARKER, read_line

SQLITE = b"SQLite format 3\x00"  # how such a file begins
FIELDS = ("question", "answer", "completion")
LAST_QUESTION = "Question to answer:\n\nQ:"  # what stands before it in a cached prompt
PRODUCT = re.compile(r"(\d+) \* (\d+)")
MODELS = ("gpt-4", "gpt-4-1106-preview")  # of the published caches: GPT-4, GPT-4 Turbo
UNKNOWN = "unknown"
PLAIN_WIDTH = 160


class Given(NamedTuple):
    """One answer."""

    question: str
    expected: str
    completion: str
    model: str = ""  # whose answer; UNKNOWN where the key of a cache's row is none of the models'

    @property
    def text(self) -> str:
        return self.completion.rpartition(MARKER)[2].strip()


def score(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional],
    lines: Path | None = None,
    models: tuple[str, ...] = MODELS,
    temperature: float = 0.0,
) -> int:
    """Count right answers. Files are JSONL with question, answer and completion, or the published SQLite caches.

    Args:
        paths: Files to score.
        lines: File of `question||chain #### answer` lines that has the answers to a cache's questions; products need
            none. Only its questions count.
        models: Names under which a cache's rows may have been stored: a row's key is a hash of prompt, name and
            temperature. A row with another key counts as unknown.
        temperature: Of the cached answers.
    """
    if not paths:
        raise ConfigError("answers score: name one or more files")
    expected = None if lines is None else read_answers(lines)
    rows = []
    for path in paths:
        given = read_file(path, expected, models, temperature)
        for model in dict.fromkeys(each.model for each in given):
            mine = [each for each in given if each.model == model]
            rows.append({"file": str(path), "model": model or "-", **counts(mine, expected)})
    console = Console() if Console().is_terminal else Console(width=PLAIN_WIDTH)
    print_table(Report("Answers", pd.DataFrame(rows)), console)
    return 0


def counts(given: Sequence[Given], expected: Mapping[str, str] | None = None) -> dict[str, int | str]:
    """answers; right ones, word for word (as published) and with commas left out; percent; questions of `expected`
    that nobody has answered."""
    right = sum(each.text == each.expected for each in given)
    found: dict[str, int | str] = {"answers": len(given), "right": right, "percent": f"{100 * right / len(given):.1f}"}
    found["right, commas aside"] = sum(each.text.replace(",", "") == each.expected.replace(",", "") for each in given)
    if expected is not None:
        found["unanswered"] = len(set(expected) - {each.question for each in given})
    return found


# ---- reading ----


def read_file(
    path: Path,
    expected: Mapping[str, str] | None = None,
    models: Sequence[str] = MODELS,
    temperature: float = 0.0,
) -> list[Given]:
    """`expected`: question -> answer; others are left out. Raises ConfigError, which names the file and the line or
    row, for what cannot be read, and where nothing is left."""
    try:
        with path.open("rb") as file:
            is_cache = file.read(len(SQLITE)) == SQLITE
        found = list(_read_cache(path, expected, models, temperature) if is_cache else _read_lines(path, expected))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a file of answers") from None
    if not found:
        raise ConfigError(f"{path}: has no answers" + (" to the questions of --lines" if expected is not None else ""))
    return found


def _read_lines(path: Path, expected: Mapping[str, str] | None) -> Iterator[Given]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number}: is no JSON ({error}); write one object a line") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in FIELDS):
            raise ConfigError(f"{path} line {number}: must have the texts {', '.join(FIELDS)}")
        answer = row["answer"].strip().removeprefix(MARKER).strip()
        if expected is None or row["question"] in expected:
            yield Given(row["question"], answer, row["completion"])


def _read_cache(
    path: Path, expected: Mapping[str, str] | None, models: Sequence[str], temperature: float
) -> Iterator[Given]:
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT key, prompt, completion FROM main ORDER BY rowid").fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"{path}: {error}; a cache has a table main(key, prompt, completion)") from None
    for number, (key, prompt, completion) in enumerate(rows, 1):
        where = f"{path} row {number}"
        if not all(isinstance(text, str) for text in (key, prompt, completion)):
            raise ConfigError(f"{where}: key, prompt and completion must be texts")
        question = _question(prompt, where)
        answer = _expected(question, expected, where)
        if answer is not None:
            by = (name for name in models if cache_key(prompt, name, temperature) == key)
            yield Given(question, answer, completion, next(by, UNKNOWN))


def cache_key(prompt: str, model: str, temperature: float) -> str:
    """Of a row whose prompt is this JSON text. The order of the fields matters."""
    question = {"prompt": json.loads(prompt), "model": model, "temperature": temperature}
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()


def _question(prompt: str, where: str) -> str:
    try:
        content = json.loads(prompt)[0]["content"]
        _, marker, question = content.rpartition(LAST_QUESTION)
    except (ValueError, LookupError, TypeError, AttributeError):
        marker = question = ""
    if not marker:
        raise ConfigError(f"{where}: its prompt is no message with 'Question to answer:'; give a published cache")
    return question.strip()


def _expected(question: str, expected: Mapping[str, str] | None, where: str) -> str | None:
    """None where another question is asked about."""
    if expected is not None:
        return expected.get(question)
    product = PRODUCT.fullmatch(question)
    if product is None:
        raise ConfigError(f"{where}: '{question[:60]}' is no product; name the file with its answer: --lines FILE")
    return str(int(product[1]) * int(product[2]))


def read_answers(path: Path) -> dict[str, str]:
    """A file of `question||chain #### answer` lines -> question -> answer, commas and all. Products of numbers whose
    digits are units first are asked the usual way round. Raises ConfigError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--lines {path}: cannot be read ({error}); give a UTF-8 file") from None
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            question = read_line(line, f"{path} line {number}").question.strip()
            answer = line.rpartition(MARKER)[2].strip()
            turned = " * ".join(part.replace(" ", "")[::-1] for part in question.split("*"))
            if PRODUCT.fullmatch(turned):
                question, answer = turned, answer.replace(" ", "")[::-1].lstrip("0")
            found[question] = answer
    return found


def main(arguments: Sequence[str]) -> int:
    """`groundswell answers score ...`. Raises ConfigError for a user's mistake."""
    given = list(arguments)
    return tyro.cli(score, prog="groundswell answers score", args=given[1:] if given[:1] == ["score"] else given)
