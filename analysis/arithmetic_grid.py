"""How far arithmetic generalises in length: accuracy on a grid of operand lengths (arXiv 2405.17399).

The published evaluation is 20 jobs of a 100 x 100 grid, 100 problems a cell. Here a grid is a question that any number
of processes answer in parts, and each cell that has been computed is kept.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from analysis.arithmetic_grid_cells import METRICS, Cell, decode_rows, evaluate_cells
from analysis.arithmetic_grid_files import original_grid_files, original_length_file, original_sorting_files
from analysis.arithmetic_plots import draw_grid, draw_pair, draw_steps
from groundswell.experiment import Experiment
from groundswell.probes import DividedProbe, Findings, Opened, Part, scalars
from groundswell.protocols import IGNORE, Model, Split
from groundswell.rundir import RunFolder
from groundswell.training.pack import build_dataset
from tasks.arithmetic_examples import LengthTask

PART_TOKENS = 2**18  # of one part: seconds of work for a small network on a slow core
LONGEST_OUT = 100  # lengths up to here are "out of distribution", beyond it is a region of its own, as published
RECURRENCES = "num_recurrences_in_eval"  # field of looped models
CELLS, WRONG = "cells", "wrong_answers"  # tables of an answer, and of its parts
NOT_IN_PARTS = frozenset({"max_first", "max_second", "equal_lengths", "grading", "batch_tokens", "original_files"})


class LengthGrid(DividedProbe):
    """Accuracy on `samples` problems of each pair of operand lengths (sorting: most digits, numbers of the array).

    Scalars `grid/<region>/<metric>` are means over cells: `in_distribution` (both operands as long as in training or
    shorter), `out_of_distribution` (the others up to 100), `over_100`. Metrics: `accuracy` (by `grading`),
    `token_accuracy` (single tokens, each behind the right ones) and `first_accuracy`. Arrays [first, second] have NaN
    where nothing was asked; the training square is `trained`.
    """

    headlines: ClassVar[tuple[str, ...]] = ("grid/*/accuracy",)

    max_first: int = Field(30, ge=0, description="longest first operand of the grid; 0: no grid")
    max_second: int | None = Field(None, gt=0, description="longest second operand; default as the first")
    equal_lengths: tuple[int, int] | None = Field(
        None, description="from, to: cells of equal lengths besides the grid, for instance 101 160"
    )
    samples: int = Field(100, gt=0, description="problems a cell (fewer where there are not so many)")
    seed: int = Field(0, ge=0, description="of the problems")
    max_recurrences: int | None = Field(None, gt=0, description="passes of a looped model; default as it is set")
    grading: Literal["with_end", "without_end"] = Field(
        "with_end", description="must a right answer end? the original asks for it, but not in sorting"
    )
    outputs: bool = Field(False, description="decode wrong answers and write them as text: wrong_answers.csv")
    original_files: bool = Field(False, description="write the original's JSON grids (without_end: sorting's texts)")
    batch_tokens: int = Field(16_384, gt=0, description="tokens in one forward pass")

    @model_validator(mode="after")
    def _check(self) -> LengthGrid:
        low, high = self.equal_lengths or (1, 1)
        if not 1 <= low <= high:
            raise ValueError(f"equal_lengths {low} {high}: give the shortest and the longest, from 1 on")
        if not self.max_first and self.equal_lengths is None:
            raise ValueError("max_first 0 leaves no cell; give equal_lengths too")
        return self

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.task, LengthTask):
            return (
                f"task {type(experiment.task).__name__} has no problems of given lengths; ask runs of arithmetic tasks"
            )
        if self.max_recurrences is not None and not experiment.model.has(RECURRENCES):
            return f"max_recurrences: model {type(experiment.model).__name__} is not looped; leave it out"
        return None

    # ---- parts ----

    def cells(self) -> list[Cell]:
        """All that are asked for."""
        second = self.max_second or self.max_first
        grid = [(a, b) for a in range(1, self.max_first + 1) for b in range(1, second + 1)]
        low, high = self.equal_lengths or (1, 0)
        return list(dict.fromkeys([*grid, *((n, n) for n in range(low, high + 1))]))

    def part_question(self) -> str:
        """A cell depends neither on the grid's size nor on how answers are counted: grids share their cells."""
        fields = {name: value for name, value in self.to_dict().items() if name not in NOT_IN_PARTS}
        return json.dumps(fields, sort_keys=True)

    def parts(self, experiment: Experiment, stored: Sequence[Path]) -> list[Part]:
        """Cells of about the same length side by side, about PART_TOKENS a part; costs are FLOPs."""
        known = read_cells(stored).keys()
        task, model = _task(experiment), self._model(experiment)
        shapes = {cell: task.cell_shape(*cell) for cell in self.cells() if cell not in known}
        lengths = {cell: prompt + answer - 1 for cell, (prompt, answer) in shapes.items()}
        flops = {
            shape: model.flops_per_example(task.vocab_size, sum(shape) - 1, shape[1]) for shape in set(shapes.values())
        }
        parts: list[Part] = []
        mine: list[Cell] = []
        for cell in sorted(shapes, key=lambda cell: (lengths[cell], cell)):
            if mine and self.samples * (sum(lengths[c] for c in mine) + lengths[cell]) > PART_TOKENS:
                parts.append(_part(mine, self.samples * sum(flops[shapes[c]] for c in mine)))
                mine = []
            mine.append(cell)
        return [*parts, _part(mine, self.samples * sum(flops[shapes[c]] for c in mine))] if mine else parts

    def run_part(self, opened: Opened, part: Part) -> Findings:
        task, model = _task(opened.experiment), self._model(opened.experiment)
        splits = {(a, b): task.cell(a, b, self.samples, self.seed) for a, b in part.items}
        found = evaluate_cells(model, opened.parameters, splits, self.batch_tokens)
        rows = [
            {"first": a, "second": b, "samples": len(splits[a, b])}
            | {name: float(found[a, b][name].mean()) for name in METRICS}
            for a, b in part.items
        ]
        tables = {CELLS: pd.DataFrame(rows)}
        if self.outputs:
            wrong = {cell: (found[cell]["accuracy"] == 0).nonzero()[:, 0].tolist() for cell in part.items}
            tables[WRONG] = self._wrong_answers(opened, model, splits, wrong)
        return Findings(tables=tables)

    def _model(self, experiment: Experiment) -> Model:
        passes = {} if self.max_recurrences is None else {RECURRENCES: self.max_recurrences}
        return experiment.model.with_overrides(passes) if passes else experiment.model

    def _wrong_answers(
        self, opened: Opened, model: Model, splits: Mapping[Cell, Split], wrong: Mapping[Cell, list[int]]
    ) -> pd.DataFrame:
        symbols = build_dataset(opened.experiment).vocabulary
        rows: list[dict[str, Any]] = []
        for (first, second), numbers in wrong.items():
            split = splits[first, second]
            if not numbers:
                continue
            outputs = decode_rows(model, opened.parameters, split, numbers)
            for number, output in zip(numbers, outputs, strict=True):
                prompt = split.tokens[number, : int(split.positions[number, 0]) + 1].tolist()
                gold = [token for token in split.targets[number].tolist() if token != IGNORE]
                ids = {"prompt": prompt, "answer": gold, "output": output}
                texts = {name: "".join(symbols[token] for token in tokens) for name, tokens in ids.items()}
                rows.append({"first": first, "second": second, "row": number} | texts)
        return pd.DataFrame(rows, columns=["first", "second", "row", "prompt", "answer", "output"])

    # ---- the answer ----

    def join(self, experiment: Experiment, stored: Sequence[Path]) -> Findings:
        known = read_cells(stored)
        cells = {cell: known[cell] for cell in self.cells()}
        table = pd.DataFrame([{"first": a, "second": b} | values for (a, b), values in cells.items()])
        trained = _task(experiment).trained_lengths
        arrays = {name: as_array({cell: values[name] for cell, values in cells.items()}) for name in METRICS}
        main = arrays[self._metric]
        tables, texts, figures = {CELLS: table}, {}, {}
        if self.outputs:
            wrong = pd.concat([pd.read_csv(path / f"{WRONG}.csv", dtype=str, keep_default_na=False) for path in stored])
            asked = [(int(a), int(b)) in cells for a, b in zip(wrong["first"], wrong["second"], strict=True)]
            tables[WRONG] = wrong[asked]
        if self.original_files:
            texts = self._original_files(arrays)
        if self.max_first > 1 or (self.max_second or 1) > 1:
            square = slice(0, self.max_first), slice(0, self.max_second or self.max_first)
            figures["grid"] = draw_grid(main[square], trained, "accuracy")
            if self.grading == "without_end":
                figures["pair"] = draw_pair(main[square], arrays["first_accuracy"][square], trained)
        found = region_means(arrays, trained, self._metric)
        return Findings(found, {**arrays, "trained": np.array(trained)}, tables, figures, texts)

    @property
    def _metric(self) -> str:
        return "accuracy" if self.grading == "with_end" else "accuracy_without_end"

    def _original_files(self, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        second = self.max_second or self.max_first
        if self.grading == "without_end":
            square = slice(0, self.max_first), slice(0, second)
            return original_sorting_files(arrays["accuracy_without_end"][square], arrays["first_accuracy"][square])
        files = original_grid_files(arrays["accuracy"][: self.max_first, :second]) if self.max_first else {}
        return files | (original_length_file(arrays["accuracy"], self.equal_lengths) if self.equal_lengths else {})

    def over_time(self, folder: RunFolder, answers: Mapping[int, Path]) -> Findings | None:
        """Means of the regions by step."""
        table = pd.DataFrame([{"step": step} | scalars(path) for step, path in answers.items()])
        return Findings(tables={"regions": table}, figures={"regions": draw_steps(table)} if len(table) > 1 else {})


def _task(experiment: Experiment) -> LengthTask:
    assert isinstance(experiment.task, LengthTask)
    return experiment.task


def _part(cells: Sequence[Cell], cost: float) -> Part:
    digest = hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:12]
    return Part(f"cells-{digest}", cost, tuple(cells))


def read_cells(folders: Iterable[Path]) -> dict[Cell, dict[str, float]]:
    """Cell -> samples and metrics, from tables of cells."""
    found: dict[Cell, dict[str, float]] = {}
    for folder in folders:
        with (folder / f"{CELLS}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                cell = int(row.pop("first")), int(row.pop("second"))
                found[cell] = {name: float(value) for name, value in row.items()}
    return found


def as_array(values: Mapping[Cell, float]) -> np.ndarray:
    """[longest first, longest second], the cell (a, b) at [a - 1, b - 1]; NaN where there is none."""
    array = np.full((max(a for a, _ in values), max(b for _, b in values)), np.nan)
    for (first, second), value in values.items():
        array[first - 1, second - 1] = value
    return array


def region_means(arrays: Mapping[str, np.ndarray], trained: Cell, main: str) -> dict[str, float]:
    """Scalars of an answer: the mean over the cells of each region that has any."""
    first, second = np.indices(arrays[main].shape) + 1
    inside = (first <= trained[0]) & (second <= trained[1])
    far = np.maximum(first, second) > LONGEST_OUT
    regions = {"in_distribution": inside, "out_of_distribution": ~inside & ~far, "over_100": ~inside & far}
    names = {"accuracy": main, "token_accuracy": "token_accuracy", "first_accuracy": "first_accuracy"}
    found: dict[str, float] = {}
    for region, where in regions.items():
        asked = where & ~np.isnan(arrays[main])
        if asked.any():
            found |= {f"grid/{region}/{name}": float(arrays[source][asked].mean()) for name, source in names.items()}
    return found
