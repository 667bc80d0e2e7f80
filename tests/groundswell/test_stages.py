"""Stages of a pipeline: which runs they make, in which order, and what they start from."""

import dataclasses
import json

import pytest
from rich.console import Console

from groundswell import ConfigError, stages
from groundswell.cli import Options, customise
from groundswell.driver import SweepOptions
from groundswell.dryrun import dry_run
from groundswell.search import InOrder, ListedPacks, OptunaPacks
from groundswell.stages import Stage, check_stages, is_there, reference, referred_run, remember, resolve
from groundswell.sweep import Axis, make_packs, unique_runs
from tests.groundswell.staged import pipeline


@pytest.fixture(autouse=True)
def no_sweeps(monkeypatch):
    monkeypatch.setattr(stages, "_known_sweeps", {})


def by_stage(runs):
    return {run.axes["stage"]: run for run in runs}


def test_a_setting_is_one_run_a_stage_and_replicate(tiny):
    sweep = pipeline(tiny, seeds=(0, 1))
    runs = sweep.runs({"optimizer.lr": 1e-3})
    assert [run.axes["stage"] for run in runs] == ["first", "left", "right", "last"] * 2
    made = by_stage(runs[:4])
    assert made["left"].inputs == {"model.start": made["first"].run_id}
    assert made["left"].experiment.model.start == f"run:{made['first'].run_id}@best"
    assert made["right"].experiment.model.start.endswith("@last")
    assert [run.decisive for run in runs[:4]] == [False, False, False, True]
    assert made["first"].name == "stage=first lr=0.001 seed=0"


def test_a_changed_stage_makes_new_runs_of_itself_and_of_what_follows(tiny):
    sweep = pipeline(tiny)
    changed = dataclasses.replace(
        sweep, stages=tuple(
            dataclasses.replace(s, changes={**s.changes, "budget.steps": 30}) if s.name == "left" else s
            for s in sweep.stages
        ),
    )  # fmt: skip
    old, new = (by_stage(s.runs({"optimizer.lr": 1e-3})) for s in (sweep, changed))
    assert {name for name in old if old[name].run_id != new[name].run_id} == {"left", "last"}


def test_runs_that_an_axis_does_not_reach_are_shared(tiny):
    sweep = pipeline(tiny)
    axes = {"model.start": Axis(values=("", "other")), "seed": Axis(values=(0,))}
    sweep = dataclasses.replace(sweep, axes=axes, stages=(sweep.stages[0], Stage("left", sweep.stages[1].changes)))
    runs = unique_runs([run for setting in sweep.grid() for run in sweep.runs(setting)])
    assert [run.name for run in runs] == [
        "stage=first seed=0",
        "stage=left start= seed=0",
        "stage=left start=other seed=0",
    ]


def test_packs_wait_for_what_they_start_from(tiny):
    runs = pipeline(tiny).runs({"optimizer.lr": 1e-3})
    made = by_stage(runs)
    source = InOrder(ListedPacks([[run] for run in reversed(runs)]))
    assert source.next_pack() == [made["first"]]
    assert source.next_pack() == []
    source.complete(made["first"].run_id, {"state": "finished"})
    assert [source.next_pack(), source.next_pack()] == [[made["right"]], [made["left"]]]
    assert source.next_pack() == []
    source.complete(made["left"].run_id, {"state": "finished"})
    assert source.next_pack() == [made["last"]]
    assert source.next_pack() is None


def test_a_run_that_several_settings_share_is_handed_out_once(tiny):
    runs = pipeline(tiny).runs({"optimizer.lr": 1e-3})
    source = InOrder(ListedPacks([[runs[0]], [runs[0]], [runs[1]]]))  # as two settings with one teacher ask
    assert source.next_pack() == [runs[0]]
    assert source.next_pack() == []
    source.complete(runs[0].run_id, {"state": "finished"})
    assert source.next_pack() == [runs[1]]


def test_runs_of_different_stages_are_packed_apart(tiny):
    sweep = pipeline(tiny, seeds=(0, 1))
    packs = make_packs(sweep.runs({"optimizer.lr": 1e-3}), 1, False, 8)
    assert all(len({run.axes["stage"] for run in pack}) == 1 for pack in packs)


def test_what_others_wait_for_comes_first(tiny):
    sweep = pipeline(tiny)
    lonely = Stage("lonely", {"budget.steps": 70})
    runs = dataclasses.replace(sweep, stages=(lonely, *sweep.stages)).runs({"optimizer.lr": 1e-3})
    packs = make_packs(runs, 2, False, 1)
    assert [pack[0].axes["stage"] for pack in packs[:2]] == ["first", "lonely"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((Stage("a"), Stage("a")), "two of that name"),
        ((Stage("a", {}, {"model.start": "b"}), Stage("b")), "no stage before it"),
        ((Stage("a"), Stage("b", {}, {"model.start": "a@newest"})), "STAGE@best"),
    ],
)
def test_impossible_stages(bad, message):
    with pytest.raises(ConfigError, match=message):
        check_stages(bad)


# ---- references ----


def test_a_reference_is_the_best_checkpoint_of_a_finished_run(tiny, make_run):
    run = make_run(tiny.with_overrides({"checkpointing.best_metric": "eval/test/accuracy"}))
    for step, accuracy in ((20, 0.5), (40, 0.9), (60, 0.7)):
        run.append_metrics(step, {"eval/test/accuracy": accuracy})
        run.checkpoint_folder(step).mkdir(parents=True)
    run.experiment()  # the process meets the sweep
    with pytest.raises(ConfigError, match="is waiting, not finished"):
        resolve(reference(run.run_id))
    run.update_status(state="finished", step=60)
    assert resolve(reference(run.run_id)) == run.checkpoint_folder(40).resolve()
    assert resolve(reference(run.run_id, "last")) == run.checkpoint_folder(60).resolve()
    assert is_there(reference(run.run_id))
    assert referred_run(reference(run.run_id)) == run.run_id


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert referred_run(str(tmp_path)) is None
    assert not is_there(tmp_path / "missing")


def test_an_unknown_run(tmp_path):
    with pytest.raises(ConfigError, match="no such run in any known sweep"):
        resolve("run:0123456789ab@best")
    remember(tmp_path / "sweep")
    with pytest.raises(ConfigError, match="no such run in .*sweep"):
        resolve("run:0123456789ab@best")


def test_a_run_says_what_it_started_from(tiny, tmp_path):
    from groundswell.rundir import SweepFolder

    runs = by_stage(pipeline(tiny).runs({"optimizer.lr": 1e-3}))
    folder = SweepFolder(tmp_path / "sweep").create_run(runs["left"], "pack", 1)
    assert folder.description()["inputs"] == {"model.start": runs["first"].run_id}
    assert json.loads((folder.path / "run.json").read_text())["axes"]["stage"] == "left"


# ---- the command line ----


def customised(tiny, fields, axes=()):
    return customise(pipeline(tiny), "demo", Options(axis=axes), fields)


def test_a_field_reaches_all_stages_that_have_it(tiny):
    sweep = customised(tiny, {"budget.steps": 7})
    assert {run.experiment.budget.steps for run in sweep.runs({"optimizer.lr": 1e-3})} == {7}
    assert sweep.name.startswith("pipeline-demo-")


def test_a_field_of_one_stage(tiny):
    sweep = customised(tiny, {"left.optimizer.lr": 0.5, "left.budget.steps": 9})
    runs = by_stage(dataclasses.replace(sweep, axes={"seed": Axis(values=(0,))}).runs({}))
    assert runs["left"].experiment.optimizer.lr == 0.5
    assert {name for name, run in runs.items() if run.experiment.budget.steps == 9} == {"left"}


def test_chosen_stages_bring_those_they_start_from(tiny):
    sweep = customise(pipeline(tiny), "demo", Options(stages="last"), {})
    assert [stage.name for stage in sweep.stages] == ["first", "left", "last"]
    assert sweep.name == "pipeline-demo"
    with pytest.raises(ConfigError, match="--stages lst: .*last"):
        customise(pipeline(tiny), "demo", Options(stages="lst"), {})
    with pytest.raises(ConfigError, match="this sweep has none"):
        customise(dataclasses.replace(pipeline(tiny), stages=()), "demo", Options(stages="last"), {})


def test_a_dry_run_lists_what_it_cannot_try_yet(tiny, tmp_path):
    console = Console(record=True, width=160)
    sweep = dataclasses.replace(pipeline(tiny), stages=pipeline(tiny).stages[:2])
    assert dry_run(sweep, SweepOptions(output=tmp_path), console) == 0
    text = console.export_text()
    assert "stage=left" in text
    assert "1 packs start from runs that are not trained yet" in text
    assert list(tmp_path.iterdir()) == []


def test_without_fields_the_name_is_plain(tiny):
    assert customised(tiny, {}).name == "pipeline-demo"


@pytest.mark.parametrize("path", ["model.with", "left.model.starts", "middle.budget.steps"])
def test_a_misspelt_field_is_named(tiny, path):
    with pytest.raises(ConfigError, match=path.split(".", 1)[1].split(".")[-1]):
        customised(tiny, {path: 1})


def test_a_misspelt_axis_is_named(tiny):
    with pytest.raises(ConfigError, match="widht"):
        customised(tiny, {}, ("model.widht=1,2",))


def test_optuna_is_told_the_last_stages_value(tiny, tmp_path):
    sweep = pipeline(tiny, lrs=(1e-3, 3e-3))
    packs = InOrder(OptunaPacks(sweep, tmp_path / "study.db", 3, lambda runs: [[run] for run in runs], 1, seed=0))
    values = {"first": 0.1, "left": 0.2, "right": 0.3, "last": 0.9}
    trained = []
    while pack := packs.next_pack():
        (run,) = pack
        trained.append(run.run_id)
        packs.complete(run.run_id, {"state": "finished", "step": 60, "values": [values[run.axes["stage"]]]})
    assert packs._source.study.get_trials()[0].value == 0.9
    assert [trial.value for trial in packs._source.study.trials] == [0.9] * 3
