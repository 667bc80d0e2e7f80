"""The end of a sweep: a table on the terminal and in files, figures, and what went wrong."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from groundswell.files import atomic_write
from groundswell.results import Results
from groundswell.rundir import SweepFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from groundswell.sweep import Sweep


@dataclass(frozen=True)
class Report:
    """What an analysis makes of a sweep's results."""

    title: str
    table: pd.DataFrame  # one row a setting, ready to print
    figures: dict[str, Figure] = field(default_factory=dict)  # file stem -> figure
    remarks: tuple[str, ...] = ()


def default_report(results: Results, metric: str) -> Report:
    """Last value of the sweep's metric for each setting: mean and range over the replicates."""
    curves = results.curves(metric)
    last = curves.sort_values("step").groupby("run_id", as_index=False).last()
    axes = results.setting_axes
    groups = last.groupby(axes, as_index=False) if axes else last.assign(all="all").groupby("all", as_index=False)
    table = groups.agg(
        **{
            metric: ("value", "mean"),
            "lowest": ("value", "min"),
            "highest": ("value", "max"),
            "runs": ("value", "size"),
        }
    )
    return Report(f"{metric} at the last evaluation", table)


def pareto_front(results: Results, objectives: Mapping[str, Literal["max", "min"]]) -> pd.DataFrame:
    """Settings of which no other is as good in all metrics and better in one: axes, and each metric's last value, mean
    over the replicates. Best in the first metric first."""
    axes = results.setting_axes
    columns = []
    for metric in objectives:
        last = results.curves(metric).sort_values("step").groupby("run_id", as_index=False).last()
        columns.append(last.groupby(axes)["value"].mean().rename(metric).reset_index())
    table = functools.reduce(lambda left, right: left.merge(right, on=axes), columns)
    better = np.stack([table[m].to_numpy() * (1 if mode == "max" else -1) for m, mode in objectives.items()], axis=1)
    others, own = better[None, :, :], better[:, None, :]
    beaten = np.any(np.all(others >= own, axis=2) & np.any(others > own, axis=2), axis=1)
    first, mode = next(iter(objectives.items()))
    return table[~beaten].sort_values(first, ascending=mode == "min")


def finish_report(sweep: Sweep, results: Results, folder: SweepFolder, console: Console) -> dict[str, Path]:
    """Make, save and print the report. Returns artifact path -> file, for the parent run."""
    report = sweep.report(results) if sweep.report else default_report(results, sweep.metric)
    saved = save_report(report, results, folder.path)
    print_table(report, console)
    if sweep.also and results.setting_axes:
        front = pareto_front(results, sweep.objectives)
        saved["tables/pareto_front.csv"] = folder.path / "tables" / "pareto_front.csv"
        atomic_write(saved["tables/pareto_front.csv"], front.to_csv(index=False))
        print_table(Report("Settings that no other beats in all of them (Pareto front)", front), console)
    for remark in report.remarks:
        console.print(remark, soft_wrap=True, highlight=False)
    print_troubles(results, console)
    for name, path in saved.items():
        if name == "tables/summary.csv" or path.suffix == ".png":
            console.print(f"saved {path}", soft_wrap=True, highlight=False)
    return saved


def save_report(report: Report, results: Results, folder: Path) -> dict[str, Path]:
    saved: dict[str, Path] = {}
    for stem, table in (("summary", report.table), ("runs", results.runs), ("history", results.history)):
        saved[f"tables/{stem}.csv"] = folder / "tables" / f"{stem}.csv"
        atomic_write(saved[f"tables/{stem}.csv"], table.to_csv(index=False))
        saved[f"tables/{stem}.parquet"] = folder / "tables" / f"{stem}.parquet"
        atomic_write(saved[f"tables/{stem}.parquet"], _as_parquet(table))
    for stem, figure in report.figures.items():
        for kind in ("png", "pdf"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150)
            saved[f"figures/{stem}.{kind}"] = folder / "figures" / f"{stem}.{kind}"
            atomic_write(saved[f"figures/{stem}.{kind}"], buffer.getvalue())
    return saved


def _as_parquet(table: pd.DataFrame) -> bytes:
    """Columns of mixed kinds (an axis of numbers and texts) are stored as text."""
    table = table.copy()
    for column in table.columns:
        if table[column].dtype == object:
            table[column] = table[column].map(str, na_action="ignore")
    return table.to_parquet(index=False)


def print_table(report: Report, console: Console) -> None:
    table = Table(title=report.title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in report.table.columns:
        numeric = pd.api.types.is_numeric_dtype(report.table[column])
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    for row in report.table.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def print_troubles(results: Results, console: Console) -> None:
    """Runs that failed or diverged, one line each."""
    for state, style in (("failed", "red"), ("diverged", "yellow")):
        for row in results.runs[results.runs["state"] == state].to_dict("records"):
            told = escape(f"{row['name']} ({row['run_id']}): {row['error'] or row['reason']}")
            console.print(f"[{style}]{state}[/] {told}", soft_wrap=True, highlight=False)
