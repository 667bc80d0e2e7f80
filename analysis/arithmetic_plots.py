"""Figures and the report of length generalisation: heat maps over operand lengths, curves over equal lengths, sweeps.

Arrays [first, second] hold the accuracy of operand lengths (a, b) at [a - 1, b - 1], NaN where nothing was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.tables import settings_of, short, spread
from groundswell.report import Report
from groundswell.results import Answer, Results
from groundswell.sweep import format_value

REGIONS = {"in_distribution": "in distribution", "out_of_distribution": "out of distribution", "over_100": "100+"}
ANNOTATED = 26  # cells a side up to which their values are legible
PROBE = "length_grid"
OPERANDS = ("length of the first operand", "length of the second operand")
SORTING = ("most digits of a number", "numbers in the array")


# ---- one grid ----


def draw_grid(accuracy: np.ndarray, trained: tuple[int, int], title: str) -> Figure:
    """A heat map in percent; the red rectangle is what was trained."""
    figure = Figure(figsize=(7.4, 6.2), layout="constrained")
    ax = figure.subplots()
    image = draw_cells(ax, accuracy, trained, title)
    figure.colorbar(image, ax=ax, label="percent")
    return figure


def draw_pair(exact: np.ndarray, first: np.ndarray, trained: tuple[int, int]) -> Figure:
    """Sorting: the whole array right beside its smallest number right."""
    figure = Figure(figsize=(13.4, 6.0), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, grid, name in zip(axes, (exact, first), ("exact", "smallest number"), strict=True):
        image = draw_cells(ax, grid, trained, f"{name}: mean {100 * np.nanmean(grid):.1f} %", SORTING)
    figure.colorbar(image, ax=axes, label="percent")
    return figure


def draw_cells(
    ax: Axes, accuracy: np.ndarray, trained: tuple[int, int], title: str, labels: tuple[str, str] = OPERANDS
) -> AxesImage:
    """Rows are first lengths, columns second ones, both from 1 on."""
    rows, columns = accuracy.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    colours = colormaps["YlGnBu"].with_extremes(bad="0.9")
    image = ax.imshow(100 * accuracy, extent=extent, vmin=0, vmax=100, cmap=colours, interpolation="nearest")
    seen = min(trained[0], rows), min(trained[1], columns)
    ax.add_patch(Rectangle((0.5, 0.5), seen[1], seen[0], fill=False, edgecolor="red", linewidth=1.8, clip_on=False))
    if max(rows, columns) <= ANNOTATED:
        size = min(9.0, 110 / max(rows, columns))
        for (row, column), value in np.ndenumerate(100 * accuracy):
            if not np.isnan(value):
                colour = "white" if value > 60 else "black"
                ax.text(column + 1, row + 1, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    ax.set(title=title, ylabel=labels[0], xlabel=labels[1])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=11, integer=True, min_n_ticks=1))
    return image


def draw_steps(table: pd.DataFrame) -> Figure:
    """One run's regions over its checkpoints; `table` has step and grid/<region>/accuracy."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.subplots()
    for region, label in REGIONS.items():
        if f"grid/{region}/accuracy" in table:
            ax.plot(table["step"], table[f"grid/{region}/accuracy"], marker="o", markersize=3, label=label)
    ax.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return figure


# ---- a sweep ----


@dataclass(frozen=True)
class _Asked:
    """What the probe found in one run."""

    axes: Mapping[str, Any]
    answers: Mapping[int, Answer]  # by step, ascending

    @property
    def last_step(self) -> int:
        return max(self.answers)

    @property
    def best_step(self) -> int:
        """Of the highest mean out of distribution (the first of several); where nothing is, in distribution."""
        regions = [f"grid/{region}/accuracy" for region in ("out_of_distribution", "over_100", "in_distribution")]
        region = next(name for name in regions if name in self.answers[self.last_step][0])
        return max(self.answers, key=lambda step: (self.answers[step][0].get(region, -1.0), -step))

    def step(self, which: str) -> int:
        return self.best_step if which == "best" else self.last_step

    def scalar(self, which: str, region: str) -> float:
        return self.answers[self.step(which)][0].get(f"grid/{region}/accuracy", float("nan"))

    def array(self, which: str, name: str) -> np.ndarray:
        return self.answers[self.step(which)][1][name]

    @property
    def trained(self) -> tuple[int, int]:
        first, second = self.array("last", "trained").tolist()
        return int(first), int(second)


def arithmetic_report(
    results: Results, panel_axis: str | None, colour_axis: str, metric: str = "accuracy", probe: str = PROBE
) -> Report:
    """Table: one row a setting, mean (lowest-highest) over the replicates, of the last and the best checkpoint.
    Figures: accuracy by equal length; heat maps of settings where whole grids were asked, mean over the replicates.

    `metric` is the array that is drawn: `accuracy_without_end` for sorting, which draws pairs of heat maps.
    """
    asked = _load(results, probe)
    table = _summarise(results, asked)
    remarks = (
        "accuracy: exact match, mean over cells of operand lengths; in distribution: both as long as in training or "
        "shorter; 100+: longer than 100",
        "best: the checkpoint with the highest accuracy out of distribution, chosen by just that accuracy",
        f"values are mean (lowest-highest) over {results.replicate_axis}",
    )
    figures: dict[str, Figure] = {}
    for which in ("last", "best") if asked else ():
        curves = draw_lengths(list(asked.values()), panel_axis, colour_axis, which, metric)
        figures["lengths" if which == "last" else "lengths_best"] = curves
    grids = draw_settings(results, asked, metric) if asked else None
    if grids is not None:
        figures["grids"] = grids
    return Report("Length generalisation", table, figures, remarks)


def _load(results: Results, probe: str) -> dict[str, _Asked]:
    found = {}
    for run in results.runs.to_dict("records"):
        answers = results.answers(run["run_id"], probe)
        if answers:
            found[run["run_id"]] = _Asked({path: run[path] for path in results.axes}, answers)
    return found


def _summarise(results: Results, asked: Mapping[str, _Asked]) -> pd.DataFrame:
    rows = []
    for key, runs in settings_of(results):
        mine = [asked[run_id] for run_id in runs["run_id"] if run_id in asked]
        if not mine:
            continue
        row: dict[str, Any] = {
            short(path): format_value(value) for path, value in zip(results.setting_axes, key, strict=True)
        }
        row |= {"runs": len(mine), "last step": spread(pd.Series([run.last_step for run in mine]), "{:.0f}")}
        for which in ("last", "best"):
            if which == "best":
                row["best step"] = spread(pd.Series([run.best_step for run in mine]), "{:.0f}")
            for region, label in REGIONS.items():
                values = pd.Series([run.scalar(which, region) for run in mine], dtype=float)
                if values.notna().any():
                    row[f"{label} ({which})"] = spread(values, "{:.2f}")
        rows.append(row)
    return pd.DataFrame(rows)


def draw_lengths(
    runs: Sequence[_Asked], panel_axis: str | None, colour_axis: str, which: str = "last", metric: str = "accuracy"
) -> Figure:
    """Accuracy where both operands have one length: a panel for each value of `panel_axis`, a colour for each of
    `colour_axis`; lines are means over runs, bands their range, the dashed line is the end of the training lengths."""
    panels = list(dict.fromkeys(run.axes[panel_axis] for run in runs)) if panel_axis else [None]
    colours = list(dict.fromkeys(run.axes[colour_axis] for run in runs))
    palette = colormaps["viridis"](np.linspace(0.08, 0.85, len(colours)))
    figure = Figure(figsize=(4.2 * len(panels) + 1.9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        here = [run for run in runs if panel_axis is None or run.axes[panel_axis] == panel]
        for value, colour in zip(colours, palette, strict=True):
            _draw_mean_and_range(
                ax, [run.array(which, metric) for run in here if run.axes[colour_axis] == value], colour
            )
        for length in sorted({min(run.trained) for run in here}):
            ax.axvline(length, color="red", linestyle="--", linewidth=1)
        title = f"{which} checkpoint" if panel is None else f"{short(str(panel_axis))} = {format_value(panel)}"
        ax.set(title=title, xlabel="length of both operands", ylim=(-0.03, 1.03))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy")
    for value, colour in zip(colours, palette, strict=True):
        axes[0].plot([], [], color=colour, linewidth=3, label=f"{short(colour_axis)} {format_value(value)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _draw_mean_and_range(ax: Axes, grids: Sequence[np.ndarray], colour: np.ndarray) -> None:
    if not grids:
        return
    longest = min(min(grid.shape) for grid in grids)
    diagonals = np.stack([np.diagonal(grid)[:longest] for grid in grids])
    lengths = np.flatnonzero(~np.isnan(diagonals).any(0))
    values = diagonals[:, lengths]
    ax.plot(lengths + 1, values.mean(0), color=colour, linewidth=1.8, marker="o", markersize=2.5)
    ax.fill_between(lengths + 1, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def draw_settings(results: Results, asked: Mapping[str, _Asked], metric: str) -> Figure | None:
    """A heat map for each setting whose runs were asked whole grids: mean over the replicates' last checkpoints.
    Sorting has two, exact and smallest number. None where only equal lengths were asked."""
    names = [metric, "first_accuracy"] if metric == "accuracy_without_end" else [metric]
    labels = SORTING if len(names) > 1 else OPERANDS
    drawn = []
    for key, runs in settings_of(results):
        mine = [asked[run_id] for run_id in runs["run_id"] if run_id in asked]
        grids = [[_square(run.array("last", name)) for run in mine] for name in names]
        if not mine or min(grids[0][0].shape) < 2 or len({grid.shape for grid in grids[0]}) > 1:
            continue
        title = "\n".join(
            f"{short(path)} = {format_value(value)}" for path, value in zip(results.setting_axes, key, strict=True)
        )
        drawn.append((title, [np.mean(each, axis=0) for each in grids], mine[0].trained))
    if not drawn:
        return None
    columns = len(names) * min(len(drawn), 3 if len(names) == 1 else 1)
    rows = -(-len(drawn) * len(names) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.8, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    panels = [(t, n, g, trained) for t, each, trained in drawn for n, g in zip(names, each, strict=True)]
    for ax, (title, name, grid, trained) in zip(axes, panels, strict=False):
        what = {"first_accuracy": "smallest number: ", "accuracy_without_end": "exact: "}.get(name, "")
        image = draw_cells(ax, grid, trained, f"{title}\n{what}mean {100 * np.nanmean(grid):.1f} %", labels)
        ax.title.set_fontsize(9)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=axes.tolist(), label="percent")
    return figure


def _square(grid: np.ndarray) -> np.ndarray:
    """The part where everything was asked: what lies before the first row and column with a gap."""
    whole = ~np.isnan(grid)
    rows = int(np.argmin([*whole[:, 0], False]))
    columns = int(np.argmin([*whole[0], False]))
    return grid[:rows, :columns] if whole[:rows, :columns].all() else grid[:0, :0]
