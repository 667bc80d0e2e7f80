"""Circuits over training: what lens and tracing found in each checkpoint of a run, beside the run's own curves.

Everything is read from the probes' scalars (`trace/<target>/<role>/layer_<l>/<measure>`, `lens/<fact>/layer_<l>/mrr`)
and from the run's journal. Drawn as the paper does (arXiv 2405.15071, Figures 4, 5, 10-12): causal strengths when
training accuracy saturates, at the end, and their difference; reciprocal ranks of the facts over the steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from groundswell import probes
from groundswell.probes import Findings
from groundswell.rundir import RunFolder

SATURATED = 0.99  # training accuracy at which grokking is said to start
MARKS = (0.5, 0.9, 0.99)  # held-out accuracies whose first step is marked
MAX_PANELS = 12  # of small multiples
ScalarsByStep = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Phases:
    """First steps: training accuracy at SATURATED (None: never), held-out accuracy at each of MARKS reached."""

    saturated: int | None
    held_out: dict[float, int]

    def start(self, steps: Sequence[int]) -> int:
        """The checkpoint at which grokking starts: the first one with training saturated, else the first of all."""
        later = [step for step in sorted(steps) if self.saturated is not None and step >= self.saturated]
        return later[0] if later else min(steps)

    def table(self) -> pd.DataFrame:
        rows = [(f"training accuracy {SATURATED:.0%}", self.saturated)]
        rows += [(f"held-out accuracy {mark:.0%}", self.held_out.get(mark)) for mark in MARKS]
        return pd.DataFrame(rows, columns=["phase", "step"]).astype({"step": "Int64"})


@dataclass(frozen=True)
class Curves:
    """A run's own readings, each as steps and values."""

    readings: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, folder: RunFolder) -> Curves:
        found: dict[str, list[tuple[int, float]]] = {}
        for line in folder.journal():
            for name, value in line["metrics"].items():
                found.setdefault(name, []).append((line["step"], value))
        return cls({name: tuple(np.array(x) for x in zip(*pairs, strict=True)) for name, pairs in found.items()})  # type: ignore[misc]

    def accuracy(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self.get(f"eval/{split}/accuracy")

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.readings.get(name, (np.array([]), np.array([])))

    def phases(self, train: str, held_out: str) -> Phases:
        marks = {mark: self._first(held_out, mark) for mark in MARKS}
        return Phases(self._first(train, SATURATED), {mark: step for mark, step in marks.items() if step is not None})

    def _first(self, split: str, share: float) -> int | None:
        steps, values = self.accuracy(split)
        return int(steps[values >= share][0]) if (values >= share).any() else None


# ---- from scalars to arrays ----


def targets_of(found: ScalarsByStep) -> list[str]:
    names = (re.match(r"trace/([^/]+)/[^/]+/layer_", name) for scalars in found.values() for name in scalars)
    return list(dict.fromkeys(match[1] for match in names if match))


def strengths(found: ScalarsByStep, target: str, measure: str) -> tuple[list[str], np.ndarray]:
    """-> roles, [steps, layers, roles] with NaN where nothing was measured."""
    return _array(found, rf"trace/{re.escape(target)}/([^/]+)/layer_(\d+)/{measure}", first_layer=1)


def reciprocal_ranks(found: ScalarsByStep) -> tuple[list[str], np.ndarray]:
    """-> facts, [steps, layers from 0, facts]."""
    return _array(found, r"lens/([^/]+)/layer_(\d+)/mrr", first_layer=0)


def _array(found: ScalarsByStep, pattern: str, first_layer: int) -> tuple[list[str], np.ndarray]:
    cells = [
        (row, int(match[2]) - first_layer, match[1], value)
        for row, step in enumerate(sorted(found))
        for name, value in found[step].items()
        if (match := re.fullmatch(pattern, name))
    ]
    labels = list(dict.fromkeys(label for _, _, label, _ in cells))
    depth = max((layer for _, layer, _, _ in cells), default=-1) + 1
    values = np.full((len(found), depth, len(labels)), np.nan)
    for row, layer, label, value in cells:
        values[row, layer, labels.index(label)] = value
    return labels, values


# ---- one run ----


def tracing_over_time(folder: RunFolder, answers: Mapping[int, Path], split: str, held_out: str) -> Findings | None:
    """Figures of each target, and all effects of all checkpoints as one table."""
    found = {step: probes.scalars(path) for step, path in answers.items()}
    if not found:
        return None
    phases = Curves.of(folder).phases(split, held_out)
    table = pd.concat(
        [pd.read_csv(path / "effects.csv").assign(step=step) for step, path in sorted(answers.items())],
        ignore_index=True,
    )
    figures: dict[str, Figure] = {}
    for target in targets_of(found):
        figures[f"circuit-{target}"] = draw_change(found, target, phases)
        if len(found) > 1 and strengths(found, target, "strength")[1].size:
            figures[f"circuit_over_time-{target}"] = draw_small_multiples(found, target, phases)
    last = table[(table["step"] == table["step"].max()) & (table["part"] != "states")]
    for target, mine in last.groupby("target"):
        figures[f"parts-{str(target).replace('@', '_layer_')}"] = draw_parts(mine)
    return Findings(tables={"effects": table, "phases": phases.table()}, figures=figures)


def lens_over_time(folder: RunFolder, answers: Mapping[int, Path], split: str, held_out: str) -> Findings | None:
    found = {step: probes.scalars(path) for step, path in answers.items()}
    if len(found) < 2:
        return None
    curves = Curves.of(folder)
    phases = curves.phases(split, held_out)
    figure = draw_facts(found, curves, phases, split, held_out)
    return Findings(tables={"phases": phases.table()}, figures={"facts": figure})


# ---- figures ----


def draw_change(found: ScalarsByStep, target: str, phases: Phases) -> Figure:
    """Heat maps layers x roles: at the start of grokking, at the end, and the difference; one row for each measure."""
    steps = sorted(found)
    start, end = steps.index(phases.start(steps)), len(steps) - 1
    measures = {"strength": "of what was right before", "altered": "as published"}
    figure = Figure(figsize=(9.0, 6.6), layout="constrained")
    grid = figure.subplots(len(measures), 3, squeeze=False)
    for row, (measure, meaning) in zip(grid, measures.items(), strict=True):
        roles, values = strengths(found, target, measure)
        draw_heat_map(row[0], values[start], roles, f"start of grokking (step {steps[start]})")
        draw_heat_map(row[1], values[end], roles, f"end (step {steps[end]})")
        draw_heat_map(row[2], values[end] - values[start], roles, "end - start", difference=True)
        row[0].set_ylabel(f"causal strength\n{meaning}\nlayer")
    never = "" if phases.saturated is not None else f"; training never reached {SATURATED:.0%}"
    figure.suptitle(f"What replacing a state does to {_title(target)}{never}", fontsize=10)
    return figure


def _title(target: str) -> str:
    return "the answer" if target == "answer" else target.replace("_layer_", " at layer ")


def draw_heat_map(
    ax: Axes, values: np.ndarray, columns: Sequence[str], title: str, difference: bool = False, numbers: bool = True
) -> None:
    """values [layers, columns], layer 1 at the bottom."""
    ax.set_title(title, fontsize=9)
    if not values.size:  # for instance: no example was right before a patch
        ax.text(0.5, 0.5, "no examples", ha="center", va="center", transform=ax.transAxes)
        return
    scale = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if difference else {"cmap": "viridis", "vmin": 0, "vmax": 1}
    ax.imshow(values, origin="lower", aspect="auto", **scale)  # type: ignore[arg-type]
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(values)), [str(layer) for layer in range(1, len(values) + 1)])
    for (layer, column), value in np.ndenumerate(values if numbers else np.empty((0, 0))):
        dark = abs(value) > 0.6 if difference else value < 0.5
        text = "-" if np.isnan(value) else f"{value:+.2f}" if difference else f"{value:.2f}"
        ax.text(column, layer, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def draw_small_multiples(found: ScalarsByStep, target: str, phases: Phases) -> Figure:
    """The heat map at each checkpoint (evenly chosen ones where there are many)."""
    steps = sorted(found)
    roles, values = strengths(found, target, "strength")
    start = phases.start(steps)
    even = np.linspace(0, len(steps) - 1, min(MAX_PANELS - 1, len(steps))).round().astype(int)
    shown = np.unique([*even, steps.index(start)])
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.7 * columns + 0.6, 2.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, index in zip(grid.flat, shown, strict=False):
        note = "\nstart of grokking" if steps[index] == start and phases.saturated is not None else ""
        draw_heat_map(ax, values[index], roles, f"step {steps[index]}{note}", numbers=False)
    for ax in grid.flat[len(shown) :]:
        ax.set_visible(False)
    for row in grid:
        row[0].set_ylabel("layer")
    figure.colorbar(grid[0, 0].images[0], ax=grid, label="causal strength")
    figure.suptitle(f"Effect on {_title(target)} as training goes on", fontsize=10)
    return figure


def draw_facts(found: ScalarsByStep, curves: Curves, phases: Phases, train: str, held_out: str) -> Figure:
    """Accuracies, reciprocal rank of each fact layer by layer, and the weight norm, over log steps."""
    steps = np.array(sorted(found))
    facts, values = reciprocal_ranks(found)
    figure = Figure(figsize=(3.3 * (len(facts) + 2), 3.4), layout="constrained")
    axes = figure.subplots(1, len(facts) + 2, squeeze=False)[0]
    draw_accuracies(axes[0], curves, train, held_out)
    for ax, fact, by_layer in zip(axes[1:-1], facts, values.transpose(2, 1, 0), strict=True):
        draw_layers(ax, steps, by_layer)
        ax.set(title=f"MRR of {fact}", ylim=(-0.03, 1.03))
    axes[-2].legend(title="layer", fontsize=7, title_fontsize=7, frameon=False)
    x, y = curves.get("train/weight_norm")
    axes[-1].plot(x, y, color="0.3")
    axes[-1].set_title("weight norm")
    for ax in axes:
        finish_steps(ax, phases)
    return figure


def finish_steps(ax: Axes, phases: Phases) -> None:
    """An axis of steps, and the phases on it."""
    ax.set(xscale="log", xlabel="step")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    draw_phases(ax, phases)


def draw_accuracies(ax: Axes, curves: Curves, train: str, held_out: str) -> None:
    ood = held_out.replace("iid", "ood")
    lines = {
        "train": (train, "--", "tab:red"),
        "held-out": (held_out, "-", "tab:green"),
        "OOD": (ood, ":", "tab:purple"),
    }
    for label, (split, style, colour) in lines.items():
        x, y = curves.accuracy(split)
        if len(x) and (label != "OOD" or ood != held_out):
            ax.plot(x[x > 0], y[x > 0], style, color=colour, label=label)
    ax.set(title="accuracy", ylim=(-0.03, 1.03))
    ax.legend(fontsize=7, frameon=False)


def draw_layers(ax: Axes, steps: np.ndarray, by_layer: np.ndarray) -> None:
    """by_layer [layers from 0, steps]."""
    from matplotlib import colormaps

    palette = colormaps["plasma"](np.linspace(0.0, 0.88, len(by_layer)))
    for layer, (colour, line) in enumerate(zip(palette, by_layer, strict=True)):
        ax.plot(steps, line, color=colour, marker=".", markersize=3, linewidth=1.2, label=str(layer))


def draw_phases(ax: Axes, phases: Phases) -> None:
    """Dashed red: training accuracy saturates; green: held-out accuracy reaches each of MARKS, the last one darkest."""
    if phases.saturated is not None:
        ax.axvline(phases.saturated, color="tab:red", linestyle="--", linewidth=0.9)
    for mark, step in phases.held_out.items():
        ax.axvline(step, color="tab:green", linewidth=0.8, alpha=0.35 + 0.6 * (mark == max(MARKS)))


def draw_parts(table: pd.DataFrame) -> Figure:
    """One panel a role: layers x heads (the last column: the whole MLP), causal strength of what was right before."""
    roles = list(dict.fromkeys(table["role"]))
    figure = Figure(figsize=(3.0 * len(roles) + 0.8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(roles), squeeze=False)[0]
    for ax, role in zip(axes, roles, strict=True):
        wide = table[table["role"] == role].pivot_table(index="layer", columns="head", values="strength", dropna=False)
        heads = [head for head in wide.columns if head >= 0]
        order = [*heads, *([-1] if -1 in wide.columns else [])]
        labels = [f"head {head}" if head >= 0 else "MLP" for head in order]
        draw_heat_map(ax, wide[order].to_numpy(), labels, f"at {role}", numbers=False)
        ax.tick_params(axis="x", rotation=90)
    axes[0].set_ylabel("layer")
    figure.colorbar(axes[0].images[0], ax=axes, label="causal strength")
    return figure
