"""Reversal and chains of facts: what is learned in one direction, what is not, and why (arXiv 2405.04669).

Probes look at a trained network: logits of every candidate behind a single token (a learned map is a bright diagonal),
and the geometry of its token embeddings. The report puts them beside the curves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.tables import settings_of, short, spread
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import format_value
from tasks.entities import FactTask

TITLES = {  # in the order of the panels
    "train_forward": "y after x (trained pairs)",
    "train_backward": "x after y (trained pairs)",
    "val_seen": "held-out pairs, direction seen",
    "val_unseen": "held-out pairs, direction never seen",
    **{
        f"{part}_{hop}": f"{title} ({which} triples)"
        for part, which in (("train", "trained"), ("val", "held-out"))
        for hop, title in (("x0y", "y after x"), ("y0z", "z after y"), ("x1z", "z after x"))
    },
}


class LogitHeatMaps(Probe):
    """Logits of all answers behind each prompt's first token, without the relation: rows are prompts, columns answers
    in the same order. A learned map is a diagonal that stands out.

    Scalars a panel: `gap` (mean of the diagonal minus mean of the rest) and `row_accuracy` (share of rows whose largest
    logit is on the diagonal). `asymmetry`: gap of the seen minus gap of the unseen direction of held-out pairs.
    `intransitivity`: the smaller gap of the two hops of held-out triples minus the gap of the direct answer.
    """

    def applies(self, experiment: Experiment) -> bool:
        return isinstance(experiment.task, FactTask) and bool(experiment.task.draw().panels)

    def run(self, opened: Opened) -> Findings:
        task = opened.experiment.task
        assert isinstance(task, FactTask)
        matrices = {}
        for name, panel in task.draw().panels.items():
            prompts = torch.from_numpy(panel.prompts)
            with torch.no_grad():
                tokens = prompts.view(1, -1, 1)
                logits = opened.experiment.model.answer_logits(opened.parameters, tokens, torch.zeros_like(tokens))
            matrices[name] = logits[0, :, 0, torch.from_numpy(panel.answers)].float().numpy()
        return Findings(heat_map_scalars(matrices), matrices, figures={"logits": draw_heat_maps(matrices)})


def heat_map_scalars(matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
    found: dict[str, float] = {}
    matrices = {name: matrix for name, matrix in matrices.items() if len(matrix) > 1}  # one candidate: nothing to tell
    for name, matrix in matrices.items():
        found[f"heat_map/{name}/gap"] = diagonal_gap(matrix)
        found[f"heat_map/{name}/row_accuracy"] = row_accuracy(matrix)
    if "val_unseen" in matrices:
        found["heat_map/asymmetry"] = found["heat_map/val_seen/gap"] - found["heat_map/val_unseen/gap"]
    if "val_x1z" in matrices:
        hops = min(found["heat_map/val_x0y/gap"], found["heat_map/val_y0z/gap"])
        found["heat_map/intransitivity"] = hops - found["heat_map/val_x1z/gap"]
    return found


def diagonal_gap(matrix: np.ndarray) -> float:
    """Mean of the diagonal minus mean of the rest; NaN for a 1 x 1 matrix."""
    size = len(matrix)
    if size == 1:
        return float("nan")
    diagonal = float(np.trace(matrix.astype(np.float64)))
    return diagonal / size - (float(matrix.sum(dtype=np.float64)) - diagonal) / (size * (size - 1))


def row_accuracy(matrix: np.ndarray) -> float:
    return float((matrix.argmax(axis=1) == np.arange(len(matrix))).mean())


class EmbeddingSimilarity(Probe):
    """Cosine similarities of the input embeddings of relations and entities, matched entities in the same order.

    Scalars: mean and mean absolute value off the diagonal (near 0: nearly orthogonal), and mean similarity of matched
    entities of each two kinds.
    """

    def applies(self, experiment: Experiment) -> bool:
        has_table = hasattr(experiment.model, "token_embeddings")
        return has_table and isinstance(experiment.task, FactTask) and bool(experiment.task.draw().groups)

    def run(self, opened: Opened) -> Findings:
        task = opened.experiment.task
        assert isinstance(task, FactTask)
        groups = task.draw().groups
        table = opened.experiment.model.token_embeddings(opened.parameters)[0].detach()  # type: ignore[attr-defined]
        rows = table[torch.from_numpy(np.concatenate(list(groups.values())))]
        rows = rows / rows.norm(dim=1, keepdim=True)
        similarity = (rows @ rows.T).float().numpy()
        rest = similarity[~np.eye(len(similarity), dtype=bool)]
        scalars = {
            "embedding/mean_cosine": float(rest.mean(dtype=np.float64)),
            "embedding/mean_abs_cosine": float(np.abs(rest).mean(dtype=np.float64)),
        }
        starts = dict(zip(groups, np.cumsum([0, *map(len, groups.values())]), strict=False))
        letters = [name for name in groups if name != "relation"]
        for index, one in enumerate(letters):
            for other in letters[index + 1 :]:
                places = np.arange(len(groups[one]))
                matched = similarity[starts[one] + places, starts[other] + places]
                scalars[f"embedding/matched_cosine_{one}_{other}"] = float(matched.mean(dtype=np.float64))
        figure = draw_similarity(similarity, {name: len(ids) for name, ids in groups.items()})
        return Findings(scalars, {"cos_sim": similarity}, figures={"cos_sim": figure})


# ---- the report of a sweep ----


def reversal_report(results: Results) -> Report:
    """Table: one row a setting. Figures: word curves with their band over the seeds; the first seed's heat-maps and
    similarities for each setting that has them."""
    table = summarise(results)
    figures = {"word_nll": draw_curves(results)}
    for _, runs in settings_of(results):
        first = runs.iloc[0]
        label = "_".join(str(first[path]) for path in results.setting_axes) or "all"
        stem = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in label)
        maps = results.answer(first["run_id"], LogitHeatMaps.name())[1]
        if maps:
            figures[f"logits_{stem}"] = draw_heat_maps(maps)
        similarity = results.answer(first["run_id"], EmbeddingSimilarity.name())[1]
        if similarity:
            groups = _task_of(results, first["run_id"]).draw().groups
            figures[f"cos_sim_{stem}"] = draw_similarity(
                similarity["cos_sim"], {name: len(ids) for name, ids in groups.items()}
            )
    remarks = (
        "train, held-out: negative log-probability of the answer word in nats at the last evaluation (dropout off); "
        "lowest: the lowest that held-out came to",
        "uniform: of a guess over the whole vocabulary / over the words' own alphabet; rank: of the right answer among "
        "that alphabet (1 is best); among them: its negative log-probability when only they may answer",
        "seen, unseen: share of heat-map rows that are brightest on the diagonal, for the direction or hops that were "
        "trained and for what was asked; asymmetry: how much brighter that diagonal is for the former, in logits",
        f"values are mean (lowest-highest) over {_replicates(results)}",
    )
    return Report("Reversal and chains: what is learned and what does not follow", table, figures, remarks)


def _replicates(results: Results) -> str:
    axis = results.replicate_axis
    count = results.runs[axis].nunique() if axis in results.runs else 1
    return f"{count} {axis}{'s' * (count > 1)}"


def _task_of(results: Results, run_id: str) -> FactTask:
    assert results.folder is not None
    task = results.folder.run(run_id).experiment().task
    assert isinstance(task, FactTask)
    return task


def summarise(results: Results) -> pd.DataFrame:
    """One row a setting, as text ready to read."""
    metrics = {
        "train": "eval/train/word_nll",
        "held-out": "eval/validation/word_nll",
        "rank": "eval/validation/rank",
        "among them": "eval/validation/candidate_nll",
        "uniform": "eval/validation/uniform_nll",
        "uniform among": "eval/validation/uniform_candidate_nll",
    }
    curves = {column: results.curves(metric).sort_values("step") for column, metric in metrics.items()}
    rows = []
    for key, runs in settings_of(results):
        ids = set(runs["run_id"])
        mine = {column: curve[curve["run_id"].isin(ids)].groupby("run_id")["value"] for column, curve in curves.items()}
        scalars = pd.DataFrame([results.answer(run_id, LogitHeatMaps.name())[0] for run_id in runs["run_id"]])
        levels = [f"{mine[column].last().mean():.2f}" for column in ("uniform", "uniform among")]
        rows.append(
            {
                **{short(path): format_value(value) for path, value in zip(results.setting_axes, key, strict=True)},
                "train": spread(mine["train"].last(), "{:.2f}"),
                "held-out": spread(mine["held-out"].last(), "{:.2f}"),
                "lowest": spread(mine["held-out"].min(), "{:.2f}"),
                "uniform": " / ".join(levels),
                "rank": spread(mine["rank"].last(), "{:.1f}"),
                "among them": spread(mine["among them"].last(), "{:.2f}"),
                "seen": _panel(scalars, ("val_seen",), ("val_x0y", "val_y0z")),
                "unseen": _panel(scalars, ("val_unseen",), ("val_x1z",)),
                "asymmetry": _score(scalars),
            }
        )
    return pd.DataFrame(rows)


def _panel(scalars: pd.DataFrame, *choices: tuple[str, ...]) -> str:
    """Row accuracy of the panels that are there."""
    for panels in choices:
        columns = [f"heat_map/{panel}/row_accuracy" for panel in panels]
        if all(column in scalars for column in columns):
            return spread(scalars[columns].min(axis=1), "{:.2f}")
    return "-"


def _score(scalars: pd.DataFrame) -> str:
    for name in ("heat_map/asymmetry", "heat_map/intransitivity"):
        if name in scalars:
            return spread(scalars[name], "{:.1f}")
    return "-"


# ---- figures ----


def draw_curves(results: Results) -> Figure:
    """One panel a setting: negative log-probability of the answer word, mean and range over the seeds."""
    settings = settings_of(results)
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.1 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    lines = {
        "train": ("eval/train/word_nll", "tab:blue", 3.0),  # wider, to be seen below the other one
        "held-out": ("eval/validation/word_nll", "tab:red", 1.5),
    }
    levels = {
        "uniform over the vocabulary": ("eval/validation/uniform_nll", ":"),
        "uniform over the alphabet": ("eval/validation/uniform_candidate_nll", "--"),
    }
    for ax, (key, runs) in zip(grid.flat, settings, strict=False):
        ids = set(runs["run_id"])
        for label, (metric, colour, width) in lines.items():
            _draw_band(ax, _of(results, metric, ids), label, colour, width)
        for label, (metric, style) in levels.items():
            values = _of(results, metric, ids)["value"]
            if len(values):
                ax.axhline(values.mean(), color="0.45", linestyle=style, linewidth=1.0, label=label)
        title = ", ".join(
            format_value(value) if path == "task" else f"{short(path)} = {format_value(value)}"
            for path, value in zip(results.setting_axes, key, strict=True)
        )
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.25)
    grid[0, 0].set_ylim(bottom=-0.3)  # of all panels: they share the axis
    for ax in grid.flat[len(settings) :]:
        ax.set_visible(False)
    for row in grid:
        row[0].set_ylabel("negative log-probability\nof the answer word (nats)")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _of(results: Results, metric: str, run_ids: set[str]) -> pd.DataFrame:
    curves = results.curves(metric)
    return curves[curves["run_id"].isin(run_ids)]


def _draw_band(ax: Axes, curves: pd.DataFrame, label: str, colour: str, width: float) -> None:
    if not len(curves):
        return
    wide = curves.pivot_table(index="step", columns="run_id", values="value").sort_index().ffill()
    ax.plot(wide.index, wide.mean(axis=1), color=colour, linewidth=width, label=label)
    ax.fill_between(wide.index, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.2, linewidth=0)


def draw_heat_maps(matrices: Mapping[str, np.ndarray]) -> Figure:
    """2 x 2 panels (reverse) or 2 x 3 (chain) in one colour scale."""
    names = [name for name in TITLES if name in matrices]
    columns = 2 if len(matrices) <= 4 else 3
    rows = -(-len(matrices) // columns)
    low, high = min(m.min() for m in matrices.values()), max(m.max() for m in matrices.values())
    figure = Figure(figsize=(3.5 * columns + 0.8, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for ax, name in zip(grid.flat, names, strict=False):
        matrix = matrices[name]
        image = ax.imshow(matrix, cmap="magma" if columns == 2 else "inferno", vmin=low, vmax=high)
        ax.set_title(
            f"{TITLES[name]}\ngap {diagonal_gap(matrix):.1f}, on the diagonal {row_accuracy(matrix):.0%}", fontsize=9
        )
        ax.set(xticks=[], yticks=[], xlabel="candidate answer", ylabel="prompt")
    if image is not None:
        figure.colorbar(image, ax=grid, label="logit", shrink=0.8)
    return figure


def draw_similarity(similarity: np.ndarray, groups: Mapping[str, int]) -> Figure:
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1)
    ends = np.cumsum(list(groups.values()))
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="0.3", linewidth=0.6)
        ax.axvline(end - 0.5, color="0.3", linewidth=0.6)
    middles = ends - np.array(list(groups.values())) / 2 - 0.5
    ax.set_xticks(middles, list(groups))
    ax.set_yticks(middles, list(groups))
    ax.set_title("cosine similarity of token embeddings")
    figure.colorbar(image, ax=ax)
    return figure
