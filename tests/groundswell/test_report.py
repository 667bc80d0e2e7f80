"""The end of a sweep: default table, files in two formats, and troubles in one line each."""

import io

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from groundswell.report import Report, default_report, pareto_front, print_table, print_troubles, save_report
from groundswell.results import Results

METRIC = "eval/test/accuracy"


@pytest.fixture
def results():
    """Two learning rates by two seeds; one run failed, one diverged."""
    runs = pd.DataFrame(
        {
            "run_id": ["a", "b", "c", "d"],
            "name": ["lr=1 seed=0", "lr=1 seed=1", "lr=[2] seed=0", "lr=2 seed=1"],
            "state": ["finished", "finished", "failed", "diverged"],
            "reason": ["", "", "", "train/loss is not finite"],
            "error": ["", "", "RuntimeError: no [data]", ""],
            "step": [20, 20, 0, 5],
            "optimizer.lr": [1.0, 1.0, 2.0, 2.0],
            "seed": [0, 1, 0, 1],
        }
    )
    rows = [("a", 10, 0.1), ("a", 20, 0.4), ("b", 10, 0.9), ("b", 20, 0.6), ("d", 5, 0.2)]
    history = pd.DataFrame(rows, columns=["run_id", "step", METRIC])
    history = history.merge(runs[["run_id", "optimizer.lr", "seed"]])
    return Results(runs, history, ("optimizer.lr", "seed"), "seed")


def printed(call, *arguments):
    stream = io.StringIO()
    call(*arguments, Console(file=stream, width=120))
    return stream.getvalue()


def test_default_report_is_the_last_evaluation_over_the_seeds(results):
    table = default_report(results, METRIC).table.set_index("optimizer.lr")
    assert table.loc[1.0].to_dict() == pytest.approx({METRIC: 0.5, "lowest": 0.4, "highest": 0.6, "runs": 2})
    assert table.loc[2.0, "runs"] == 1


def test_pareto_front():
    """Means over the seeds: lr 2 is beaten by lr 1 in both, lr 3 is worse in accuracy but has fewer edges."""
    readings = {
        1.0: [(0.8, 10), (0.9, 20)],
        2.0: [(0.7, 30), (0.7, 30)],
        3.0: [(0.5, 5), (0.5, 5)],
        4.0: [(0.5, 6)] * 2,
    }
    rows = [
        {"run_id": f"{lr}{seed}", "step": 1, METRIC: accuracy, "edges": edges, "optimizer.lr": lr, "seed": seed}
        for lr, values in readings.items()
        for seed, (accuracy, edges) in enumerate(values)
    ]
    runs = pd.DataFrame(rows)[["run_id", "optimizer.lr", "seed"]]
    results = Results(runs, pd.DataFrame(rows), ("optimizer.lr", "seed"), "seed")
    front = pareto_front(results, {METRIC: "max", "edges": "min"})
    assert front.to_dict("list") == {
        "optimizer.lr": [1.0, 3.0],
        METRIC: pytest.approx([0.85, 0.5]),
        "edges": pytest.approx([15.0, 5.0]),
    }


def test_troubles(results):
    lines = printed(print_troubles, results).splitlines()
    assert lines == [
        "failed lr=[2] seed=0 (c): RuntimeError: no [data]",
        "diverged lr=2 seed=1 (d): train/loss is not finite",
    ]


def test_files(results, tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    table = pd.DataFrame({"setting": ["x", 3], "value": [0.5, float("nan")]})
    saved = save_report(Report("title", table, {"curve": figure}), results, tmp_path)
    assert set(saved) == {
        *(f"tables/{stem}.{kind}" for stem in ("summary", "runs", "history") for kind in ("csv", "parquet")),
        "figures/curve.png",
        "figures/curve.pdf",
    }
    assert all(path.is_file() for path in saved.values())
    assert list(pd.read_parquet(saved["tables/summary.parquet"])["setting"]) == ["x", "3"]
    pd.testing.assert_frame_equal(pd.read_parquet(saved["tables/history.parquet"]), results.history)
    assert saved["figures/curve.png"].read_bytes().startswith(b"\x89PNG")


def test_table_shows_gaps_as_a_dash():
    table = pd.DataFrame({"setting": ["x"], "value": [float("nan")], "other": [0.123456]})
    text = printed(print_table, Report("title", table))
    assert "title" in text and " - " in text and "0.1235" in text
