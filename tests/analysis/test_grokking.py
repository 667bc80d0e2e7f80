"""The grokking report on curves whose answers are known."""

import math

import pandas as pd
import pytest

from analysis.grokking import draw, first_step, grokking_report, per_run
from groundswell.results import Results

TRAIN, HELD_OUT, OOD = (
    f"eval/{name}/accuracy" for name in ("train_inferred", "test_inferred_iid", "test_inferred_ood")
)


def make_results():
    """Two settings, two seeds: held-out reaches 0.9 at 1,000 (seed 0) and 2,000 (seed 1) with decay 1, never with 0."""
    runs, history = [], []
    for decay in (0.0, 1.0):
        for seed in (0, 1):
            run_id = f"{decay}-{seed}"
            state = {"state": "finished", "step": 2_000, "reason": None, "error": None}
            settings = {"model.num_layers": 2, "optimizer.weight_decay": decay, "seed": seed}
            runs.append({"run_id": run_id, "name": run_id, **state, **settings})
            for step in (0, 100, 1_000, 2_000):
                held_out = 0.95 if decay == 1.0 and step >= 1_000 * (seed + 1) else 0.2
                history.append(
                    {"run_id": run_id, "step": step, TRAIN: 1.0 if step >= 100 else 0.0, HELD_OUT: held_out, OOD: 0.03}
                )
    axes = ("model.num_layers", "optimizer.weight_decay", "seed")
    return Results(pd.DataFrame(runs), pd.DataFrame(history), axes, "seed")


def test_first_step():
    curve = pd.DataFrame({"step": [0, 10, 20, 30], "value": [0.1, 0.92, 0.5, 0.99]})
    assert first_step(curve) == 10
    assert first_step(curve, 0.95) == 30
    assert math.isnan(first_step(curve, 1.0))


def test_steps_and_lag_of_each_run():
    table = per_run(make_results(), "train_inferred", "test_inferred_iid", "test_inferred_ood").set_index(
        ["optimizer.weight_decay", "seed"]
    )
    assert table.loc[(1.0, 0), ["train_step", "held_out_step", "lag"]].tolist() == [100, 1_000, 10]
    assert table.loc[(1.0, 1), "lag"] == 20
    assert table.loc[0.0, "held_out_step"].isna().all()


def test_report_says_what_happened():
    report = grokking_report(make_results(), "model.num_layers", "optimizer.weight_decay")
    rows = report.table.set_index("weight_decay")
    assert rows.loc["1", "step of 90% held-out"] == "1500 (1000-2000)"
    assert rows.loc["1", "lag"] == "15.0x (10.0x-20.0x)"
    assert rows.loc["0", "step of 90% held-out"] == "> 2000"
    assert rows.loc["0", "lag"] == "-"
    assert rows.loc["1", "held-out"] == "0.95"
    assert rows.loc["1", "OOD"] == "0.03"


def test_figure_has_a_panel_a_depth_and_mean_and_range(tmp_path):
    results = make_results()
    figure = draw(
        results,
        "model.num_layers",
        "optimizer.weight_decay",
        {"train": "train_inferred", "held-out": "test_inferred_iid", "OOD": "test_inferred_ood"},
    )
    (ax,) = figure.axes
    assert ax.get_title() == "num_layers = 2"
    held_out = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    means = [line.get_ydata() for line in held_out]
    assert any(mean == pytest.approx([0.2, 0.575, 0.95]) for mean in means)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
