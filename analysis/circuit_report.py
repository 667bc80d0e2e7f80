"""The report of a sweep whose checkpoints were all read and traced: how circuits form, setting by setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.causal_tracing import CausalTracing
from analysis.circuits import (
    SATURATED,
    Curves,
    Phases,
    ScalarsByStep,
    draw_accuracies,
    draw_heat_map,
    draw_layers,
    finish_steps,
    reciprocal_ranks,
    strengths,
)
from analysis.logit_lens import LogitLens
from analysis.tables import settings_of, short, spread
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import format_value

TRAIN, HELD_OUT, OOD = "train_inferred", "test_inferred_iid", "test_inferred_ood"
NUM_FACTS = 2  # of each task: b and r2, val1 and val2


def circuits_report(results: Results) -> Report:
    """Table: one row a setting. Figure: one row a setting, of its first replicate."""
    rows, drawn = [], {}
    for key, runs in settings_of(results):
        label = "\n".join(
            format_value(value) if path == "task" else f"{short(path)} = {format_value(value)}"
            for path, value in zip(results.setting_axes, key, strict=True)
        )
        found = (_Run.of(results, run_id) for run_id in runs["run_id"])
        opened = [run for run in found if run is not None]
        if opened:
            rows.append({short(p): format_value(v) for p, v in zip(results.setting_axes, key, strict=True)}
                        | _row(opened))  # fmt: skip
            drawn[label] = opened[0]
    remarks = (
        f"start: the first checkpoint with training accuracy {SATURATED:.0%} (the first of all where it never comes); "
        "end: the last one. Fact: reciprocal rank (MRR) of an intermediate fact at its own position, after the layer "
        "where it stands out most at the end. State: causal strength on the answer of the state whose strength grows "
        "most, of examples that were right before the patch",
        "figure: dashed red lines mark 99 % training accuracy, green ones 50, 90 and 99 % held-out accuracy",
        f"values are mean (lowest-highest) over {results.replicate_axis}",
    )
    figures = {"circuits": draw(drawn)} if drawn else {}
    return Report("Circuits: what forms while held-out accuracy rises", pd.DataFrame(rows), figures, remarks)


class _Run:
    """One run's curves and what the probes found, step by step."""

    def __init__(self, curves: Curves, lens: ScalarsByStep, traced: ScalarsByStep) -> None:
        self.curves, self.lens, self.traced = curves, lens, traced
        self.steps = sorted(traced)
        self.phases: Phases = curves.phases(TRAIN, HELD_OUT)
        self.start = self.steps.index(self.phases.start(self.steps))
        self.facts, self.ranks = reciprocal_ranks(lens)
        self.roles, self.strength = strengths(traced, "answer", "strength")

    @classmethod
    def of(cls, results: Results, run_id: str) -> _Run | None:
        assert results.folder is not None
        lens, traced = (
            {step: found for step, (found, _) in results.answers(run_id, probe.name()).items()}
            for probe in (LogitLens, CausalTracing)
        )
        common = sorted(set(lens) & set(traced))
        if not common:
            return None
        folder = results.folder.run(run_id)
        return cls(Curves.of(folder), {s: lens[s] for s in common}, {s: traced[s] for s in common})

    def last(self, split: str) -> float:
        _, values = self.curves.accuracy(split)
        return float(values[-1]) if len(values) else float("nan")

    def fact(self, name: str) -> tuple[int, float, float]:
        """Layer before the last one where it stands out most at the end, MRR at the start and at the end."""
        values = self.ranks[:, 1:-1, self.facts.index(name)]
        layer = int(np.nanargmax(values[-1]))
        return layer + 1, float(values[self.start, layer]), float(values[-1, layer])

    def grown(self) -> tuple[str, int, float, float] | None:
        """Role and layer of the state whose strength grows most, and that at the start and at the end. None where no
        example was right at one of them."""
        change = self.strength[-1] - self.strength[self.start]
        if np.isnan(change).all():
            return None
        layer, role = np.unravel_index(np.nanargmax(change), change.shape)
        return (
            self.roles[role],
            int(layer) + 1,
            float(self.strength[self.start, layer, role]),
            float(self.strength[-1, layer, role]),
        )


def _row(runs: Sequence[_Run]) -> dict[str, str]:
    first = runs[0]

    def steps(values: Sequence[float | None]) -> str:
        known = pd.Series([value for value in values if value is not None], dtype=float)
        missing = len(values) - len(known)
        return spread(known, "{:.0f}") + (f", never in {missing}" if missing else "")

    row = {
        "runs": str(len(runs)),
        "step of 99 % train": steps([run.phases.saturated for run in runs]),
        "step of 90 % held-out": steps([run.phases.held_out.get(0.9) for run in runs]),
        "held-out": spread(pd.Series([run.last(HELD_OUT) for run in runs]), "{:.2f}"),
        "OOD": spread(pd.Series([run.last(OOD) for run in runs]), "{:.2f}"),
    }
    between = first.ranks.shape[1] > 2  # one layer has no state between input and output
    for index, name in enumerate(first.facts[:NUM_FACTS] if between else (), start=1):
        found = [run.fact(name) for run in runs]
        row[f"fact {index}"] = f"{name}: {_change([x[1] for x in found], [x[2] for x in found])} (layer {found[0][0]})"
    grown = first.grown()
    if grown is None:
        return row | {"state": "-"}
    role, layer, *_ = grown
    measured = [run for run in runs if run.grown() is not None]
    place = first.roles.index(role)
    before, after = (
        [run.strength[step, layer - 1, place] for run, step in pairs]
        for pairs in ([(run, run.start) for run in measured], [(run, -1) for run in measured])
    )
    row["state"] = f"S[{layer},{role}]: {_change(before, after)}"
    return row


def _change(before: Sequence[float], after: Sequence[float]) -> str:
    return f"{spread(pd.Series(before), '{:.2f}')} -> {spread(pd.Series(after), '{:.2f}')}"


def draw(runs: Mapping[str, _Run]) -> Figure:
    """A row for each setting: accuracy, causal strengths at start and end and their difference, ranks of two facts."""
    figure = Figure(figsize=(15.5, 2.7 * len(runs) + 0.3), layout="constrained")
    grid = figure.subplots(len(runs), 4 + NUM_FACTS, squeeze=False)
    for axes, (label, run) in zip(grid, runs.items(), strict=True):
        draw_accuracies(axes[0], run.curves, TRAIN, HELD_OUT)
        axes[0].set_ylabel(label, fontweight="bold")
        start, end = run.strength[run.start], run.strength[-1]
        draw_heat_map(axes[1], start, run.roles, f"strength, start (step {run.steps[run.start]})")
        draw_heat_map(axes[2], end, run.roles, f"strength, end (step {run.steps[-1]})")
        draw_heat_map(axes[3], end - start, run.roles, "end - start", difference=True)
        axes[1].set_ylabel("layer")
        for ax, fact in zip(axes[4:], run.facts, strict=False):
            draw_layers(ax, np.array(run.steps), run.ranks[:, :, run.facts.index(fact)].T)
            ax.set(title=f"MRR of {fact}", ylim=(-0.03, 1.03))
        axes[-1].legend(title="layer", fontsize=6, title_fontsize=6, frameon=False)
        for ax in (axes[0], *axes[4:]):
            finish_steps(ax, run.phases)
            ax.title.set_fontsize(9)
    return figure
