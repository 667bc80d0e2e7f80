"""Pipelines from the command line: order, lineage, what is trained again, and a driver that is killed."""

import json
import os
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from conftest import assert_same_results, assert_tracked_once, database, final_runs, mlflow_runs
from small_pipeline import PRESETS, build

from groundswell import cli
from groundswell.rundir import SweepFolder

HERE = Path(__file__).parent
SCRIPT = HERE / "small_pipeline.py"


@pytest.fixture
def sweep(cluster, tmp_path, monkeypatch, capsys):
    """arguments -> exit code, what was printed, what was complained about; in this process."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def start(*arguments):
        output = ["--address", cluster, "--output", str(tmp_path / "results")]
        code = cli.run(build, PRESETS, "quick", [*output, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return start


def runs_of(folder):
    """(stage, seed) -> run."""
    axes = {run: run.description()["axes"] for run in folder.runs()}
    return {(values["stage"], values["seed"]): run for run, values in axes.items()}


def trained(folder):
    return {run.run_id: run.journal_path.stat().st_mtime_ns for run in folder.runs()}


def test_stages_follow_each_other_and_are_linked(sweep, tmp_path):
    code, _, _ = sweep("--axis", "seed=0")
    assert code == 0
    folder = SweepFolder(tmp_path / "results" / "pipeline-quick")
    runs = runs_of(folder)
    assert {stage for stage, _ in runs} == {"first", "left", "right", "last"}
    status = {stage: run.status() for (stage, _), run in runs.items()}
    assert {one.state for one in status.values()} == {"finished"}
    assert status["first"].ended_ms <= min(status["left"].started_ms, status["right"].started_ms)
    assert status["left"].ended_ms <= status["last"].started_ms
    assert status["right"].started_ms < status["last"].ended_ms  # beside the others, as a worker is free
    assert_tracked_once(folder)
    with sqlite3.connect(database(folder)) as connection:
        tags = pd.read_sql(
            "select run_uuid, value from tags where key = 'groundswell.input_run.model.start'", connection
        )
    stored = mlflow_runs(folder).set_index("run_id").run_uuid
    links = dict(zip(tags.run_uuid, tags.value, strict=True))
    first, left, last = (stored[runs[stage, 0].run_id] for stage in ("first", "left", "last"))
    assert (links[left], links[last]) == (first, left)

    before = trained(folder)
    assert sweep("--axis", "seed=0")[0] == 0
    assert trained(folder) == before  # nothing has changed


@pytest.mark.slow
def test_a_failed_stage_fails_those_that_start_from_it(sweep, tmp_path):
    code, printed, _ = sweep("--axis", "seed=0", "--left.optimizer.lr", "1e20")
    assert code == 1
    (path,) = (tmp_path / "results").glob("pipeline-quick-*")
    states = {stage: run.status() for (stage, _), run in runs_of(SweepFolder(path)).items()}
    assert {stage: one.state for stage, one in states.items()} == {
        "first": "finished", "left": "diverged", "right": "finished", "last": "failed",
    }  # fmt: skip
    assert "which it starts from, is diverged" in states["last"].error
    assert "which it starts from, is diverged" in printed


@pytest.mark.slow
def test_a_scheduler_is_refused(sweep):
    code, _, complaint = sweep("--scheduler", "asha")
    assert code == 2
    assert "stages cannot be compared" in complaint


@pytest.mark.slow
def test_optuna_looks_at_the_last_stage(sweep, tmp_path):
    code, _, _ = sweep(
        "--search", "optuna", "--num-samples", "2", "--axis", "seed=0", "--axis", "optimizer.lr=1e-3,3e-3"
    )
    assert code == 0
    folder = SweepFolder(tmp_path / "results" / "pipeline-quick-optuna")
    with sqlite3.connect(folder.path / "study.db") as connection:
        values = pd.read_sql("select value from trial_values", connection).value.tolist()
    last = [run for run in folder.runs() if run.description()["axes"]["stage"] == "last"]
    found = [run.journal()[-1]["metrics"]["eval/test/accuracy"] for run in last]
    assert sorted(set(values)) == sorted(set(found))


@pytest.mark.slow
def test_killed_driver(start, tmp_path):
    """Ends as one that was left in peace, to the last digit."""
    peace, hurt = tmp_path / "peace", tmp_path / "hurt"
    undisturbed = start(peace, "--preset", "paced", script=SCRIPT)
    assert undisturbed.wait() == 0, undisturbed.text
    first = start(hurt, "--preset", "paced", script=SCRIPT)
    folder = SweepFolder(hurt / "pipeline-paced")

    def amid_the_second_stage():
        return any(json.loads((run.path / "run.json").read_text()).get("inputs") and run.checkpoint_step()
                   for run in folder.runs() if not run.status().is_final)  # fmt: skip

    first.wait_until(amid_the_second_stage)
    first.kill()
    first.assert_nothing_left()
    done = {run.run_id: os.stat(run.journal_path).st_mtime_ns for run in final_runs(folder)}
    assert done
    again = start(hurt, "--preset", "paced", script=SCRIPT)
    assert again.wait() == 0, again.text
    assert {run_id: os.stat(folder.run(run_id).journal_path).st_mtime_ns for run_id in done} == done
    assert_same_results(folder, SweepFolder(peace / "pipeline-paced"))
    assert_tracked_once(folder)
