"""Texts of `question||chain #### answer`: one example a line, UTF-8 (Deng et al. 2023, arXiv 2311.01460).

Lines end with "\\n" alone: questions hold other characters that Python's `splitlines` would cut at (U+2028).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from groundswell.config import ConfigError
from groundswell.files import atomic_write

DELIMITER, MARKER = "||", "####"
EQUATION = re.compile(r"<<([^<>]*)>>")


class Example(NamedTuple):
    """`answer` is the text from `####` on, without commas. An empty chain is legal."""

    question: str
    chain: str
    answer: str
    source: str = "task"  # file and line, for messages

    @property
    def line(self) -> str:
        return f"{self.question}{DELIMITER}{self.chain} {self.answer}"

    def text(self, end: str) -> str:
        """What a model reads, with the separator `end` behind question, chain and answer."""
        return f" {self.question} {end} {self.chain} {end} {self.answer} {end}"


class ReadLines(NamedTuple):
    examples: tuple[Example, ...]
    skipped: tuple[int, ...] = ()  # numbers of the lines that are no examples, from 1


def extract_answer(text: str) -> str:
    """From the first `####` on, without commas; the whole text where there is none."""
    return text[max(text.find(MARKER), 0) :].strip().replace(",", "")


def extract_chain(text: str) -> str:
    """What stands before the first `####`."""
    return text.partition(MARKER)[0].strip()


def equation_results(chain: str) -> list[str]:
    """What stands behind the last `=` of each `<<...>>`."""
    return [equation.rpartition("=")[2] for equation in EQUATION.findall(chain)]


def read_line(line: str, source: str = "task") -> Example:
    """Raises ConfigError for a line without exactly one `||`, and for one without `####` behind it."""
    question, *rest = line.strip().split(DELIMITER)
    if len(rest) != 1:
        raise ConfigError(
            f"{source}: has {len(rest)} '{DELIMITER}', must have one; write question{DELIMITER}chain {MARKER} answer, "
            "or set task.skip_bad_lines=true"
        )
    if MARKER not in rest[0]:
        raise ConfigError(
            f"{source}: has no '{MARKER}' behind '{DELIMITER}'; write question{DELIMITER}chain {MARKER} answer, or set "
            "task.skip_bad_lines=true"
        )
    return Example(question, extract_chain(rest[0]), extract_answer(rest[0]), source)


def read_lines(path: str | Path, skip_bad_lines: bool = False, most: int | None = None) -> ReadLines:
    """All examples of a file, or its first `most`. Blank lines are passed over.

    `skip_bad_lines` passes over lines that are no examples (of these, the published code skips the ones without exactly
    one `||`, and stops at those without `####`). Raises ConfigError for such a line, for a file that cannot be read and
    for one without an example.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a file of question{DELIMITER}chain lines") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    examples: list[Example] = []
    skipped: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if most is not None and len(examples) == most:
            break
        if not line.strip():
            continue
        try:
            examples.append(read_line(line, f"{path} line {number}"))
        except ConfigError:
            if not skip_bad_lines:
                raise
            skipped.append(number)
    if not examples:
        raise ConfigError(f"{path}: has no example; write question{DELIMITER}chain {MARKER} answer, one a line")
    return ReadLines(tuple(examples), tuple(skipped))


def write_lines(path: str | Path, examples: Iterable[Example]) -> Path:
    """Raises ConfigError for an example that would not be read back as it is."""
    return write_text(path, [example.line for example in examples if _check_written(example)])


def write_text(path: str | Path, lines: Sequence[str]) -> Path:
    return atomic_write(path, "".join(f"{line}\n" for line in lines))


def _check_written(example: Example) -> bool:
    line = example.line
    if "\n" in line or read_line(line, example.source)[:3] != example[:3]:
        raise ConfigError(
            f"{example.source}: '{line[:80]}' would be read back differently; leave '{DELIMITER}', '{MARKER}', line "
            "breaks and outer spaces out of its parts"
        )
    return True
