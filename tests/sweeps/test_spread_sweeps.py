"""Sweeps whose runs each need several workers: on fractions of two cores, and on a cluster of three machines."""

import os
import subprocess
import sys

import psutil
import pytest
from clusters import start_head

from groundswell.rundir import SweepFolder
from tests.sweeps.test_spread_faults import assert_as_if_undisturbed

DDP = ["--scaling.strategy", "ddp", "--scaling.num-workers", "2"]
QUARTERS = [*DDP, "--scaling.cpus-per-worker", "0.25"]  # four runs of two workers on two cores
FOUR_RUNS = ["--axis", "optimizer.lr=0.001,0.003,0.01,0.03", "--axis", "seed=0"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def only_sweep(output) -> SweepFolder:
    (path,) = output.glob("small-*/sweep.json")
    return SweepFolder(path.parent)


def running(folder: SweepFolder) -> int:
    return sum(run.status().state == "running" for run in folder.runs())


def test_four_runs_of_two_workers_share_two_cores(start, tmp_path):
    output = tmp_path / "results"
    sweep = start(output, *FOUR_RUNS, *QUARTERS)
    sweep.wait_until(lambda: any(output.glob("small-*/runs")))
    sweep.wait_until(lambda: running(only_sweep(output)) == 4, seconds=600)
    assert sweep.wait(600) == 0, sweep.text
    for run in only_sweep(output).runs():
        assert run.status().state == "finished"
    assert_as_if_undisturbed(only_sweep(output).runs()[0], tmp_path)


def test_early_stopping_makes_room_at_once(start, tmp_path):
    """One run at a time fits: the next one begins when the scheduler has stopped its predecessor."""
    output = tmp_path / "results"
    axis = ["--axis", "optimizer.lr=0.01,0.000001,0.0000001", "--axis", "seed=0"]
    sweep = start(output, "--preset", "seen", *axis, *DDP, "--scheduler", "asha")
    assert sweep.wait(800) == 0, sweep.text
    runs = {run.description()["axes"]["optimizer.lr"]: run for run in only_sweep(output).runs()}
    assert runs[0.01].status().state == "finished"
    pruned = [run for run in runs.values() if run.status().state == "pruned"]
    assert pruned, {lr: run.status() for lr, run in runs.items()}
    for run in pruned:
        assert run.status().step < 120
        assert run.checkpoint_step() == run.status().step
        assert "behind its rivals" in run.status().reason
    started, ended = (
        sorted(getattr(run.status(), f"{what}_ms") for run in runs.values()) for what in ("started", "ended")
    )
    assert all(later > earlier for later, earlier in zip(started[1:], ended, strict=False))  # never two at a time


def test_optuna(start, tmp_path):
    output = tmp_path / "results"
    sweep = start(
        output, "--preset", "quick", "--search", "optuna", "--num-samples", "3", "--axis", "seed=0", *QUARTERS
    )
    assert sweep.wait(800) == 0, sweep.text
    runs = only_sweep(output).runs()
    assert len(runs) == 3
    assert all(run.status().is_final for run in runs)


@pytest.fixture(scope="module")
def three_machines():
    """One CPU each; the sweep's own processes are on the first."""
    with start_head(num_cpus=1) as head:
        head.add_node(1)
        head.add_node(1)
        yield head


def test_a_machine_that_is_lost(start, tmp_path, three_machines):
    """Two workers on three machines: when one of theirs goes, the third takes its place."""
    head = three_machines
    output = tmp_path / "results"
    one_run = ["--axis", "optimizer.lr=0.01", "--axis", "seed=0"]
    sweep = start(output, *one_run, *DDP, "--address", head.address, with_token=True)
    sweep.wait_until(lambda: any(output.glob("small-*/runs/*/training/step-0000002*")), seconds=600)
    (run,) = only_sweep(output).runs()
    machine = machine_of_a_worker(head)
    for process in [*psutil.Process(machine.pid).children(recursive=True), machine]:
        process.kill()
    assert sweep.wait(800) == 0, sweep.text
    assert_as_if_undisturbed(run, tmp_path)


def commands_below(process) -> list[list[str]]:
    commands: list[list[str]] = []
    if process.poll() is not None:  # a machine that was lost
        return commands
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            commands.append(child.cmdline())
        except psutil.Error:
            continue
    return commands


def test_a_machine_that_is_drained(start, tmp_path, three_machines):
    """A preemption that is announced: the state is saved at once, and others go on from it."""
    head = three_machines
    while sum(process.poll() is None for process in head.processes) < 3:
        head.add_node(1)
    output = tmp_path / "results"
    one_run = ["--axis", "optimizer.lr=0.01", "--axis", "seed=0", "--checkpointing.schedule.every", "1000"]
    sweep = start(output, *one_run, *DDP, "--address", head.address, with_token=True)
    sweep.wait_until(lambda: any(output.glob("small-*/runs/*/metrics.jsonl")), seconds=600)
    (run,) = only_sweep(output).runs()
    sweep.wait_until(lambda: run.journal() and run.journal()[-1]["step"] >= 20, seconds=600)
    assert not any(run.path.glob("training/step-*"))
    drain(head, machine_of_a_worker(head))
    sweep.wait_until(lambda: any(run.path.glob("training/step-*")), seconds=600)
    assert sweep.wait(800) == 0, sweep.text
    assert_as_if_undisturbed(run, tmp_path)


def machine_of_a_worker(head):
    """One of the machines besides the first that trains."""
    return next(
        process
        for process in head.processes[1:]
        if any("RayTrainWorker" in " ".join(command) for command in commands_below(process))
    )


def drain(head, machine) -> None:
    """What a cloud's notice of a preemption becomes in Ray."""
    arguments = [argument for command in commands_below(machine) for argument in command]
    node_id = next(argument.split("=")[1] for argument in arguments if argument.startswith("--node_id="))
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", head.address]
    command += ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    command += ["--deadline-remaining-seconds", "600"]
    subprocess.run(command, check=True, env=os.environ | {"RAY_AUTH_MODE": "token"}, timeout=120)
