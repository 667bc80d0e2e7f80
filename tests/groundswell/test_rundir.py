import json
import math
import subprocess
import sys

import pytest
from sample_sweeps import end, make_run, make_sweep, sample_experiment, save_checkpoint, train, whole_run

from groundswell.config import ConfigError
from groundswell.rundir import JournalTail, RunFolder, Status, SweepFolder, list_sweeps


@pytest.fixture
def run(tmp_path):
    return make_run(make_sweep(tmp_path), 0)


def test_a_new_run_knows_what_it_is(run):
    assert run.experiment() == sample_experiment()
    assert run.run_id == run.experiment().run_id
    assert run.description()["axes"] == {"model.num_layers": 2, "optimizer.weight_decay": 0.1, "seed": 1}
    assert run.status() == Status("waiting") and not run.status().is_final
    assert (run.journal(), run.checkpoint_steps(), run.checkpoint_step(), run.prune_request()) == ([], [], 0, None)


def test_describing_again_keeps_what_was_trained(run):
    train(run, 0, 20)
    run.write_new(sample_experiment(), "other name", {"seed": 1}, pack="pack9", number=4)
    assert run.description()["pack"] == "pack9"
    assert run.status().state == "running" and len(run.journal()) == 3


def test_status_keeps_what_is_not_changed_and_clears_an_old_ending(run):
    run.update_status(state="running", started_ms=5)
    report = run.fail("boom\nand more")
    status = run.status()
    assert (status.state, status.error, status.started_ms, status.is_final) == ("failed", "boom", 5, True)
    assert (run.path / "error.txt").read_text() == "boom\nand more\n"
    assert report == {"run_id": run.run_id, "state": "failed", "error": "boom"}
    again = run.update_status(state="running")
    assert (again.error, again.ended_ms, again.started_ms) == (None, None, 5)
    with pytest.raises(ValueError, match="no such state 'done'"):
        run.update_status(state="done")
    with pytest.raises(TypeError):
        run.update_status(stpe=3)


def test_journal_round_trip_and_order(run):
    train(run, 0, 30)
    lines = RunFolder(run.path).journal()
    assert [line["step"] for line in lines] == [0, 10, 20, 30]
    assert lines[0]["metrics"]["eval/test/accuracy"] == pytest.approx(1 / (1 + math.exp(10)))
    with pytest.raises(ValueError, match="step 30 does not come after step 30"):
        RunFolder(run.path).append_metrics(30, {"train/loss": 1.0})
    assert len(run.journal_frame()) == sum(len(line["metrics"]) for line in lines)


def test_a_torn_last_line_is_passed_over_and_removed_by_the_next_writer(run, caplog):
    train(run, 0, 20)
    with run.journal_path.open("a") as file:
        file.write('{"step": 30, "time_ms": 1, "metr')
    assert [line["step"] for line in run.journal()] == [0, 10, 20]
    writer = RunFolder(run.path)
    writer.append_metrics(30, {"train/loss": 1.0})
    assert [line["step"] for line in run.journal()] == [0, 10, 20, 30]
    assert all(json.loads(line) for line in run.journal_path.read_text().splitlines())


def test_readings_reach_other_processes_and_outlive_a_kill(run):
    code = """
import os, sys
from groundswell.rundir import RunFolder
run = RunFolder(sys.argv[1])
for step in range(5):
    run.append_metrics(step, {"train/loss": 0.5})
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert [line["step"] for line in run.journal()] == [0, 1, 2, 3, 4]


def test_truncate_forgets_later_steps_and_goes_on(run):
    train(run, 0, 50)
    run.truncate_journal(30)
    assert [line["step"] for line in run.journal()] == [0, 10, 20, 30]
    run.append_metrics(40, {"train/loss": 1.0})
    assert run.journal()[-1]["step"] == 40
    run.truncate_journal(-1)
    assert run.journal() == []
    run.append_metrics(0, {"train/loss": 1.0})
    assert len(run.journal()) == 1


def test_tail_reads_each_line_once_and_starts_over_after_a_truncation(run):
    tail = JournalTail(run.journal_path)
    assert tail.read() == []
    train(run, 0, 20)
    assert [line["step"] for line in tail.read()] == [0, 10, 20]
    assert tail.read() == []
    with run.journal_path.open("a") as file:
        file.write('{"step": 30, "time_ms": 1, ')
    assert tail.read() == []
    with run.journal_path.open("a") as file:
        file.write('"metrics": {}}\n')
    assert [line["step"] for line in tail.read()] == [30]
    run.truncate_journal(10)
    train(run, 20, 60, time_ms=9_000_000_000_000)  # longer than before, other times
    assert [line["step"] for line in tail.read()] == [0, 10, 20, 30, 40, 50, 60]


def test_checkpoints_are_listed_by_step(run):
    for step in (100, 50, 200):
        save_checkpoint(run, step)
    (run.checkpoints / ".step-00000300.tmp-host-1-00000000").mkdir()
    assert run.checkpoint_steps() == [50, 100, 200]
    assert run.checkpoint_step() == 200
    assert run.checkpoint_folder(200).is_dir()


def test_prune_request_outlives_the_process(run):
    run.request_prune("behind its rivals at step 30")
    assert RunFolder(run.path).prune_request() == "behind its rivals at step 30"


def test_sweep_lists_whole_runs_only(tmp_path):
    sweep = make_sweep(tmp_path)
    folders = [make_run(sweep, number, seed=number) for number in range(3)]
    (sweep.path / "runs" / "0123456789ab").mkdir()  # killed before it was described
    assert {folder.run_id for folder in sweep.runs()} == {folder.run_id for folder in folders}
    assert sweep.has_run(folders[0].run_id) and not sweep.has_run("0123456789ab")
    assert [found.name for found in list_sweeps(tmp_path)] == ["demo"]
    with pytest.raises(ConfigError, match="run id"):
        sweep.run("../../etc")
    with pytest.raises(ConfigError, match="sweep name"):
        SweepFolder(tmp_path / "..")


def test_sweep_frame_holds_axes_states_and_histories(tmp_path):
    sweep = make_sweep(tmp_path)
    whole_run(sweep, 0, weight_decay=0.3)
    waiting = make_run(sweep, 1, weight_decay=0.1)
    frame = sweep.frame()
    assert set(frame["state"]) == {"finished", "waiting"}
    trained = frame[frame["optimizer.weight_decay"] == 0.3]
    assert len(trained) == 51
    assert trained["eval/test/accuracy"].notna().sum() == 11
    assert frame[frame["run_id"] == waiting.run_id]["step"].isna().all()


def test_damaged_status_is_told(run):
    end(run)
    (run.path / "status.json").write_text("{")
    with pytest.raises(ConfigError, match="status.json is damaged"):
        run.status()
