"""`groundswell score`: accuracies of answers that are files already, ours or the original's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from groundswell.config import ConfigError
from tasks.grading import ITEMS_FILE, accuracy_by_type, read_items

PLAIN_WIDTH = 200


def score(paths: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> int:
    """Score all_items.json files as the original's eval_qa does: one row a checkpoint, one column a type.

    Args:
        paths: Files, or folders to look through (the original's checkpoint-*/, or a run's probes/).
    """
    if not paths:
        raise ConfigError("score: name files or folders to score")
    files = [file for path in paths for file in find_files(path)]
    console = Console() if Console().is_terminal else Console(width=PLAIN_WIDTH)
    scores = {}
    for file in files:
        try:
            scores[file] = accuracy_by_type(read_items(file))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    kinds = list(dict.fromkeys(kind for found in scores.values() for kind in found))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpoint")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for file, found in scores.items():
        cells = [f"{found[kind][0]:.3f} ({found[kind][1]})" if kind in found else "" for kind in kinds]
        table.add_row(label(file), *cells)
    console.print(table)
    return 0


def find_files(path: Path) -> list[Path]:
    """By step. Raises ConfigError where there is none."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob(ITEMS_FILE), key=lambda file: (step_of(file), str(file)))
    if not found:
        raise ConfigError(f"{path}: no {ITEMS_FILE} there; write them with `groundswell evaluate --items`")
    return found


def step_of(file: Path) -> int:
    """The number in the nearest folder named checkpoint-N or step-N; only for the order of the rows."""
    for part in reversed(file.parts[:-1]):
        if match := re.fullmatch(r"(?:checkpoint|step)-(\d+)", part):
            return int(match[1])
    return 0


def label(file: Path) -> str:
    """The folder that names the checkpoint, and for ours the run."""
    for index, part in reversed(list(enumerate(file.parts[:-1]))):
        if re.fullmatch(r"(?:checkpoint|step)-\d+", part):
            return f"{file.parts[index - 2]} {part}" if part.startswith("step") else part
    return str(file)


def main(arguments: Sequence[str]) -> int:
    return tyro.cli(score, prog="groundswell score", args=list(arguments))
