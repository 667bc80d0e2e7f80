"""The pool of actors on a real cluster: everything is answered once, whatever dies or is damaged."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections import Counter
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from conftest import MarkedProcess, assert_same_results, assert_tracked_once, mlflow_runs
from pool_probes import Broken, Recorder
from rich.console import Console
from small_sweep import build

from groundswell import commands
from groundswell.driver import SweepOptions, run_sweep
from groundswell.probes import answers, answers_over_time
from groundswell.rundir import SweepFolder
from groundswell.sweep import Axis
from groundswell.training.trainer import PackTrainer

HERE = Path(__file__).parent
RECORDER = ("--probe", "pool_probes.Recorder")


@pytest.fixture
def sweep(tiny, make_run, tmp_path, monkeypatch):
    """Three runs with checkpoints at steps 20, 40 and 60; workers find the tests' probes."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    trainer = PackTrainer([make_run(tiny, seed=seed) for seed in range(3)])
    while not trainer.finished:
        trainer.advance()
    return SweepFolder(tmp_path / "sweep")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "asked.txt"


@pytest.fixture
def probe(sweep, log, cluster, capsys):
    """arguments -> exit code and what was printed, of `groundswell probe` in this process."""

    def run(*arguments):
        common = ["--sweep", "sweep", "--output", str(sweep.path.parent), "--address", cluster, "--log", str(log)]
        code = commands.main(["probe", *RECORDER, *common, *arguments])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


def lines(log, word):
    """Of the recorder: what follows the word."""
    text = log.read_text() if log.exists() else ""
    return [line.split()[1:] for line in text.splitlines() if line.startswith(word)]


def counts(log):
    """(run id, step) -> how often it was asked to the end."""
    return Counter((run_id, int(step)) for step, run_id, *_ in lines(log, "end"))


def all_checkpoints(sweep):
    return Counter((run.run_id, step) for run in sweep.runs() for step in run.checkpoint_steps())


def assert_answered(sweep):
    for run in sweep.runs():
        assert [step for step, name in answers(run) if name == "recorder"] == run.checkpoint_steps()
        table = pd.read_csv(answers_over_time(run)["recorder"] / "norms.csv")
        assert list(table["step"]) == run.checkpoint_steps()
        assert not list((run.path / "probes").rglob(".*"))


@pytest.mark.slow
def test_two_actors_answer_each_checkpoint_once(sweep, log, probe):
    code, printed = probe("--pause-s", "0.2", "--workers", "2")
    assert code == 0, printed
    assert "9 checkpoints of 3 runs to ask: starting Ray on the cluster" in printed
    assert "recorded/norm" in printed and printed.count(" 3/3 ") == 3
    assert counts(log) == all_checkpoints(sweep)
    assert len({pid for *_, pid, _ in lines(log, "end")}) == 2
    assert_answered(sweep)
    assert_tracked_once(sweep)
    assert set(mlflow_runs(sweep).status) == {"FINISHED"}
    artifacts = {"/".join(path.parts[-4:]) for path in sweep.path.parent.glob("artifacts/**/probes/**/*.*")}
    assert {"probes/step-00000020/recorder/note.json", "probes/over_time/recorder/norms.csv"} <= artifacts
    assert "step 20: 0." in (sweep.path / "log" / "probes.log").read_text()

    code, printed = probe("--pause-s", "0.2")
    assert code == 0 and "nothing was left to ask" in printed and "starting Ray" not in printed
    assert counts(log) == all_checkpoints(sweep)


def test_a_killed_actor_is_replaced(sweep, log, probe):
    """kill -9 in the middle of an answer."""
    killed = []

    def kill():
        while not (begun := lines(log, "begin")):
            time.sleep(0.01)
        killed.append(int(begun[0][1]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code, printed = probe("--pause-s", "0.5", "--workers", "2")
    killer.join()
    assert code == 0, printed
    assert counts(log) == all_checkpoints(sweep)
    assert len(lines(log, "begin")) == 10
    assert killed[0] not in {int(pid) for *_, pid, _ in lines(log, "end")}
    assert_answered(sweep)
    assert_tracked_once(sweep)


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_broken_probe(sweep, log, probe):
    run = sweep.runs()[0]
    weights = run.checkpoint_folder(40) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, printed = probe("--probe", "pool_probes.Broken", "--workers", "1")
    assert code == 1
    name = run.description()["name"]
    assert f"not probed: {name} ({run.run_id}) step 40: {weights}: content differs from its checksum" in printed
    assert printed.count("broken: RuntimeError: nothing to see at") == 5  # two others at 20 and 40, this one at 20
    assert counts(log) == all_checkpoints(sweep) - Counter({(run.run_id, 40): 1})
    assert "Traceback" not in printed
    assert [step for step, name in answers(run) if name == Broken.name()] == [60]
    assert_tracked_once(sweep)


@pytest.mark.slow
def test_a_checkpoint_that_kills_each_actor(sweep, log, probe):
    """It is given up after three retries; the others are answered."""
    code, printed = probe("--deadly-step", "40", "--workers", "2", "--filter", "seed = 1")
    assert code == 1
    assert "step 40: the process that asked died, and died again after each retry" in printed
    assert len([step for step, *_ in lines(log, "begin") if step == "40"]) == 4
    assert sorted(step for _, step in counts(log)) == [20, 60]


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_answered(sweep, log, tmp_path):
    """On a cluster of the command's own; nothing keeps running, and the same command goes on."""
    options = ["--sweep", "sweep", "--output", str(tmp_path), "--log", str(log), "--pause-s", "1"]
    command = [sys.executable, "-m", "groundswell.commands", "probe", *RECORDER, *options]
    first = MarkedProcess(command, tmp_path / "first")
    try:
        first.wait_until(lambda: len(counts(log)) >= 2)
        first.interrupt()
        assert first.wait(60) == 130, first.text
        assert "Stopped. The same command goes on." in first.text and "Traceback" not in first.text
        first.assert_nothing_left()
    finally:
        first.clean_up()
    answered = Counter((run.run_id, step) for run in sweep.runs() for step, _ in answers(run))
    assert 2 <= len(answered) < 9
    again = MarkedProcess(command, tmp_path / "again")
    try:
        assert again.wait() == 0, again.text
    finally:
        again.clean_up()
    assert set(counts(log)) == set(all_checkpoints(sweep))
    assert all(counts(log)[key] == 1 for key in answered)
    assert_answered(sweep)
    assert_tracked_once(sweep)


def probing_sweep(log, pause_s, *probes):
    sweep = build("quick")
    base = sweep.base.with_overrides({"objective.pause_s": pause_s, "checkpointing.schedule.every": 40})
    axes = {"seed": Axis(values=(0, 1), also=("task.seed",))}
    asked = (Recorder(log=str(log)), *probes)
    return dataclasses.replace(sweep, name="probing", base=base, axes=axes, probes=asked, probe_steps="all")


def run(sweep, output, cluster):
    console = Console(file=StringIO(), width=200)
    code = run_sweep(sweep, SweepOptions(output=output, address=cluster), console)
    return code, console.file.getvalue()


def test_a_sweep_answers_all_its_checkpoints(cluster, tmp_path, log, monkeypatch):
    """A broken probe is told and fails nothing; the second start asks nothing again."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    sweep, folder = probing_sweep(log, 0.0, Broken()), SweepFolder(tmp_path / "probing")
    code, printed = run(sweep, tmp_path, cluster)
    assert code == 0, printed
    assert [run.checkpoint_steps() for run in folder.runs()] == [[40, 80, 120]] * 2
    assert counts(log) == all_checkpoints(folder)
    assert printed.count("broken: RuntimeError: nothing to see at") == 4
    assert_answered(folder)
    assert_tracked_once(folder)
    code, printed = run(dataclasses.replace(sweep, probes=sweep.probes[:1]), tmp_path, cluster)
    assert code == 0 and "starting Ray" not in printed and "checkpoints" not in printed
    assert counts(log) == all_checkpoints(folder)


@pytest.mark.slow
def test_checkpoints_are_answered_while_a_sweep_trains(cluster, tmp_path, log, monkeypatch):
    """By an actor that takes idle time first; the runs come out the same."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    sweep, folder = probing_sweep(log, 0.25), SweepFolder(tmp_path / "live" / "probing")
    assert run(sweep, folder.path.parent, cluster)[0] == 0
    assert [time for *_, time in lines(log, "end")].count("idle") >= 2
    first = min(path.stat().st_mtime for path in folder.path.glob("runs/*/probes/step-*/*/probe.json"))
    assert first * 1000 < max(run.status().ended_ms for run in folder.runs())
    assert counts(log) == all_checkpoints(folder)
    assert_answered(folder)
    assert_tracked_once(folder)
    without, other = dataclasses.replace(sweep, probes=()), SweepFolder(tmp_path / "without" / "probing")
    assert run(without, other.path.parent, cluster)[0] == 0
    assert_same_results(folder, other)
