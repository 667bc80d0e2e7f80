"""Sweeps that are killed, interrupted or broken, and then started again with the same command."""

import os

import pytest
from conftest import assert_same_results, assert_tracked_once, final_runs, half_done, mlflow_runs

from groundswell.rundir import SweepFolder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def folder(output):
    return SweepFolder(output / "small-paced")


def fingerprint(runs):
    """What changes when a run is trained again: each file's identity and the time of its last change."""
    names = ("metrics.jsonl", "model.safetensors")
    files = [path for run in runs for name in names for path in run.path.rglob(name)]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_killed_driver(start, output, folder, undisturbed):
    """Finished runs are left alone, half-done ones go on from their checkpoint, MLflow has everything once."""
    first = start(output, "--pack", "1")
    first.wait_until(lambda: len(final_runs(folder)) >= 1 and half_done(folder))
    first.kill()
    first.assert_nothing_left()
    done, half = final_runs(folder), half_done(folder)
    assert done and half
    before = fingerprint(done)
    saved = {run.run_id: run.checkpoint_step() for run in half}
    weights = {path: path.stat().st_ino for run in half for path in run.checkpoints.glob("step-*/model.safetensors")}

    again = start(output, "--pack", "1")
    assert again.wait() == 0, again.text
    assert fingerprint(done) == before
    assert {path: path.stat().st_ino for path in weights} == weights
    for run in half:  # the journal beyond the checkpoint was written by the second process
        assert run.status().state == "finished"
        assert run.checkpoint_step() > saved[run.run_id]
    assert_same_results(folder, undisturbed)
    assert_tracked_once(folder)
    again.assert_nothing_left()


@pytest.mark.slow
def test_killed_worker(start, output, folder, undisturbed):
    """A worker's death costs the time since the last checkpoint, nothing else."""
    sweep = start(output, "--pack", "1")
    sweep.wait_until(lambda: half_done(folder) and sweep.workers())
    victims = sweep.workers()
    for victim in victims:
        victim.kill()
    assert sweep.wait() == 0, sweep.text
    assert_same_results(folder, undisturbed)
    assert_tracked_once(folder)


@pytest.mark.slow
def test_ctrl_c_and_a_second_process(start, output, folder, undisturbed):
    """State is saved, the message says how to go on, nothing keeps running."""
    first = start(output, "--pack", "1")
    first.wait_until(lambda: half_done(folder))
    rival = start(output, "--pack", "1")
    assert rival.wait(60) == 2
    assert rival.text.startswith("error: ")
    assert "another process is running this sweep" in rival.text
    first.interrupt()
    assert first.wait(60) == 130, first.text
    assert "go on with the same command" in first.text
    assert "Traceback" not in first.text
    first.assert_nothing_left()
    states = {run.run_id: run.status().state for run in folder.runs()}
    tracked = mlflow_runs(folder).set_index("run_id").status
    for run_id, state in states.items():
        if state == "running":  # half-done: MLflow must not show it as alive
            assert tracked[run_id] == "KILLED"
            run = folder.run(run_id)
            assert run.checkpoint_step() == run.journal()[-1]["step"]
    again = start(output, "--pack", "1")
    assert again.wait() == 0, again.text
    assert_same_results(folder, undisturbed)
    assert_tracked_once(folder)


@pytest.mark.slow
def test_optuna_survives_its_driver_and_takes_more_samples(start, output):
    """The study on disk is the truth: open settings are trained on, told ones stay, more samples are new settings."""
    import optuna

    arguments = ("--search", "optuna", "--pack", "1")
    folder = SweepFolder(output / "small-paced-optuna")
    first = start(output, *arguments, "--num-samples", "3")
    first.wait_until(lambda: len(final_runs(folder)) >= 2 and half_done(folder))
    first.kill()
    first.assert_nothing_left()
    done = final_runs(folder)
    before = fingerprint(done)
    asked = {run.run_id for run in folder.runs()}

    again = start(output, *arguments, "--num-samples", "4")
    assert again.wait() == 0, again.text
    assert fingerprint(done) == before
    runs = {run.run_id: run for run in folder.runs()}
    assert asked <= set(runs) and len(runs) == 8
    assert {run.status().state for run in runs.values()} <= {"finished", "diverged"}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder.path / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    for trial in study.trials:  # told the mean over seeds of the last evaluation
        last = [
            run.journal()[-1]["metrics"]["eval/test/accuracy"]
            for run in runs.values()
            if run.description()["axes"]["optimizer.lr"] == trial.params["optimizer.lr"]
        ]
        assert len(last) == 2
        assert trial.value == pytest.approx(sum(last) / 2)
    assert_tracked_once(folder)


def test_unwritable_study_of_another_user(start, output):
    """A read-only output folder is found before anything starts."""
    output.mkdir()
    output.chmod(0o500)
    try:
        if os.access(output, os.W_OK):
            pytest.skip("this user may write everywhere")
        sweep = start(output)
        assert sweep.wait(60) == 2
        assert "output: cannot write to" in sweep.text
    finally:
        output.chmod(0o700)
