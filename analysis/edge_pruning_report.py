"""The report of a sweep of pruning runs: the circuits of each setting, and their faithfulness beside other methods'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.circuit_evaluation import CircuitEvaluation, GradedTask, choose_split
from analysis.edge_comparison import METHODS, Ground, Method, draw, find, judge
from analysis.tables import settings_of, short, spread
from groundswell.config import hash_of, import_path
from groundswell.experiment import Experiment
from groundswell.files import atomic_write
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import format_value
from groundswell.training.pack import build_dataset
from models.edge_masked import EdgeMasked

COLUMNS = {  # of the table: scalar, format
    "edges": ("num_edges", "{:.0f}"),
    "edge sparsity": ("edge_sparsity", "{:.4f}"),
    "KL": ("kl", "{:.3g}"),
    "exact match": ("exact_match", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "logit difference": ("logit_difference", "{:.2f}"),
    "probability difference": ("probability_difference", "{:.3f}"),
}
ACDC_EDGES = 1_000  # its work grows with their square: half a minute a threshold at 500
FOUND_ON, JUDGED_ON = 64, 400  # examples of the baselines; the published ACDC runs use at most 200


def edge_pruning_report(
    results: Results, methods: Sequence[Method] = METHODS, found_on: int = FOUND_ON, judged_on: int = JUDGED_ON
) -> Report:
    """Table: one row a setting, mean (lowest-highest) over the replicates, from the probe CircuitEvaluation at each
    run's newest checkpoint. Figure: every run's circuit, and those of the other methods, computed once a network and
    task.

    `methods`: the other methods; none of them: only the runs are drawn. `found_on`: training examples that they may
    use; `judged_on`: examples of the probe's split that they are judged on.
    """
    found = {run_id: values for run_id in results.runs["run_id"] if (values := _circuit_of(results, run_id))}
    table = _table(results, found)
    figures = {"faithfulness": _figure(results, found, methods, found_on, judged_on)} if found else {}
    remarks = [f"values are mean (lowest-highest) over {results.replicate_axis}; circuits are masks of 0 and 1"]
    if "acdc" in methods and any(
        values["num_edges"] > ACDC_EDGES * (1 - values["edge_sparsity"]) for values in found.values()
    ):
        remarks.append(
            f"ACDC is left out on graphs of more than {ACDC_EDGES:,} edges, where it takes hours; for one threshold: "
            "groundswell circuit compare RUN --methods acdc --thresholds 0.01"
        )
    if figures and methods:
        remarks.append(
            f"figure: the other methods choose edges on {found_on} training examples, and are judged on {judged_on}"
        )
    return Report("Edge Pruning: circuits", table, figures, tuple(remarks))


def _circuit_of(results: Results, run_id: str) -> dict[str, float]:
    scalars, _ = results.answer(run_id, CircuitEvaluation.name())
    return {name.removeprefix("circuit/"): value for name, value in scalars.items()}


def _table(results: Results, found: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    rows = []
    for key, runs in settings_of(results):
        mine = pd.DataFrame([found[run_id] for run_id in runs["run_id"] if run_id in found])
        if not len(mine):
            continue
        row = {short(path): format_value(value) for path, value in zip(results.setting_axes, key, strict=True)}
        row["runs"] = str(len(mine))
        for label, (name, form) in COLUMNS.items():
            if name in mine:
                row[label] = spread(mine[name], form)
        rows.append(row)
    return pd.DataFrame(rows)


# ---- the figure ----


def _figure(
    results: Results,
    found: Mapping[str, Mapping[str, float]],
    methods: Sequence[Method],
    found_on: int,
    judged_on: int,
) -> Figure:
    """One row of panels for each network and task."""
    assert results.folder is not None
    tables: dict[str, list[pd.DataFrame]] = {}
    for run_id, values in found.items():
        folder = results.folder.run(run_id)
        experiment = folder.experiment()
        assert isinstance(experiment.model, EdgeMasked)
        title = f"{type(experiment.task).__name__}, {experiment.model.path}"
        point = pd.DataFrame([{"method": "edge_pruning", "setting": run_id, **values}])
        if title not in tables:
            split = _judged_split(folder.path)
            others = baselines(results.folder.path, experiment, split, methods, found_on, judged_on) if methods else []
            tables[title] = [*others]
        tables[title].append(point)
    return draw({title: pd.concat(parts, ignore_index=True) for title, parts in tables.items()})


def _judged_split(run: Path) -> str:
    """The split that the probe was asked about."""
    asked = sorted(run.glob(f"probes/step-*/{CircuitEvaluation.name()}/probe.json"))
    return json.loads(asked[-1].read_text())["split"] if asked else CircuitEvaluation().split


def baselines(
    sweep: Path, experiment: Experiment, split: str, methods: Sequence[Method], found_on: int, judged_on: int
) -> list[pd.DataFrame]:
    """One table a method, kept in `tables/` of the sweep's folder, so that it is computed once."""
    model, task = experiment.model, experiment.task
    assert isinstance(model, EdgeMasked) and isinstance(task, GradedTask)
    ground = None
    tables = []
    large = model.graph.num_edges > ACDC_EDGES
    for method in methods:
        if method == "acdc" and large:
            continue
        question = {
            "method": method, "task": task.to_dict(), "network": [model.path, model.mask_embeddings, model.ablation],
            "split": split, "found_on": found_on, "judged_on": judged_on, "by": import_path(Ground),
        }  # fmt: skip
        path = sweep / "tables" / f"baseline-{method}-{hash_of(question)[:12]}.csv"
        if not path.exists():
            ground = ground or _ground(experiment, split, found_on, judged_on)
            atomic_write(path, judge(ground, find(ground, [method])).to_csv(index=False))
        tables.append(pd.read_csv(StringIO(path.read_text())))
    return tables


def _ground(experiment: Experiment, split: str, found_on: int, judged_on: int) -> Ground:
    model, task = experiment.model, experiment.task
    assert isinstance(model, EdgeMasked) and isinstance(task, GradedTask)
    dataset = build_dataset(experiment)
    chosen = choose_split(dataset, "train", found_on), choose_split(dataset, split, judged_on)
    return Ground(model.frozen("cpu"), task, *chosen, corrupted=model.ablation == "corrupted")
