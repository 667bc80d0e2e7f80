"""What is asked of which checkpoints, what goes wrong, and who sends the answers; without Ray."""

import dataclasses
import json
import shutil
import threading
from collections import deque
from io import StringIO

import pandas as pd
import pytest
from filelock import FileLock
from rich.console import Console

from groundswell import ConfigError, commands, probing
from groundswell.probe_commands import _shorten
from groundswell.probe_pool import Job, ProbePool, answer
from groundswell.probes import Findings, Probe, answers, answers_over_time, ask, look_over_time, scalars
from groundswell.probing import Asking, Target, answer_here, make_plan, probe_checkpoints
from groundswell.progress import ProbeProgress
from groundswell.results import load_results
from groundswell.rundir import SweepFolder
from groundswell.selection import select_runs, select_steps
from groundswell.sweep import PlannedRun
from groundswell.tracking import Tracker, default_uri
from groundswell.tracking.run_sync import unsent_answers
from groundswell.training.trainer import PackTrainer


class Norm(Probe):
    headlines = ("probe/*",)

    scale: float = 1.0

    def objection(self, experiment):
        return None if experiment.model.num_layers == 1 else "only for networks of one layer"

    def run(self, opened):
        assert str(opened.device) == "cpu"
        value = self.scale * float(opened.parameters["transformer.wte.weight"].norm())
        return Findings({"probe/norm": value}, texts={"all_items.json": json.dumps([opened.step])})

    def over_time(self, folder, answers):
        return Findings(tables={"norms": pd.DataFrame({"step": list(answers)})})


class Stumbles(Probe):
    """Cannot answer at step 40."""

    scale: float = 2.0
    depth: int = 3

    def run(self, opened):
        if opened.step == 40:
            raise ValueError("nothing there\nat all")
        return Findings({"stumbles/depth": self.depth})


@pytest.fixture
def trained(tiny, make_run):
    """Two runs with checkpoints at steps 20, 40 and 60."""
    folders = [make_run(tiny, seed=seed) for seed in (0, 1)]
    trainer = PackTrainer(folders)
    while not trainer.finished:
        trainer.advance()
    return folders


@pytest.fixture
def sweep(trained, tmp_path):
    return SweepFolder(tmp_path / "sweep")


@pytest.fixture
def no_cluster(monkeypatch):
    """Jobs are done in this process."""

    def here(asking, jobs, probes, workers, address, console, interrupted):
        answer_here(asking, deque(jobs), ProbeProgress(console, len(jobs)), interrupted)

    monkeypatch.setattr(probing, "_on_actors", here)


class NoTracking:
    def __init__(self, *arguments):
        pass

    def answered(self, job):
        pass

    def close(self):
        pass


@pytest.fixture
def untracked(monkeypatch):
    monkeypatch.setattr(probing, "AnswerTracking", NoTracking)


def targets(sweep, steps="all"):
    return [Target(sweep, run, tuple(select_steps(run, steps))) for run in sweep.runs()]


def quiet():
    return Console(file=StringIO(), width=200)


# ---- selection ----


def test_runs_are_selected_by_sweep_filter_and_name(sweep, tmp_path):
    names = {run.description()["name"]: run for run in sweep.runs()}
    one = names["seed=1"]

    def chosen(**selection):
        return {run.run_id for _, run in select_runs(tmp_path, **selection)}

    assert chosen(sweep="sweep") == {run.run_id for run in sweep.runs()}
    assert chosen(filter="seed = 1") == chosen(filter="params.seed = '1'") == {one.run_id}
    assert chosen(runs=["seed=1"]) == chosen(runs=[one.run_id[:6]]) == {one.run_id}
    assert chosen(sweep="sweep", filter="eval/test/accuracy >= 0", runs=["seed=1", "seed=0"]) == chosen(sweep="sweep")
    with pytest.raises(ConfigError, match=r"--sweep NAME, --filter .*, --runs ID"):
        select_runs(tmp_path)
    with pytest.raises(ConfigError, match="no sweep 'swep' .* near: sweep"):
        select_runs(tmp_path, sweep="swep")
    with pytest.raises(ConfigError, match="no run 'seed=2' in sweep sweep .* near: seed="):
        select_runs(tmp_path, sweep="sweep", runs=["seed=2"])
    with pytest.raises(ConfigError, match="none of the 2 runs in sweep sweep is selected"):
        select_runs(tmp_path, sweep="sweep", filter="seed = 0", runs=["seed=1"])


def test_steps_are_selected(trained):
    run = trained[0]
    assert select_steps(run) == [20, 40, 60]
    assert select_steps(run, "last") == [60]
    assert select_steps(run, "every:2") == [20, 60]
    assert select_steps(run, "every:9") == [60]
    assert select_steps(run, "40, 20,40") == [20, 40]
    with pytest.raises(ConfigError, match="no checkpoint at step 30; there are: 20, 40, 60"):
        select_steps(run, "20,30")
    for text in ("every:0", "every:x", "first", "", "-20"):
        with pytest.raises(ConfigError, match="write all, last, every:N"):
            select_steps(run, text)


def test_checkpoints_that_stay(tiny):
    last_only = tiny.with_overrides({"checkpointing.keep": "last"})
    assert [step for step in (20, 30, 40, 60) if tiny.stays(step)] == [20, 40, 60]
    assert [step for step in (20, 40, 60) if last_only.stays(step)] == [60]


# ---- asking ----


def test_one_failing_probe_does_not_stop_the_others(trained):
    failed = ask(trained[0], 40, [Stumbles(), Norm()])
    assert list(failed) == ["stumbles"]
    assert list(answers(trained[0])) == [(40, "norm")]
    path = answers(trained[0])[40, "norm"]
    assert json.loads((path / "all_items.json").read_text()) == [40]
    assert not [entry for entry in path.parent.iterdir() if entry.name.startswith(".")]


def test_what_answers_show_over_time_follows_the_answers(trained):
    run = trained[0]
    assert not look_over_time(run, Norm())  # nothing answered
    ask(run, 20, [Norm()])
    ask(run, 60, [Norm(scale=2.0)])  # another question
    assert look_over_time(run, Norm())
    table = answers_over_time(run)["norm"] / "norms.csv"
    assert list(pd.read_csv(table)["step"]) == [20]
    assert not look_over_time(run, Norm())
    ask(run, 40, [Norm()])
    ask(run, 60, [Norm()])
    assert look_over_time(run, Norm())
    assert list(pd.read_csv(table)["step"]) == [20, 40, 60]
    assert not look_over_time(run, Stumbles())


def test_a_plan_has_what_is_left(sweep, trained):
    ask(trained[0], 20, [Norm()])
    plan = make_plan(targets(sweep), [Norm()])
    assert len(plan.jobs) == 5 and not plan.failures
    assert make_plan(targets(sweep, "20"), [Norm()]).jobs[0].step in (20, None)
    (trained[0].path / "experiment.json").write_text("{")
    plan = make_plan(targets(sweep), [Norm()])
    assert len(plan.jobs) == 3
    assert str(plan.failures[0]).startswith(f"not probed: seed=0 ({trained[0].run_id}): ")


def test_everything_is_asked_once_and_troubles_are_told(sweep, trained, no_cluster, untracked):
    weights = trained[1].checkpoint_folder(20) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    outcome = probe_checkpoints(targets(sweep), [Norm(), Stumbles()], console=quiet())
    assert (outcome.answered, outcome.exit_code) == (3, 1)
    told = [str(failure) for failure in outcome.failures]
    assert f"not probed: seed=0 ({trained[0].run_id}) step 40: stumbles: ValueError: nothing there at all" in told
    assert sum("content differs from its checksum" in line and "step 20" in line for line in told) == 1
    assert len(told) == 3
    for run, steps in zip(trained, ([20, 40, 60], [40, 60]), strict=True):
        assert [step for step, name in answers(run) if name == "norm"] == steps
        assert list(pd.read_csv(answers_over_time(run)["norm"] / "norms.csv")["step"]) == steps
    again = probe_checkpoints(targets(sweep), [Norm()], console=quiet())
    assert again.answered == 0 and len(again.failures) == 1


def test_an_interrupt_keeps_what_is_there(sweep, trained):
    interrupted = threading.Event()
    asking = Asking(lambda job: interrupted.set())
    jobs = deque(asking.take(make_plan(targets(sweep), [Norm()]).jobs))
    answer_here(asking, jobs, ProbeProgress(quiet(), len(jobs)), interrupted)
    assert asking.num_answered == 1 and len(jobs) == 5


def test_failed_jobs_can_be_taken_again(sweep, trained):
    jobs = make_plan(targets(sweep), [Stumbles()]).jobs
    asking = Asking(lambda job: None)
    for job in asking.take(jobs):
        asking.finished(job, answer(job))
    assert (asking.num_answered, asking.num_failed) == (4, 2)
    assert asking.take(jobs) == []
    asking.forget_failures()
    assert [job.step for job in asking.take(jobs)] == [40, 40]


def test_actors_stay_with_a_task():
    """Its data set is kept; an actor without a task takes the one that nobody is at."""
    pool = ProbePool((), lambda job, troubles: [])
    run = SweepFolder("sweep").run("run")
    pool.submit([Job(SweepFolder("sweep"), run, step, (), task) for task in "ab" for step in (1, 2)])
    order = [pool._next_job(task) for task in ("", "b", "b", "b", "a")]
    assert [(job.task, job.step) if job else None for job in order] == [("a", 1), ("b", 1), ("b", 2), ("a", 2), None]
    assert pool.pending == 0


def test_the_line_of_progress():
    progress = ProbeProgress(quiet(), 50)
    assert progress.line() == "0/50 questions | starting actors"
    progress.begin()
    progress.actors = 2
    progress.count(answered=12, failed=1)
    progress._begin -= 5.2
    assert progress.line() == "13/50 questions | 2 actors | 2.5/s | 15 s left | 1 failed"


def test_results_have_the_answers_of_all_steps(tiny, trained, sweep):
    for step in (60, 20):
        ask(trained[0], step, [Norm()])
    results = load_results(sweep, [PlannedRun(tiny, {}, "run")], (), "seed")
    found = results.answers(tiny.run_id, "norm")
    assert list(found) == [20, 60]
    assert results.answer(tiny.run_id, "norm") == found[60]
    assert results.answers(tiny.run_id, "other") == {}


# ---- commands ----


@pytest.fixture
def command(tmp_path, capsys, no_cluster, untracked, monkeypatch):
    monkeypatch.setattr("groundswell.probe_commands.PROBES", {"evaluate": (f"{__name__}.Norm", f"{__name__}.Stumbles")})

    def run(*arguments):
        code = commands.main([*arguments, "--output", str(tmp_path)])
        return code, capsys.readouterr()

    return run


def test_fields_of_probes_are_options(command, sweep, trained):
    """A field that two probes share is one option; where their defaults differ each keeps its own."""
    code, printed = command("evaluate", "--sweep", "sweep", "--steps", "last", "--depth", "7")
    assert code == 0, printed
    assert "probe/norm" in printed.out and "2 checkpoints of 2 runs: 2 newly answered" in printed.out
    questions = {path.parent.name: json.loads(path.read_text()) for path in sweep.path.glob("runs/*/probes/step*/*/p*")}
    assert questions["norm"]["scale"] == 1.0
    assert (questions["stumbles"]["scale"], questions["stumbles"]["depth"]) == (2.0, 7)
    command("evaluate", "--sweep", "sweep", "--steps", "last", "--scale", "5")
    assert scalars(answers(trained[0])[60, "norm"])["probe/norm"] > 2
    code, printed = command("evaluate", "--runs", "seed=0", "seed=1", "--steps", "40")
    assert code == 1 and printed.out.count("not probed: seed=") == 2


def test_mistakes_are_told_in_one_line(command, sweep):
    name = f"{__name__}.Norm"
    for arguments, message in {
        ("evaluate",): "which runs?",
        ("evaluate", "--sweep", "swap"): "no sweep 'swap'",
        ("evaluate", "--sweep", "sweep", "--workers", "0"): "workers 0: must be at least 1",
        ("evaluate", "--sweep", "sweep", "--steps", "7"): "no checkpoint at step 7",
        ("evaluate", "--sweep", "sweep", "--filter", "sede = 1"): "filter: no run has 'sede'",
        ("probe", "--sweep", "sweep"): "--probe some.module.ClassName",
        ("probe", "--sweep", "sweep", "--probe", "no.such.Class"): "no class at import path 'no.such.Class'",
        ("probe", "--sweep", "sweep", "--probe", "groundswell.Budget"): "'groundswell.Budget' is not a Probe",
        ("probe", f"--probe={name}", "--runs", "nobody"): "no run 'nobody'",
    }.items():
        code, printed = command(*arguments)
        assert code == 2, arguments
        assert printed.err.startswith("groundswell: ") and message in printed.err
        assert printed.err.count("\n") == 1


def test_columns_of_the_table_have_short_names():
    assert _shorten(["evaluate/iid/accuracy", "evaluate/ood/accuracy"]) == ("evaluate/*/accuracy", ["iid", "ood"])
    assert _shorten(["lens/mrr", "lens/rank"]) == ("lens/*", ["mrr", "rank"])
    assert _shorten(["a/x", "b/x"]) == ("*/x", ["a", "b"])
    for names in (["lens/a/mrr", "trace/n"], ["lens/mrr"], ["a", "a/b"], []):
        assert _shorten(names) == ("", names)


def test_no_run_that_can_be_asked(command, tiny, make_run):
    folder = make_run(tiny, sweep="deep", **{"model.num_layers": 2})
    name = f"{__name__}.Norm"
    code, printed = command("probe", "--probe", name, "--sweep", "deep")
    assert code == 2 and "none of the 1 selected runs has a checkpoint yet" in printed.err
    folder.checkpoint_folder(20).mkdir(parents=True)
    code, printed = command("probe", "--probe", name, "--sweep", "deep")
    assert (code, printed.err) == (2, "groundswell: probe: norm: only for networks of one layer\n")


def test_runs_that_cannot_be_asked_beside_others(command, sweep, tiny, make_run):
    folder = make_run(tiny, **{"model.num_layers": 2})
    folder.checkpoint_folder(20).mkdir(parents=True)
    code, printed = command("probe", "--probe", f"{__name__}.Norm", "--sweep", "sweep")
    assert code == 0
    assert "not asked in 1 of 3 runs: norm: only for networks of one layer" in printed.out
    assert "7 checkpoints of 3 runs: 6 newly answered" in printed.out


# ---- tracking ----


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """Creating MLflow's tables takes seconds; tests start from a copy."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")


def track(sweep):
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    assert not tracker.close(60)


def mlflow_state(sweep):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=default_uri(sweep.path.parent))
    runs = client.search_runs([client.get_experiment_by_name(sweep.name).experiment_id])
    return client, {run.data.tags.get("groundswell.run_id", "parent"): run for run in runs}


def test_answers_go_to_the_finished_run(sweep, trained, no_cluster, tracked):
    """At their steps, once; the run's state stays. A run that nobody trains is not shown as running."""
    track(sweep)
    before = mlflow_state(sweep)[1]
    probe_checkpoints(targets(sweep), [Norm()], console=quiet())
    client, runs = mlflow_state(sweep)
    for folder in trained:
        run = runs[folder.run_id]
        readings = client.get_metric_history(run.info.run_id, "probe/norm")
        expected = {step: scalars(path)["probe/norm"] for (step, _), path in answers(folder).items()}
        assert len(readings) == 3 and {reading.step: reading.value for reading in readings} == expected
        assert (run.info.status, run.info.end_time) == ("FINISHED", before[folder.run_id].info.end_time)
        names = {entry.path for entry in client.list_artifacts(run.info.run_id, "probes/over_time/norm")}
        assert "probes/over_time/norm/norms.csv" in names
        assert unsent_answers(folder, default_uri(sweep.path.parent)) == 0
    assert runs["parent"].info.status == "FINISHED"


def test_half_done_runs_keep_their_state(tiny, make_run, sweep, no_cluster, tracked):
    half = make_run(tiny, seed=2)
    trainer = PackTrainer([half])
    while half.checkpoint_step() < 20:
        trainer.advance()
    trainer.save_all()
    probe_checkpoints(targets(sweep), [Norm()], console=quiet())
    run = mlflow_state(sweep)[1][half.run_id]
    assert (run.info.status, run.data.tags["groundswell.state"]) == ("KILLED", "interrupted")
    assert half.status().state == "running"
    trainer = PackTrainer([half])
    while not trainer.finished:
        trainer.advance()
    track(sweep)
    assert mlflow_state(sweep)[1][half.run_id].info.status == "FINISHED"


def test_a_sweep_that_is_being_trained_sends_the_answers_itself(sweep, trained, no_cluster, tracked):
    """Its tracker looks at runs that are done once more when it closes."""
    tracker = Tracker(sweep, interval_s=0.05)
    tracker.start()
    try:
        while len(tracker._done) < 2:
            tracker._thread.join(0.05)
        console = quiet()
        with FileLock(sweep.path / "sweep.lock"):
            probe_checkpoints(targets(sweep, "last"), [Norm()], console=console)
        assert "sweep is in use by another process, which sends the answers" in console.file.getvalue()
        assert unsent_answers(trained[0], default_uri(sweep.path.parent)) == 2
    finally:
        assert not tracker.close(60)
    assert mlflow_state(sweep)[1][trained[0].run_id].data.metrics["probe/norm"] > 0


def test_what_an_earlier_command_left_is_sent(sweep, trained, no_cluster, tracked):
    for run in trained:
        ask(run, 60, [Norm()])
        look_over_time(run, Norm())
    outcome = probe_checkpoints(targets(sweep, "last"), [Norm()], console=quiet())
    assert outcome == dataclasses.replace(outcome, answered=0, failures=())
    assert len(mlflow_state(sweep)[1]) == 3
    assert all(unsent_answers(run, default_uri(sweep.path.parent)) == 0 for run in trained)
