"""Delayed generalisation over a sweep: when training saturates, when held-out facts follow, and what never does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis.tables import short, spread
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import format_value

THRESHOLD = 0.9  # the accuracy whose first step is compared between splits


def grokking_report(
    results: Results,
    panel_axis: str,
    colour_axis: str,
    train: str = "train_inferred",
    held_out: str = "test_inferred_iid",
    ood: str = "test_inferred_ood",
) -> Report:
    """Table: one row a setting, mean (lowest-highest) over the replicates. Figure: accuracy against log steps."""
    table = summarise(results, train, held_out, ood)
    figure = draw(results, panel_axis, colour_axis, {"train": train, "held-out": held_out, "out of distribution": ood})
    remarks = (
        f"step of {THRESHOLD:.0%}: first evaluation at or above it; lag: held-out step / train step; "
        f"values are mean (lowest-highest) over {results.replicate_axis}; > means not reached by then",
    )
    return Report("Grokking: when train and held-out accuracy rise", table, {"grokking": figure}, remarks)


def first_step(curve: pd.DataFrame, threshold: float = THRESHOLD) -> float:
    """The first step at which the value is at least the threshold; NaN if it never is."""
    above = curve.loc[curve["value"] >= threshold, "step"]
    return float(above.min()) if len(above) else float("nan")


def per_run(results: Results, train: str, held_out: str, ood: str) -> pd.DataFrame:
    """One row a run: first steps, lag, last accuracies, OOD maximum."""
    rows = []
    curves = {name: results.curves(f"eval/{name}/accuracy") for name in (train, held_out, ood)}
    for run in results.runs.to_dict("records"):
        mine = {name: curve[curve["run_id"] == run["run_id"]].sort_values("step") for name, curve in curves.items()}
        if not len(mine[train]):
            continue
        train_step, held_out_step = first_step(mine[train]), first_step(mine[held_out])
        rows.append(
            {
                **{path: run[path] for path in results.axes},
                "train_step": train_step,
                "held_out_step": held_out_step,
                "lag": held_out_step / train_step,
                "last_step": run["step"],
                **{f"{short}_accuracy": mine[name]["value"].iloc[-1] for short, name in
                   (("train", train), ("held_out", held_out), ("ood", ood)) if len(mine[name])},
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def summarise(results: Results, train: str, held_out: str, ood: str) -> pd.DataFrame:
    """One row a setting, as text ready to read."""
    runs = per_run(results, train, held_out, ood)
    axes = results.setting_axes
    rows = []
    for key, group in runs.groupby(axes, sort=True) if axes else [((), runs)]:
        key = key if isinstance(key, tuple) else (key,)
        rows.append(
            {
                **{short(path): format_value(value) for path, value in zip(axes, key, strict=True)},
                "runs": len(group),
                f"step of {THRESHOLD:.0%} train": _steps(group["train_step"], group["last_step"]),
                f"step of {THRESHOLD:.0%} held-out": _steps(group["held_out_step"], group["last_step"]),
                "lag": spread(group["lag"], "{:.1f}x"),
                "train": spread(group["train_accuracy"], "{:.2f}"),
                "held-out": spread(group["held_out_accuracy"], "{:.2f}"),
                "OOD": spread(group["ood_accuracy"], "{:.2f}") if "ood_accuracy" in group else "-",
            }
        )
    return pd.DataFrame(rows)


def _steps(values: pd.Series, last: pd.Series) -> str:
    if values.isna().all():
        return f"> {int(last.max())}"
    text = spread(values.dropna(), "{:.0f}")
    return f"{text}, > in {int(values.isna().sum())}" if values.isna().any() else text


def draw(results: Results, panel_axis: str, colour_axis: str, splits: Mapping[str, str]) -> Figure:
    """One panel for each value of `panel_axis`, one colour for each of `colour_axis`, one line style for each split.

    Lines are means over the replicates, bands their range.
    """
    panels = sorted(results.runs[panel_axis].unique())
    colours = sorted(results.runs[colour_axis].unique())
    palette = colormaps["viridis"](np.linspace(0.08, 0.85, len(colours)))
    figure = Figure(figsize=(4.2 * len(panels) + 1.9, 4.0), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for (label, split), style in zip(splits.items(), ("--", "-", ":"), strict=True):
        curves = results.curves(f"eval/{split}/accuracy")
        for ax, panel in zip(axes, panels, strict=True):
            for colour, value in zip(palette, colours, strict=True):
                mine = curves[(curves[panel_axis] == panel) & (curves[colour_axis] == value)]
                _draw_mean_and_range(ax, mine, colour, style)
        axes[0].plot([], [], color="0.3", linestyle=style, label=label)  # for the legend
    for ax, panel in zip(axes, panels, strict=True):
        ax.set(title=f"{short(panel_axis)} = {format_value(panel)}", xlabel="step", xscale="log", ylim=(-0.03, 1.03))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy")
    for colour, value in zip(palette, colours, strict=True):
        axes[0].plot([], [], color=colour, linewidth=3, label=f"{short(colour_axis)} {format_value(value)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _draw_mean_and_range(ax: Axes, curves: pd.DataFrame, colour: np.ndarray, style: str) -> None:
    """A run that ended early keeps its last value in the mean."""
    if not len(curves):
        return
    wide = curves[curves["step"] > 0].pivot_table(index="step", columns="run_id", values="value").sort_index().ffill()
    ax.plot(wide.index, wide.mean(axis=1), color=colour, linestyle=style, linewidth=1.8)
    ax.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.15, linewidth=0)
