"""Probes of checkpoints: asked once, kept beside the run."""

import json
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from groundswell import ConfigError
from groundswell.probes import Findings, Probe, answers, open_checkpoint, run_probes, scalars
from groundswell.results import load_results
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.trainer import PackTrainer


class WeightNorm(Probe):
    """Norm of the token embedding."""

    scale: float = 1.0
    asked: ClassVar[list[int]] = []

    def applies(self, experiment):
        return experiment.model.width == 16

    def run(self, opened):
        self.asked.append(opened.step)
        table = opened.parameters["transformer.wte.weight"]
        assert table.shape[0] == 1
        norm = self.scale * float(table.norm())
        rows = table[0].norm(dim=1).numpy()
        return Findings({"probe/norm": norm}, {"rows": rows}, {"rows": pd.DataFrame({"norm": rows})})


@pytest.fixture
def trained(tiny, make_run):
    folder = make_run(tiny)
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    WeightNorm.asked.clear()
    return folder


def test_a_question_is_asked_once_for_each_checkpoint(trained):
    assert WeightNorm.name() == "weight_norm"
    (path,) = run_probes(trained, [WeightNorm()])
    assert path == trained.path / "probes" / "step-00000060" / "weight_norm"
    assert run_probes(trained, [WeightNorm()]) == []
    assert len(run_probes(trained, [WeightNorm()], step=20)) == 1
    assert WeightNorm.asked == [60, 20]
    first = scalars(path)["probe/norm"]
    run_probes(trained, [WeightNorm(scale=2.0)])  # another question takes the place of the old one
    assert scalars(path)["probe/norm"] == pytest.approx(2 * first)
    assert sorted(answers(trained)) == [(20, "weight_norm"), (60, "weight_norm")]
    assert np.load(path / "rows.npy").shape == (13,)
    assert list(pd.read_csv(path / "rows.csv")) == ["norm"]


def test_probes_that_do_not_apply_are_left_out(tiny, make_run):
    folder = make_run(tiny, **{"model.width": 32})
    assert run_probes(folder, [WeightNorm()]) == []
    assert answers(folder) == {}


def test_unknown_step_and_damaged_checkpoint_are_told(trained, tiny, make_run):
    with pytest.raises(ConfigError, match="no checkpoint at step 30; there are: 20, 40, 60"):
        open_checkpoint(trained, 30)
    weights = trained.checkpoint_folder(60) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        run_probes(trained, [WeightNorm()])
    with pytest.raises(ConfigError, match="there are: none"):
        open_checkpoint(make_run(tiny, seed=5))


def test_results_have_the_answers(trained, tiny, tmp_path):
    run_probes(trained, [WeightNorm()])
    results = load_results(SweepFolder(tmp_path / "sweep"), [PlannedRun(tiny, {}, "run")], (), "seed")
    found, arrays = results.answer(tiny.run_id, "weight_norm")
    assert list(found) == ["probe/norm"] and list(arrays) == ["rows"]
    assert results.answer(tiny.run_id, "other") == ({}, {})
    assert json.loads((trained.path / "probes/step-00000060/weight_norm/probe.json").read_text())["scale"] == 1.0
