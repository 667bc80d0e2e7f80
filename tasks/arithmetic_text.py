"""Write arithmetic problems as files in the original's forms, and tokenise folders of them."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field, SerializeAsAny
from rich.console import Console

from groundswell.cli import PLAIN_WIDTH, split_dotted
from groundswell.config import Config, ConfigError
from tasks.arithmetic import OPERATORS, Arithmetic
from tasks.arithmetic_examples import PIECE, LengthTask
from tasks.arithmetic_files import (
    SPLITS,
    numbers_of_rows,
    read_text,
    shuffle_and_split,
    to_text,
    write_text,
    write_tokenized,
)
from tasks.arithmetic_rows import Rows
from tasks.arithmetic_vocabulary import VOCABULARIES, VocabularyName
from tasks.positional_or import PositionalOr
from tasks.sorting import Sorting

Folder = Annotated[Path, tyro.conf.Positional]


class Fields(Config):
    """What --task.* options are checked against."""

    task: SerializeAsAny[LengthTask] = Field(Arithmetic(), description="what to write")


def names(task: LengthTask, count: int) -> tuple[str, str]:
    """Folder and file of so many training rows, as the original calls them."""
    if isinstance(task, Sorting):
        size = f"{task.max_digits}_max_length_m_{task.max_numbers}_{count}_p_00"
        flags = ("_reverse_all" if task.reverse == "all" else "") + _hints(task.index_hints)
        file = f"sort_maximum_number_of_digts_{task.max_digits}_maximum_length_{task.max_numbers}_examples_{count}.txt"
        return f"sort_bucket_uniform_distribution_max_digits_n_{size}{flags}", file
    if isinstance(task, PositionalOr):
        size = f"n_{task.max_first}_m_{task.max_second}"
        return f"positional_or_{size}", f"positional_or_one_vec_zeros_{size}_examples_{count}.txt"
    if not isinstance(task, Arithmetic):
        raise ConfigError(f"task.class: {type(task).__name__} has no published file names; take Arithmetic or Sorting")
    size = f"n_{task.max_first}_m_{task.max_second}"
    operator = "".join(OPERATORS[task.operation])
    probability = task.space_probability
    if task.sampling == "lengths":
        flags = {"": "", "answer": "_reverse_ans", "all": "_reverse_all"}.get(task.reverse, "")
        flags += ("_keep_0_for_len_1" if task.keep_zero else "") + _hints(task.index_hints)
        folder = f"{operator}_bucket_method_{size}_{count}_p_{str(probability).replace('.', '')}{flags}"
        return folder, f"{operator}_{size}_examples_{count}.txt"
    flags = "" if task.keep_places else "_diff_lens"
    return f"{operator}_{size}", f"{operator}_{size}_examples_{count}{flags}{_plain_flags(task)}_seed_{task.seed}.txt"


def cell_names(task: LengthTask, first: int, second: int, count: int, seed: int) -> tuple[str, str]:
    """Folder and file of an evaluation cell, as the original calls them."""
    if isinstance(task, PositionalOr):
        return f"n_{first}_m_{second}", f"positional_arithmetic_n_{first}_m_{second}.txt"
    if isinstance(task, Arithmetic):
        operator, size = "".join(OPERATORS[task.operation]), f"n_{first}_m_{second}"
        lengths = "" if task.keep_places else "_diff_lens"
        flags = f"{lengths}_exact{_plain_flags(task.model_copy(update={'space_probability': 0.0}))}"
        return f"{operator}_{size}", f"{operator}_{size}_examples_{count}{flags}_seed_{seed}.txt"
    if isinstance(task, Sorting):
        return names(task.model_copy(update={"max_digits": first, "max_numbers": second}), count)
    return names(task, count)


def _plain_flags(task: Arithmetic) -> str:
    zeros = f"_prepend_{task.prepend_zeros}zeros" if task.prepend_zeros else ""
    answer = "_reverse_ans" if task.reverse == "answer" else ""
    return zeros + answer + (f"_prob_space_{task.space_probability}" if task.space_probability else "")


def _hints(index_hints: bool) -> str:
    return "_with_index_hints_circular" if index_hints else ""


def training_pieces(task: LengthTask, count: int) -> Iterator[Rows]:
    """The first `count` training rows."""
    if isinstance(task, PositionalOr):
        rows = task.enumerate_rows()
        if count != len(rows):
            raise ConfigError(f"count: positional OR has {len(rows)} problems in all; leave out --count")
        yield rows
    elif isinstance(task, Arithmetic | Sorting):
        for numbers in numbers_of_rows(count, PIECE):
            yield task.train_rows(numbers)


def write(
    task: LengthTask,
    output: Folder,
    count: int | None = None,
    cell: tuple[int, int] | None = None,
    cell_seed: int = 42,
    tokenize: bool = False,
    test_ratio: float = 0.05,
) -> int:
    """Write problems as lines of text: the task's training rows, or one cell of an evaluation grid.

    The task is set by --task.FIELD VALUE, another than addition by --task.class (tasks.arithmetic.Arithmetic,
    tasks.sorting.Sorting, tasks.positional_or.PositionalOr).

    Args:
        output: Folder in which a new one is made, with the original's names.
        count: Lines (default: all training rows of the task; 100 of a cell).
        cell: Two lengths: problems of exactly these.
        cell_seed: Seed of a cell (training rows come from --task.seed).
        tokenize: Write hf_tokenized_dataset beside the text too.
        test_ratio: Share of rows in its split test, the last ones.
    """
    start = time.monotonic()
    if count is not None and count < 1:
        raise ConfigError(f"count: must be at least 1, not {count}")
    if cell:
        folder, file = cell_names(task, *cell, count or 100, cell_seed)
        pieces = iter([task.cell_rows(*cell, count or 100, cell_seed)])
    else:
        count = count or (task.num_problems if isinstance(task, PositionalOr) else task.num_train) or 0
        folder, file = names(task, count)
        pieces = training_pieces(task, count)
    path = write_text(output / folder, file, (to_text(rows, task.characters) for rows in pieces))
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    with path.open("rb") as lines:
        written = sum(1 for _ in lines)
    seconds = time.monotonic() - start
    console.print(f"{path}: {written:,} lines, {seconds:.1f} s", soft_wrap=True, highlight=False)
    return tokenize_folder(path.parent, task.characters.name, test_ratio, shuffle_seed=None) if tokenize else 0


def tokenize_folder(
    folder: Folder, vocabulary: VocabularyName = "pad", test_ratio: float = 0.05, shuffle_seed: int | None = 0
) -> int:
    """Tokenise all .txt files of a folder into its hf_tokenized_dataset.

    Args:
        folder: Folder with .txt files of one problem a line.
        vocabulary: pad (digits and operators), index (with letters for hints) or sort.
        test_ratio: Share of rows in the split test, the last ones; less than one row puts all into it.
        shuffle_seed: Seed of the shuffle before that; None keeps the order of the lines.
    """
    if not 0 <= test_ratio < 1:
        raise ConfigError(f"test_ratio: must be from 0 up to 1, not {test_ratio:g}; take 0.05")
    splits = shuffle_and_split(read_text(folder, VOCABULARIES[vocabulary]), test_ratio, shuffle_seed)
    target = write_tokenized(folder, splits, vocabulary)
    sizes = " and ".join(f"{len(splits[name]):,} {name}" for name in SPLITS)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(f"{target}: {sizes} rows", soft_wrap=True, highlight=False)
    return 0


def main(arguments: Sequence[str]) -> int:
    """`groundswell arithmetic ...`. Raises ConfigError for a user's mistake."""
    fields, rest = split_dotted(arguments)
    task = Fields().with_overrides(fields).task
    if fields and rest[:1] != ["write"]:
        raise ConfigError(f"--{next(iter(fields))}: only `groundswell arithmetic write` has a task")
    return tyro.extras.subcommand_cli_from_dict(
        {"write": functools.partial(write, task), "tokenize": tokenize_folder},
        prog="groundswell arithmetic",
        description=__doc__,
        args=rest,
    )
