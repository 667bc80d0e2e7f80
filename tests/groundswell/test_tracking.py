"""From run folders to a real MLflow store on SQLite: everything once, whatever is killed or locked in between."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sample_sweeps import START_MS, end, make_run, make_sweep, save_checkpoint, train, whole_run

from groundswell.config import ConfigError
from groundswell.tracking import Tracker, default_uri
from groundswell.tracking.tracker import sync_sweep

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Creating MLflow's tables takes seconds; tests start from a copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def sweep(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return make_sweep(tmp_path)


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def track(sweep, **options):
    tracker = Tracker(sweep, interval_s=0.05, **options)
    tracker.start()
    leftover = tracker.close(60)
    assert not leftover, leftover
    return tracker


def stored(sweep):
    """-> parent run, {run id: child run}"""
    c = client(default_uri(sweep.path.parent))
    experiment = c.get_experiment_by_name(sweep.name)
    runs = c.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    by_id = {run.data.tags["groundswell.run_id"]: run for run in children}
    assert len(by_id) == len(children), "a run was tracked twice"
    return parents[0], by_id


def history(sweep, mlflow_run_id, metric):
    found = client(default_uri(sweep.path.parent)).get_metric_history(mlflow_run_id, metric)
    return sorted((m.step, m.timestamp, m.value) for m in found)


def assert_whole(sweep, folder):
    """The store has exactly the journal: every metric, every step once."""
    run = stored(sweep)[1][folder.run_id]
    frame = folder.journal_frame()
    for metric, rows in frame.groupby("metric"):
        found = history(sweep, run.info.run_id, metric)
        assert [(s, v) for s, _, v in found] == list(zip(rows["step"], rows["value"], strict=True)), metric


def artifacts(run):
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def test_a_whole_sweep(sweep, capfd):
    folder = whole_run(sweep, 0, weight_decay=0.3)
    make_run(sweep, 1)  # waiting: not in MLflow yet
    track(sweep)
    parent, children = stored(sweep)
    assert list(children) == [folder.run_id]
    run = children[folder.run_id]
    tags = run.data.tags
    assert run.info.run_name == "num_layers=2 weight_decay=0.3 seed=1"
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", START_MS, START_MS + 50_000)
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert tags["groundswell.experiment_hash"] == folder.experiment().identity
    assert (tags["groundswell.sweep"], tags["groundswell.pack"], tags["groundswell.state"]) == (
        "demo",
        "pack0",
        "finished",
    )
    flat = folder.experiment().flatten()
    assert set(run.data.params) == set(flat)
    assert run.data.params["optimizer.weight_decay"] == "0.3"
    assert run.data.params["model.class"] == "models.decoder.Decoder"
    assert_whole(sweep, folder)
    assert history(sweep, run.info.run_id, "train/loss")[1][:2] == (10, START_MS + 1000)  # the journal's own clock
    files = {"model.safetensors", "config.json", "state.json"}
    assert artifacts(run) == {"experiment.json"} | {f"checkpoints/step-00000{s}/{f}" for s in (250, 500) for f in files}
    assert {"environment.json"} <= artifacts(parent)
    assert parent.data.tags["groundswell.runs"] == "1 finished, 1 waiting"
    assert parent.info.status == "KILLED"  # one run has not ended
    experiment = client(default_uri(sweep.path.parent)).get_experiment_by_name("demo")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.artifact_location.startswith("file:///")
    assert capfd.readouterr() == ("", "")


def test_checkpoints_share_their_blocks_with_the_run_folder(sweep):
    folder = whole_run(sweep, 0)
    track(sweep)
    root = Path(stored(sweep)[1][folder.run_id].info.artifact_uri.removeprefix("file://"))
    copy = root / "checkpoints/step-00000500/model.safetensors"
    assert copy.samefile(folder.checkpoint_folder(500) / "model.safetensors")


def test_the_last_checkpoint_becomes_a_model_with_its_accuracies(sweep):
    folder = whole_run(sweep, 0)
    track(sweep)
    c = client(default_uri(sweep.path.parent))
    models = c.search_logged_models([c.get_experiment_by_name("demo").experiment_id])
    assert [str(model.status) for model in models] == ["READY"]
    run = stored(sweep)[1][folder.run_id]
    assert models[0].source_run_id == run.info.run_id
    assert models[0].tags["groundswell.checkpoint"] == f"runs:/{run.info.run_id}/checkpoints/step-00000500"
    metrics = {m.key: m.value for m in models[0].metrics}
    assert metrics["eval/test/accuracy"] == folder.journal()[-1]["metrics"]["eval/test/accuracy"]
    assert_whole(sweep, folder)  # naming the model has not doubled a reading


@pytest.mark.parametrize(
    ("state", "mlflow_status"),
    [("stopped", "FINISHED"), ("pruned", "KILLED"), ("diverged", "FAILED"), ("failed", "FAILED")],
)
def test_endings(sweep, state, mlflow_status):
    folder = make_run(sweep, 0)
    train(folder, 0, 100)
    if state == "failed":
        folder.fail("RuntimeError: boom\nand the story")
    else:
        end(folder, state, 100, reason="because")
    track(sweep)
    run = stored(sweep)[1][folder.run_id]
    assert (run.info.status, run.data.tags["groundswell.state"]) == (mlflow_status, state)
    if state == "failed":
        assert run.data.tags["groundswell.error"] == "RuntimeError: boom"
        assert "error.txt" in artifacts(run)
    else:
        assert run.data.tags["groundswell.reason"] == "because"


def test_it_follows_a_run_while_it_trains_and_keeps_only_lasting_checkpoints(sweep):
    folder = make_run(sweep, 0)
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    train(folder, 0, 100)
    wait_until(lambda: tracker.pending() == 0)
    assert_whole(sweep, folder)
    for step in (100, 200, 300):
        train(folder, step + 10, step + 100)
        save_checkpoint(folder, step)
    wait_until(lambda: tracker.pending() == 0)
    wait_until(lambda: "checkpoints/step-00000100/model.safetensors" in artifacts(stored(sweep)[1][folder.run_id]))
    assert not any("step-00000300" in name for name in artifacts(stored(sweep)[1][folder.run_id]))  # may yet be thinned
    assert stored(sweep)[1][folder.run_id].info.status == "RUNNING"
    train(folder, 410, 500)
    end(folder)
    assert not tracker.close(30)
    names = artifacts(stored(sweep)[1][folder.run_id])
    assert {f"checkpoints/step-00000{s}00/model.safetensors" for s in (1, 2, 3)} <= names
    assert not any("training_state" in name for name in names)
    assert_whole(sweep, folder)


def test_tracking_again_changes_nothing(sweep):
    folder = whole_run(sweep, 0)
    track(sweep)
    before = stored(sweep)
    track(sweep)
    after = stored(sweep)
    assert before[0].info.run_id == after[0].info.run_id
    assert before[1][folder.run_id].to_dictionary() == after[1][folder.run_id].to_dictionary()


def test_a_lost_memory_is_found_again_in_the_store(sweep):
    """As after a kill between a write to MLflow and the note of it, even when training has gone back since."""
    folder = make_run(sweep, 0)
    train(folder, 0, 300)
    save_checkpoint(folder, 200)
    track(sweep)
    (folder.path / "tracking.json").unlink()
    (sweep.path / "tracking.json").unlink()
    folder.truncate_journal(200)
    train(folder, 210, 500, time_ms=START_MS + 3_600_000)  # the same steps at other times
    end(folder)
    track(sweep)
    assert_whole(sweep, folder)
    c = client(default_uri(sweep.path.parent))
    assert len(c.search_logged_models([c.get_experiment_by_name("demo").experiment_id])) == 1


def test_a_batch_sent_twice_is_stored_once(sweep):
    folder = make_run(sweep, 0)
    train(folder, 0, 300)
    track(sweep)
    memory_path = folder.path / "tracking.json"
    memory = json.loads(memory_path.read_text())
    run_id = memory["mlflow_run_id"]
    c = client(default_uri(sweep.path.parent))
    from mlflow.entities import Metric

    lines = folder.journal()
    again = [Metric(name, v, x["time_ms"], x["step"]) for x in lines for name, v in x["metrics"].items()]
    c.log_batch(run_id, metrics=again)
    assert_whole(sweep, folder)


def test_interrupted_and_resumed(sweep):
    folder = make_run(sweep, 0)
    train(folder, 0, 200)
    track(sweep)
    run = stored(sweep)[1][folder.run_id]
    assert (run.info.status, run.data.tags["groundswell.state"]) == ("KILLED", "interrupted")
    track(sweep)  # a driver that starts and stops before the run trains on
    assert stored(sweep)[1][folder.run_id].info.status == "KILLED"
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    folder.truncate_journal(150)
    train(folder, 160, 400, time_ms=START_MS + 3_600_000)
    wait_until(lambda: stored(sweep)[1][folder.run_id].info.status == "RUNNING")
    train(folder, 410, 500)
    end(folder)
    assert not tracker.close(30)
    assert stored(sweep)[1][folder.run_id].info.status == "FINISHED"
    assert_whole(sweep, folder)


def test_killed_at_any_moment_nothing_is_lost_or_doubled(sweep):
    """kill -9 of a tracking process, several times, while runs grow."""
    folders = [make_run(sweep, number, seed=number) for number in range(4)]
    code = """
import sys, time
from groundswell.rundir import SweepFolder
from groundswell.tracking import Tracker
Tracker(SweepFolder(sys.argv[1]), interval_s=0.01).start()
time.sleep(60)
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for part in range(3):
        for folder in folders:
            train(folder, 100 * part, 100 * part + 90)
        process = subprocess.Popen([sys.executable, "-c", code, str(sweep.path)], env=env)
        if part == 0:  # inside the first writes
            wait_until(lambda: (folders[0].path / "tracking.json").exists())
        else:
            time.sleep(2.0 + 0.3 * part)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for folder in folders:
        end(folder, step=290)
    track(sweep)
    for folder in folders:
        assert_whole(sweep, folder)


def test_a_locked_store_is_waited_for(sweep, capfd):
    track(sweep)
    lock = sqlite3.connect(sweep.path.parent / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    folder = whole_run(sweep, 0)
    start = time.monotonic()
    leftover = tracker.close(1.0)
    assert time.monotonic() - start < 2.0
    assert (leftover.runs, leftover.lines) == (1, 52)
    assert f"groundswell sync demo --output {sweep.path.parent}" in str(leftover)
    lock.execute("ROLLBACK")
    lock.close()
    wait_until(lambda: not tracker._thread.is_alive(), 30)
    assert not sync_sweep(sweep)
    assert_whole(sweep, folder)
    assert capfd.readouterr() == ("", "")


def test_writing_goes_on_after_a_lock_of_some_seconds(sweep):
    folder = make_run(sweep, 0)
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    train(folder, 0, 100)
    wait_until(lambda: tracker.pending() == 0)
    lock = sqlite3.connect(sweep.path.parent / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    train(folder, 110, 500)
    end(folder)
    time.sleep(3)
    assert tracker.pending() > 0
    lock.execute("ROLLBACK")
    lock.close()
    assert not tracker.close(40)
    assert_whole(sweep, folder)


def test_an_unreachable_server_never_raises_and_is_reported(sweep):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = whole_run(sweep, 0)
    tracker = Tracker(sweep, uri=f"http://127.0.0.1:{port}", interval_s=0.05)
    tracker.start()
    wait_until(lambda: tracker._error is not None)
    tracker.log_outputs({"tables/summary.csv": folder.path / "run.json"})
    leftover = tracker.close(1.0)
    assert (leftover.runs, leftover.outputs) == (1, 1)
    assert "HTTPConnectionPool" in str(leftover) or "Connection" in str(leftover)
    wait_until(lambda: not tracker._thread.is_alive())
    assert not sync_sweep(sweep)  # now to the default store
    assert_whole(sweep, folder)
    assert "tables/summary.csv" in artifacts(stored(sweep)[0])


def test_only_one_tracks_at_a_time(sweep):
    first = Tracker(sweep, interval_s=0.05)
    first.start()
    wait_until(lambda: first._parent is not None)
    with pytest.raises(ConfigError, match="tracks itself"):
        sync_sweep(sweep)
    assert not first.close(30)
    assert not sync_sweep(sweep)


def test_outputs_go_to_the_parent(sweep, tmp_path):
    whole_run(sweep, 0)
    (tmp_path / "summary.csv").write_text("a,b\n1,2\n")
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    tracker.log_outputs({"tables/summary.csv": tmp_path / "summary.csv", "figures/main.png": tmp_path / "summary.csv"})
    assert not tracker.close(30)
    parent, _ = stored(sweep)
    assert {"tables/summary.csv", "figures/main.png"} <= artifacts(parent)
    assert parent.info.status == "FINISHED"
    (tmp_path / "summary.csv").write_text("a,b\n3,4\n")
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    tracker.log_outputs({"tables/summary.csv": tmp_path / "summary.csv"})
    assert not tracker.close(30)
    root = Path(stored(sweep)[0].info.artifact_uri.removeprefix("file://"))
    assert (root / "tables/summary.csv").read_text() == "a,b\n3,4\n"


def test_a_new_database_gets_everything(sweep, empty_database):
    folder = whole_run(sweep, 0)
    track(sweep)
    shutil.copy(empty_database, sweep.path.parent / "mlflow.db")
    track(sweep)
    assert_whole(sweep, folder)


def test_a_run_deleted_in_the_ui_stays_deleted_and_the_others_go_on(sweep):
    folders = [make_run(sweep, number, seed=number) for number in range(2)]
    for folder in folders:
        train(folder, 0, 100)
    track(sweep)
    deleted = stored(sweep)[1][folders[0].run_id].info.run_id
    client(default_uri(sweep.path.parent)).delete_run(deleted)
    for folder in folders:
        train(folder, 110, 500)
        end(folder)
    track(sweep)
    assert list(stored(sweep)[1]) == [folders[1].run_id]
    assert_whole(sweep, folders[1])


def test_odd_metric_names_wide_lines_and_values_that_are_not_finite(sweep):
    folder = make_run(sweep, 0)
    folder.update_status(state="running", started_ms=START_MS)
    wide = {f"probe/{number}": float(number) for number in range(2_000)}
    folder.append_metrics(1, wide | {"eval/täsk (a+b)/accuracy": 0.5, "a//b": 1.0, "nan": float("nan")})
    folder.append_metrics(2, {"loss": float("inf")})
    end(folder, step=2)
    track(sweep)
    run = stored(sweep)[1][folder.run_id]
    assert run.data.metrics["probe/1999"] == 1999.0
    assert run.data.metrics["eval/täsk _a_b_/accuracy"] == 0.5
    assert run.data.metrics["a/b"] == 1.0
    assert run.data.metrics["nan"] != run.data.metrics["nan"]
    assert run.data.metrics["loss"] > 1e300


def test_a_renamed_run_is_renamed_in_the_store(sweep):
    folder = whole_run(sweep, 0)
    track(sweep)
    folder.write_new(folder.experiment(), "seed=1", {"seed": 1}, pack="pack7", number=0)
    track(sweep)
    run = stored(sweep)[1][folder.run_id]
    assert (run.info.run_name, run.data.tags["groundswell.pack"]) == ("seed=1", "pack7")
    assert run.info.status == "FINISHED"


def answer(folder, value):
    """What a probe of that name has found in the checkpoint of step 500."""
    path = folder.path / "probes" / "step-00000500" / "norms"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "scalars.json").write_text(json.dumps({"probe/norm": value}))
    (path / "rows.npy").write_bytes(b"numbers")
    (path / "probe.json").write_text(json.dumps({"scale": value}))


def test_answers_of_probes_come_to_the_run_once(sweep):
    folder = whole_run(sweep, 0)
    track(sweep)
    answer(folder, 2.0)  # after the run's end
    track(sweep)
    track(sweep)
    run = stored(sweep)[1][folder.run_id]
    assert [(step, value) for step, _, value in history(sweep, run.info.run_id, "probe/norm")] == [(500, 2.0)]
    names = {"rows.npy", "scalars.json", "probe.json"}
    assert {f"probes/step-00000500/norms/{name}" for name in names} <= artifacts(run)
    assert run.info.status == "FINISHED"


def test_an_axis_of_names_is_a_parameter(sweep):
    folder = whole_run(sweep, 0)
    description = folder.description() | {"axes": {"task": "add", "model.num_layers": 2}}
    (folder.path / "run.json").write_text(json.dumps(description))
    track(sweep)
    params = stored(sweep)[1][folder.run_id].data.params
    assert (params["task"], params["model.num_layers"]) == ("add", "2")


def test_answers_that_come_while_the_tracker_runs(sweep):
    folder = whole_run(sweep, 0)
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    wait_until(lambda: folder.run_id in tracker._done)
    answer(folder, 3.0)
    tracker.look_again(folder.run_id)
    assert not tracker.close(60)
    run = stored(sweep)[1][folder.run_id]
    assert run.data.metrics["probe/norm"] == 3.0
