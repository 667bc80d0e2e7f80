"""The sweep that prunes a trained composition run, without a cluster: which run it takes, and one short run of it."""

import json

import pytest

from analysis.grokked_circuit import BridgeInCircuit
from groundswell import ConfigError
from groundswell.probes import run_probes
from groundswell.results import load_results
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.trainer import PackTrainer
from sweeps import grok_circuits, grokked_circuit


def train(*folders):
    trainer = PackTrainer(folders)
    while not trainer.finished:
        trainer.advance()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A results folder with short composition runs, of shared weights and of their own."""
    monkeypatch.chdir(tmp_path)
    sweep = SweepFolder(tmp_path / "results" / "grok_circuits-smoke")
    base = grok_circuits.DEMO.with_overrides(
        {"model.num_layers": 2, "model.width": 16, "budget.steps": 4, "task.num_entities": 12,
         "task.num_relations": 6, "task.out_degree": 6, "task.phi": 3}
    ).with_overrides(
        {"evaluation.schedule": {"class": "groundswell.schedule.Every", "every": 2},
         "checkpointing.schedule": {"class": "groundswell.schedule.Every", "every": 2}}
    )  # fmt: skip
    runs = {"own": base, "shared": base.with_overrides({"model.num_recurrences": 2})}
    folders = {name: sweep.create_run(PlannedRun(run, {}, name), name, 0) for name, run in runs.items()}
    for folder in folders.values():
        train(folder)
    return folders


def test_the_run_that_is_pruned(trained):
    found = grokked_circuit.composition_run(grokked_circuit.RESULTS / "grok_circuits-smoke")
    assert found.run_id == trained["own"].run_id
    named = grokked_circuit.checkpoints(found)
    assert sorted(named) == ["after", "before", "step-2", "step-4"]
    assert named["before"] == named["step-2"]  # training accuracy never saturates here
    assert named["after"] == named["step-4"]


def test_without_a_finished_run_it_says_what_to_do(tmp_path, monkeypatch, trained):
    trained["own"].update_status(state="running")
    with pytest.raises(
        ConfigError, match=r"grok_circuits-smoke: no finished composition run .*sweeps/grok_circuits.py"
    ):
        grokked_circuit.build("smoke")
    monkeypatch.chdir(tmp_path / "results")
    with pytest.raises(ConfigError, match="--preset demo"):
        grokked_circuit.build("demo")


@pytest.mark.slow
def test_a_short_pruning_run(trained, tmp_path):
    sweep = grokked_circuit.build("smoke")
    changes = {"budget.steps": 3, "objective.warmup_steps": 2, "checkpointing.schedule.every": 3}
    planned = [
        PlannedRun(run.experiment.with_overrides(changes), run.axes, run.name)
        for setting in sweep.grid()
        for run in sweep.runs(setting)
    ]
    assert [run.axes["checkpoint"] for run in planned] == ["before", "before", "after", "after"]
    folder = SweepFolder(tmp_path / "results" / "pruned")
    folders = [folder.create_run(run, "pack", number) for number, run in enumerate(planned)]
    for pack in (folders[:2], folders[2:]):  # targets pack, networks do not
        train(*pack)
    for each in folders:
        probes = [BridgeInCircuit(num_examples=10), sweep.probes[1]]
        assert {path.name for path in run_probes(each, probes)} == {"bridge_in_circuit", "circuit_evaluation"}
    report = sweep.report(load_results(folder, planned, tuple(sweep.axes), "seed"))
    assert report.table["checkpoint"].tolist() == ["before", "before", "after", "after"]
    assert set(report.figures) == {"grokked_circuit"}
    scalars = json.loads((folders[0].path / "probes/step-00000003/bridge_in_circuit/scalars.json").read_text())
    assert report.table["edges"][0] == f"{scalars['bridge/circuit/num_edges']:.0f}"
