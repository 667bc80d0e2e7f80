"""Figures show the numbers that they were given, and the report's table says what was measured."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from analysis.arithmetic_plots import arithmetic_report, draw_grid, draw_pair, draw_steps
from groundswell.results import Results
from groundswell.rundir import SweepFolder


def panels(figure):
    """Without colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>" and ax.get_title()]


def texts(ax):
    return {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in ax.texts}


def test_a_grid_has_first_operands_below_each_other():
    grid = np.array([[1.0, 0.5, 0.25], [0.75, np.nan, 0.0]])
    (ax,) = panels(draw_grid(grid, (1, 2), "accuracy"))
    (image,) = ax.images
    assert image.get_array().tolist()[0] == [100, 50, 25] and image.get_clim() == (0, 100)
    assert image.get_cmap().name == "YlGnBu"
    assert texts(ax) == {(1, 1): "100", (2, 1): "50", (3, 1): "25", (1, 2): "75", (3, 2): "0"}  # (column, row)
    assert "first" in ax.get_ylabel() and "second" in ax.get_xlabel()
    (square,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert square.get_bbox().bounds == (0.5, 0.5, 2, 1) and square.get_edgecolor() == (1, 0, 0, 1)


def test_a_large_grid_has_no_numbers_and_its_square_ends_with_it():
    (ax,) = panels(draw_grid(np.full((30, 30), 0.5), (20, 40), "accuracy"))
    assert not ax.texts
    (square,) = ax.patches
    assert square.get_bbox().bounds == (0.5, 0.5, 30, 20)


def test_a_pair_tells_both_means():
    titles = [ax.get_title() for ax in panels(draw_pair(np.full((2, 2), 0.25), np.full((2, 2), 0.5), (1, 1)))]
    assert titles == ["exact: mean 25.0 %", "smallest number: mean 50.0 %"]


def test_regions_over_steps():
    table = pd.DataFrame(
        {"step": [10, 20], "grid/in_distribution/accuracy": [0.5, 1.0], "grid/over_100/accuracy": [0.0, 0.1]}
    )
    (ax,) = draw_steps(table).axes
    assert [(line.get_label(), list(line.get_ydata())) for line in ax.lines] == [
        ("in distribution", [0.5, 1.0]),
        ("100+", [0.0, 0.1]),
    ]


# ---- reports ----

LONGEST = 4


def write_answer(run, step, inside, outside, diagonal_only=False):
    folder = run.path / "probes" / f"step-{step:08d}" / "length_grid"
    folder.mkdir(parents=True)
    grid = np.full((LONGEST, LONGEST), outside)
    grid[:2, :2] = inside
    if diagonal_only:
        grid[~np.eye(LONGEST, dtype=bool)] = np.nan
    for name, factor in (("accuracy", 1.0), ("accuracy_without_end", 0.5), ("first_accuracy", 0.25)):
        np.save(folder / f"{name}.npy", factor * grid)
    np.save(folder / "trained.npy", np.array([2, 2]))
    values = {"grid/in_distribution/accuracy": inside, "grid/out_of_distribution/accuracy": outside}
    (folder / "scalars.json").write_text(json.dumps(values))
    (folder / "probe.json").write_text("{}")


@pytest.fixture(params=[False, True], ids=["grid", "diagonal"])
def results(request, tmp_path):
    """Two encodings x two widths x two seeds; abacus is better earlier than at the end."""
    sweep, rows = SweepFolder(tmp_path / "sweep"), []
    for encoding, peak in (("abacus", 0.5), ("null", 0.125)):
        for width in (32, 64):
            for seed in (0, 1):
                run = sweep.run(f"{encoding}{width}{seed}")
                lift = 0.25 * seed if encoding == "abacus" else 0.0
                write_answer(run, 100, 0.5, peak + lift, request.param)
                write_answer(run, 200, 1.0, 0.25 * (encoding == "abacus"), request.param)
                axes = {"model.position_encoding": encoding, "model.width": width, "seed": seed}
                rows.append({"run_id": run.run_id, "name": run.run_id, "state": "finished", "step": 200} | axes)
    rows.append(rows[0] | {"run_id": "untold", "seed": 2})  # a run that was not asked
    axes = ("model.position_encoding", "model.width", "seed")
    return Results(pd.DataFrame(rows), pd.DataFrame(columns=["run_id", "step"]), axes, "seed", sweep), request.param


def test_the_table_has_last_and_best_checkpoints(results):
    report = arithmetic_report(results[0], "model.width", "model.position_encoding")
    assert len(report.table) == 4
    abacus = report.table.iloc[0].to_dict()
    assert abacus == {
        "position_encoding": "abacus", "width": "32", "runs": 2, "last step": "200",
        "in distribution (last)": "1.00", "out of distribution (last)": "0.25", "best step": "100",
        "in distribution (best)": "0.50", "out of distribution (best)": "0.62 (0.50-0.75)",
    }  # fmt: skip
    none = report.table.iloc[2].to_dict()
    assert (none["best step"], none["out of distribution (best)"]) == ("100", "0.12")


def test_the_curves_are_means_over_seeds(results):
    report = arithmetic_report(results[0], "model.width", "model.position_encoding")
    axes = panels(report.figures["lengths_best"])
    assert [ax.get_title() for ax in axes] == ["width = 32", "width = 64"]
    curves = [line for line in axes[1].lines if len(line.get_xdata()) == LONGEST]
    assert [list(line.get_xdata()) for line in curves] == [[1, 2, 3, 4]] * 2
    assert [list(line.get_ydata()) for line in curves] == [[0.5, 0.5, 0.625, 0.625], [0.5, 0.5, 0.125, 0.125]]
    (band, _) = axes[1].collections
    assert band.get_paths()[0].vertices[:, 1].max() == 0.75
    last = [line for line in panels(report.figures["lengths"])[0].lines if len(line.get_xdata()) == LONGEST]
    assert list(last[0].get_ydata()) == [1.0, 1.0, 0.25, 0.25]


def test_heat_maps_are_there_for_whole_grids(results):
    found, diagonal_only = results
    report = arithmetic_report(found, None, "model.position_encoding")
    assert ("grids" in report.figures) == (not diagonal_only)
    assert len(panels(report.figures["lengths"])) == 1
    if diagonal_only:
        return
    axes = panels(report.figures["grids"])
    assert axes[0].get_title() == "position_encoding = abacus\nwidth = 32\nmean 43.8 %"
    assert axes[0].images[0].get_array()[3, 3] == 25
    sorting = arithmetic_report(found, None, "model.width", metric="accuracy_without_end")
    axes = panels(sorting.figures["grids"])
    assert len(axes) == 8 and "smallest number" in axes[1].get_title()
    assert axes[0].images[0].get_array()[0, 0] == 50 and axes[1].images[0].get_array()[0, 0] == 25


def test_a_sweep_without_answers(results):
    found, _ = results
    empty = Results(found.runs, found.history, found.axes, "seed", SweepFolder(found.folder.path / "none"))
    report = arithmetic_report(empty, None, "model.width")
    assert not len(report.table) and not report.figures
