"""Runs over two workers under Ray, hurt in every way; each must end bit for bit like bare processes left in peace."""

import shutil
import signal

import pytest
from conftest import MarkedProcess, assert_tracked_once

from groundswell.rundir import RunFolder, SweepFolder
from tests.groundswell.run_results import assert_equal_runs
from tests.groundswell.scaling.workers import run_workers

STRATEGIES = {
    "ddp": ["--scaling.strategy", "ddp"],
    "fsdp": ["--scaling.strategy", "fsdp"],
    "zero_2": ["--scaling.strategy", "deepspeed"],
    "zero_3": ["--scaling.strategy", "deepspeed", "--scaling.zero-stage", "3"],
}
ONE_RUN = ["--axis", "optimizer.lr=0.01", "--axis", "seed=0", "--scaling.num-workers", "2"]


@pytest.fixture
def begin(start, tmp_path):
    """strategy, further arguments -> the running sweep and the folder of its only run."""

    def begin_sweep(strategy: str, *arguments: str) -> tuple[MarkedProcess, RunFolder]:
        output = tmp_path / "results"
        sweep = start(output, *ONE_RUN, *STRATEGIES[strategy], *arguments)
        sweep.wait_until(lambda: list(output.glob("small-*/runs/*/run.json")))
        (run,) = (path.parent for path in output.glob("small-*/runs/*/run.json"))
        return sweep, RunFolder(run)

    return begin_sweep


def train_workers(sweep):
    return [p for p in sweep.family() if "RayTrainWorker" in " ".join(p.cmdline())]


def states(run: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run.path / "training").glob("step-*"))


def assert_as_if_undisturbed(run: RunFolder, tmp_path) -> None:
    assert run.status().state == "finished", run.status()
    twin = RunFolder(tmp_path / "undisturbed" / "runs" / run.run_id)
    description = run.description()
    experiment = run.experiment().with_overrides({"objective.pause_s": 0.0})
    twin.write_new(experiment, description["name"], description["axes"], "pack", 0)
    run_workers(twin, experiment.scaling.num_workers)
    assert run.checkpoint_step() == twin.checkpoint_step() == 120
    assert_equal_runs(run, twin)
    assert_tracked_once(SweepFolder(run.path.parents[1]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero_2", "zero_3"])
def test_killed_worker(begin, tmp_path, strategy):
    sweep, run = begin(strategy)
    sweep.wait_until(lambda: max(states(run), default=0) >= 20)
    victims = train_workers(sweep)
    assert len(victims) == 2
    victims[1].kill()
    assert sweep.wait() == 0, sweep.text
    assert_as_if_undisturbed(run, tmp_path)
    sweep.assert_nothing_left()


def shorten_newest(run: RunFolder) -> None:
    """As if the power had gone before the state was on disk."""
    newest = max((run.path / "training").glob("step-*"))
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


def empty_record(run: RunFolder) -> None:
    """As if the driver had died while Ray Train wrote it."""
    (run.path / "training" / "checkpoint_manager_snapshot.json").write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "hurt"), [("fsdp", shorten_newest), ("zero_2", empty_record), ("zero_2", None)])
def test_killed_driver(begin, tmp_path, strategy, hurt):
    sweep, run = begin(strategy)
    sweep.wait_until(lambda: max(states(run), default=0) >= 40)
    sweep.kill()
    sweep.assert_nothing_left()
    assert run.status().state == "running"
    if hurt:
        hurt(run)
    again, _ = begin(strategy)
    assert again.wait() == 0, again.text
    assert_as_if_undisturbed(run, tmp_path)


@pytest.mark.slow
def test_stuck_worker_is_replaced(begin, tmp_path):
    """A stopped process answers nobody; the others notice after scaling.timeout_s."""
    sweep, run = begin("ddp", "--scaling.timeout-s", "20")
    sweep.wait_until(lambda: max(states(run), default=0) >= 20)
    train_workers(sweep)[1].suspend()
    assert sweep.wait() == 0, sweep.text
    assert_as_if_undisturbed(run, tmp_path)
    sweep.assert_nothing_left()


@pytest.mark.slow
def test_terminated_worker_saves_its_state_first(begin, tmp_path):
    """SIGTERM, as a preempted machine gives it: nothing that was trained is lost."""
    sweep, run = begin("fsdp", "--checkpointing.schedule.every", "1000")
    sweep.wait_until(lambda: run.journal() and run.journal()[-1]["step"] >= 20)
    assert states(run) == []
    train_workers(sweep)[1].send_signal(signal.SIGTERM)
    sweep.wait_until(lambda: states(run))
    assert states(run)[0] >= 20
    assert sweep.wait() == 0, sweep.text
    assert_as_if_undisturbed(run, tmp_path)


@pytest.mark.slow
def test_ctrl_c_saves_the_state(begin, tmp_path):
    sweep, run = begin("fsdp", "--checkpointing.schedule.every", "1000")
    sweep.wait_until(lambda: run.journal() and run.journal()[-1]["step"] >= 20)
    sweep.interrupt()
    assert sweep.wait(120) == 130, sweep.text
    assert "Traceback" not in sweep.text
    assert states(run) and states(run)[0] >= 20
    sweep.assert_nothing_left()
    again, _ = begin("fsdp", "--checkpointing.schedule.every", "1000")
    assert again.wait() == 0, again.text
    assert_as_if_undisturbed(run, tmp_path)


@pytest.mark.slow
def test_more_workers_than_there_are(start, tmp_path):
    sweep = start(tmp_path / "results", "--axis", "seed=0", "--scaling.strategy", "ddp", "--scaling.num-workers", "3")
    assert sweep.wait(90) == 2
    line = "error: scaling.num_workers 3: 3 x 1 CPU do not fit the cluster (2 CPU and 0 GPU); use at most 2 workers"
    assert line in " ".join(sweep.text.split())
    assert "Traceback" not in sweep.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_machine_that_is_lost_with_all_its_files(start, tmp_path, strategy):
    """What --storage holds is enough for another machine to go on, with the same command."""
    output, storage = tmp_path / "results", tmp_path / "elsewhere"
    command = ["--axis", "optimizer.lr=0.01", "--axis", "seed=0", "--storage", storage.as_uri()]
    # a pack's run is published once a minute: it must take longer
    slow = ["--objective.pause-s", "0.7"]
    command += slow if strategy == "single" else ["--scaling.num-workers", "2", *STRATEGIES[strategy]]
    states = "checkpoints" if strategy == "single" else "training"
    sweep = start(output, *command)
    sweep.wait_until(lambda: any(storage.glob(f"small-*/runs/*/{states}/step-*")))
    sweep.kill()
    sweep.assert_nothing_left()
    shutil.rmtree(output)
    again = start(output, *command)
    assert again.wait() == 0, again.text
    assert "1 runs come from" in again.text
    (run,) = (RunFolder(path.parent) for path in output.glob("small-*/runs/*/run.json"))
    (there,) = (RunFolder(path.parent) for path in storage.glob("small-*/runs/*/run.json"))
    assert there.status() == run.status()
    assert there.journal() == run.journal()
    steps = run.checkpoint_steps()  # of what was there before, only the newest have come
    assert steps and steps == there.checkpoint_steps()[-len(steps) :]
    if strategy != "single":
        assert_as_if_undisturbed(run, tmp_path)
