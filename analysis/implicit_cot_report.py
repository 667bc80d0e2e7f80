"""The report of a sweep of chain-of-thought runs: accuracy and speed of each method, in a table and a figure (as figure
1 and table 1 of Deng et al. 2023, arXiv 2311.01460)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from analysis.chain_of_thought import ChainOfThoughtEvaluation
from analysis.tables import short, spread
from groundswell.experiment import Experiment
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import STAGE, format_value
from groundswell.training.run import TRAINING_SECONDS
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_student import MindReadingStudent
from models.stepwise import StepwiseInternalization
from tasks.chain_files import ChainFiles
from tasks.multiplication_chain import MultiplicationChain

COLUMNS = {  # of the table: scalar of the probe, format
    "accuracy": ("exact_match", "{:.3f}"),
    "relative speed": ("relative_speed", "{:.2f}"),
    "in a batch": ("relative_speed_batched", "{:.2f}"),
    "tokens": ("tokens_per_answer", "{:.1f}"),
    "truncated": ("truncated", "{:.3f}"),
}
STATE_LOSS = "state_loss"
METHODS = {  # kind: colour, marker
    "no chain": ("0.35", "s"), "explicit chain": ("tab:blue", "o"), "chain given": ("tab:cyan", "v"),
    "student": ("tab:orange", "^"), "emulator + student": ("tab:red", "D"), "stepwise": ("tab:green", "P"),
    "emulator": ("tab:purple", "x"),
}  # fmt: skip
SPEEDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # ticks
MAX_COLUMNS = 3


class Published(NamedTuple):
    """A point of table 1 of the paper. Only the implicit accuracies are also in the logs that the authors published."""

    kind: str
    network: str
    accuracy: float
    relative_speed: float


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "4x4": (
        Published("no chain", "GPT-2 small", 0.287, 1.0), Published("no chain", "GPT-2 medium", 0.762, 1.0),
        Published("emulator + student", "GPT-2 small", 0.966, 0.67),
        Published("emulator + student", "GPT-2 medium", 0.961, 0.69),
        Published("explicit chain", "GPT-2 small", 1.0, 0.17), Published("explicit chain", "GPT-2 medium", 1.0, 0.17),
    ),
    "5x5": (
        Published("no chain", "GPT-2 small", 0.012, 1.0), Published("no chain", "GPT-2 medium", 0.019, 1.0),
        Published("emulator + student", "GPT-2 small", 0.095, 0.71),
        Published("emulator + student", "GPT-2 medium", 0.964, 0.73),
        Published("explicit chain", "GPT-2 small", 1.0, 0.14), Published("explicit chain", "GPT-2 medium", 1.0, 0.14),
    ),
    "gsm8k": (
        Published("no chain", "GPT-2 small", 0.133, 1.0), Published("no chain", "GPT-2 medium", 0.17, 1.0),
        Published("emulator + student", "GPT-2 small", 0.2, 0.66),
        Published("emulator + student", "GPT-2 medium", 0.219, 0.66),
    ),
}  # fmt: skip
FOLDERS = {"4_by_4_mult": "4x4", "5_by_5_mult": "5x5", "gsm8k": "gsm8k"}  # as the published data are called


@dataclass
class Row:
    """The runs of one setting and stage."""

    axes: Mapping[str, Any]  # without the replicates; None where the axis is not the stage's
    method: str  # the stage, in a sweep without stages the kind
    kind: str  # a key of METHODS
    size: str | None  # a key of PUBLISHED
    values: dict[str, pd.Series] = field(default_factory=dict)  # of each run that has one

    def mean(self, name: str) -> float:
        return float(self.values[name].mean()) if name in self.values else math.nan

    @property
    def is_point(self) -> bool:
        """Has it a place in the figure?"""
        return not any(math.isnan(self.mean(name)) for name in ("exact_match", "relative_speed"))

    @property
    def panel_axes(self) -> dict[str, Any]:
        return {path: value for path, value in self.axes.items() if path != STAGE and value is not None}


def implicit_cot_report(results: Results, paper: bool = False) -> Report:
    """Table: one row a setting and stage, mean (lowest-highest) over the replicates, from the probe
    ChainOfThoughtEvaluation at each run's newest checkpoint. Figure: accuracy against speed, one panel a setting.

    `paper`: the paper's own points in grey, in panels of its tasks and sizes.
    """
    rows = read_rows(results)
    remarks = [
        f"values are mean (lowest-highest) over {results.replicate_axis}; speed: examples a second, relative to the "
        "same network that answers at once, measured in turns; one question at a time, and in a batch",
        "a student is given the states of a teacher that has read the true chain, and its speed is without that; state "
        "loss: the lowest of all evaluations",
    ]
    figures = {"accuracy_and_speed": draw(rows, paper)} if any(row.is_point for row in rows) else {}
    if paper and any(row.size in PUBLISHED for row in rows):
        remarks.append("grey: table 1 of arXiv 2311.01460, of pretrained networks on another device")
    return Report("Chains of thought: written, read, internalised", _table(rows), figures, tuple(remarks))


def kind_of(experiment: Experiment) -> str:
    """How a run's network comes to its answers."""
    for model, kind in (
        (CoupledStudent, "emulator + student"), (MindReadingStudent, "student"), (ThoughtEmulator, "emulator"),
    ):  # fmt: skip
        if isinstance(experiment.model, model):
            return kind
    if isinstance(experiment.objective, StepwiseInternalization):
        return "stepwise"
    form = getattr(experiment.task, "form", "none")
    return {"explicit": "explicit chain", "hidden": "chain given"}.get(form, "no chain")


def published_size(experiment: Experiment) -> str | None:
    """Which of the paper's tasks it is."""
    task = experiment.task
    if isinstance(task, MultiplicationChain):
        name = f"{task.digits}x{task.digits}"
        return name if name in PUBLISHED else None
    return FOLDERS.get(Path(task.path).name) if isinstance(task, ChainFiles) else None


def read_rows(results: Results) -> list[Row]:
    """Settings in the order of the sweep. Runs without results are left out."""
    assert results.folder is not None
    axes, rows = results.setting_axes, []
    groups = results.runs.groupby(axes, sort=False, dropna=False) if axes else [((), results.runs)]
    for key, runs in groups:
        experiment = results.folder.run(runs["run_id"].iloc[0]).experiment()
        values = pd.DataFrame([_values(results, run_id) for run_id in runs["run_id"]])
        missing = pd.Series(key, dtype=object).isna()
        named = {path: None if none else value for path, value, none in zip(axes, key, missing, strict=True)}
        kind = kind_of(experiment)
        found = {str(name): column.dropna() for name, column in values.items() if column.notna().any()}
        rows.append(Row(named, str(named.get(STAGE) or kind), kind, published_size(experiment), found))
    return [row for row in rows if row.values]


def _values(results: Results, run_id: str) -> dict[str, float]:
    scalars, _ = results.answer(run_id, ChainOfThoughtEvaluation.name())
    found = {name.removeprefix("chain/"): value for name, value in scalars.items()}
    mine = results.history[results.history["run_id"] == run_id]
    names = [name for name in mine if str(name).endswith(f"/{STATE_LOSS}") and mine[name].notna().any()]
    held_out = [name for name in names if "validation" in str(name)] or names
    if held_out:
        found[STATE_LOSS] = float(mine[held_out[0]].min())
    if TRAINING_SECONDS in mine and mine[TRAINING_SECONDS].notna().any():
        found[TRAINING_SECONDS] = float(mine[TRAINING_SECONDS].max())
    return found


def _table(rows: Sequence[Row]) -> pd.DataFrame:
    lines = []
    for row in rows:
        line = {short(path): "-" if value is None else format_value(value) for path, value in row.axes.items()}
        line |= {} if STAGE in row.axes else {"method": row.method}
        line["runs"] = str(max(len(values) for values in row.values.values()))
        columns = COLUMNS | {"state loss": (STATE_LOSS, "{:.3g}"), "train s": (TRAINING_SECONDS, "{:.0f}")}
        for label, (name, form) in columns.items():
            line[label] = spread(row.values.get(name, pd.Series(dtype=float)), form)
        lines.append(line)
    return pd.DataFrame(lines)


# ---- the figure ----


def panels(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Settings, each with the rows of it: a stage that some axes do not concern is in several."""
    settings: list[dict[str, Any]] = []
    for row in rows:
        if row.panel_axes not in settings:
            settings.append(row.panel_axes)
    whole = [one for one in settings if not any(one != other and one.items() <= other.items() for other in settings)]
    return [(setting, [row for row in rows if row.panel_axes.items() <= setting.items()]) for setting in whole]


def draw(rows: Sequence[Row], paper: bool = False) -> Figure:
    """Exact match over relative speed, logarithmic; bars from the lowest to the highest run. A hollow marker is a
    student, which is given what it does not find itself."""
    found = panels([row for row in rows if row.is_point])
    columns = min(MAX_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns + 2.4, 3.6 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for ax, (setting, mine) in zip(grid.flat, found, strict=False):
        if paper:
            _draw_published(ax, mine)
        for row in mine:
            _draw_row(ax, row)
        title = ", ".join(f"{short(path)} {format_value(value)}" for path, value in setting.items())
        _finish(ax, title)
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for ax in grid.flat[len(found) :]:
        ax.set_visible(False)
    low, high = grid[0, 0].get_xlim()  # of all
    grid[0, 0].set_xlim(min(low, 0.45), max(high, 1.3))
    figure.supxlabel("examples a second, relative to the same network without a chain", fontsize=10)
    figure.supylabel("exact match", fontsize=10)
    figure.legend(handles.values(), list(handles), loc="outside right center", frameon=False)
    return figure


def _draw_row(ax: Axes, row: Row) -> None:
    colour, marker = METHODS[row.kind]
    bars = []
    for name in ("relative_speed", "exact_match"):
        mean, values = row.mean(name), row.values[name]
        bars.append([[mean - values.min()], [values.max() - mean]])
    ax.errorbar(
        row.mean("relative_speed"), row.mean("exact_match"), xerr=bars[0], yerr=bars[1], fmt=marker, color=colour,
        markersize=8, markerfacecolor="white" if row.kind == "student" else colour, capsize=2.5, elinewidth=1.0,
        label=row.method, zorder=3,
    )  # fmt: skip


def _draw_published(ax: Axes, rows: Sequence[Row]) -> None:
    for size in dict.fromkeys(row.size for row in rows if row.size is not None):
        for point in PUBLISHED[size]:
            marker = METHODS[point.kind][1]
            ax.plot(
                point.relative_speed, point.accuracy, marker, color="0.8", markersize=6, zorder=1,
                markerfacecolor="0.85" if point.network.endswith("small") else "white",
                label=f"paper: {point.kind}, {point.network}",
            )  # fmt: skip


def _finish(ax: Axes, title: str) -> None:
    ax.set_xscale("log")
    ax.set_ylim(-0.04, 1.04)
    ax.xaxis.set_major_locator(FixedLocator(list(SPEEDS)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
    ax.grid(alpha=0.25)
    ax.tick_params(labelbottom=True, labelleft=True, labelsize=8)
    ax.set_title(title, fontsize=9)
