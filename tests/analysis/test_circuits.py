"""What becomes of a run's probed checkpoints: phases, arrays, tables and figures."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.causal_tracing import CausalTracing
from analysis.circuit_report import _row, _Run, circuits_report
from analysis.circuits import Curves, Phases, reciprocal_ranks, strengths, targets_of
from analysis.logit_lens import LogitLens
from groundswell.probes import answers, run_probes, scalars
from groundswell.results import load_results
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.trainer import PackTrainer
from tasks.comparison import Comparison
from tasks.composition import Composition

COMPOSITION = Composition(num_entities=12, num_relations=5, out_degree=5, phi=2, iid_fraction=0.2, ood_fraction=0.2)
COMPARISON = Comparison(num_entities=10, num_attributes=2, num_values=4, phi=2, ood_fraction=0.2)


def test_phases_are_found_from_the_curves(tiny, make_run) -> None:
    folder = make_run(tiny)
    for step, train, held_out in [(0, 0.1, 0.0), (10, 0.7, 0.2), (20, 0.995, 0.55), (30, 0.98, 0.4), (40, 1.0, 0.93)]:
        folder.append_metrics(step, {"eval/train/accuracy": train, "eval/held/accuracy": held_out, "train/loss": 1.0})
    phases = Curves.of(folder).phases("train", "held")
    assert phases == Phases(20, {0.5: 20, 0.9: 40})
    assert phases.start([5, 15, 25, 35]) == 25
    assert phases.start([5, 15]) == 5  # no checkpoint since
    assert phases.table()["step"].tolist()[:3] == [20, 20, 40] and phases.table()["step"].isna().tolist()[3]
    never = Curves.of(folder).phases("none", "held")
    assert never.saturated is None and never.start([7, 9]) == 7


def test_arrays_from_scalars_have_holes_where_nothing_was_measured() -> None:
    found = {
        20: {"trace/answer/h/layer_1/strength": 0.5, "trace/answer/r1/layer_2/strength": 0.25, "trace/skipped": 3.0},
        10: {"trace/answer/h/layer_2/strength": 1.0, "trace/b_layer_2/h/layer_1/strength": 0.1,
             "lens/b/layer_0/mrr": 0.1, "lens/b/layer_2/mrr": 0.7, "lens/answer/final/mrr": 1.0},
    }  # fmt: skip
    roles, values = strengths(found, "answer", "strength")
    assert roles == ["h", "r1"] and values.shape == (2, 2, 2)
    np.testing.assert_equal(values, [[[np.nan, np.nan], [1.0, np.nan]], [[0.5, np.nan], [np.nan, 0.25]]])
    facts, ranks = reciprocal_ranks(found)
    assert facts == ["b"] and ranks[0, :, 0].tolist()[::2] == [0.1, 0.7] and np.isnan(ranks[1]).all()
    assert sorted(targets_of(found)) == ["answer", "b_layer_2"]


@pytest.fixture
def probed(tiny, make_run):
    """task, probes -> a run that was trained for a moment and asked at each checkpoint."""

    def make(task, *probes):
        changes = {"task": task, "model.num_layers": 3, "budget.steps": 40, "optimizer.lr": 1e-2}
        folder = make_run(tiny.with_overrides(changes))
        trainer = PackTrainer([folder])
        while not trainer.finished:
            trainer.advance()
        for step in folder.checkpoint_steps():
            assert len(run_probes(folder, probes, step)) == len(probes)
        return folder

    return make


def paths(folder, probe) -> dict:
    return {step: path for (step, name), path in answers(folder).items() if name == probe.name()}


@pytest.mark.parametrize("task", [COMPOSITION, COMPARISON])
def test_both_probes_end_to_end(task, probed) -> None:
    lens = LogitLens(num_examples=20, examples=True)
    tracing = CausalTracing(
        num_examples=20, parts=("states", "heads", "mlps"), examples=True, targets=("answer", f"{first_fact(task)}@2")
    )
    folder = probed(task, lens, tracing)
    first = paths(folder, tracing)[20]
    effects = pd.read_csv(first / "effects.csv")
    assert set(effects["part"]) == {"states", "heads", "mlps"} and set(effects["target"]) == {
        "answer", f"{first_fact(task)}@2",
    }  # fmt: skip
    states = effects[(effects["part"] == "states") & (effects["target"] == "answer")]
    found = scalars(first)
    for row in states.to_dict("records"):
        name = f"trace/answer/{row['role']}/layer_{row['layer']}/altered"
        assert found[name] == pytest.approx(row["altered"]) and row["n"] + row["skipped"] == 20
    records = json.loads((first / "examples.json").read_text())
    read = json.loads((paths(folder, lens)[20] / "examples.json").read_text())
    assert len(records) == len(read) == 20
    assert [record["rank_before"] for record in records] == [record["rank_before"] for record in read]

    over_time = tracing.over_time(folder, paths(folder, tracing))
    assert over_time is not None
    assert set(over_time.tables["effects"]["step"]) == {20, 40}
    assert {"circuit-answer", "circuit_over_time-answer", "parts-answer"} <= set(over_time.figures)
    facts = lens.over_time(folder, paths(folder, lens))
    assert facts is not None and len(facts.figures["facts"].axes) == 2 + len(facts_of(found, paths(folder, lens)[20]))


def first_fact(task) -> str:
    return "b" if isinstance(task, Composition) else "val1"


def facts_of(_, path) -> list[str]:
    return reciprocal_ranks({0: scalars(path)})[0]


def test_tasks_without_roles_are_read_but_not_traced(tiny, make_run) -> None:
    assert CausalTracing().objection(tiny) == (
        "task ModularArithmetic has no tracing roles; composition and comparison have"
    )
    assert LogitLens().objection(tiny) is None
    folder = make_run(tiny)
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    split = next(iter(tiny.task.build().evaluation))
    assert run_probes(folder, [CausalTracing()]) == []
    (path,) = run_probes(folder, [LogitLens(split=split, num_examples=10)])
    found = scalars(path)
    assert found["lens/answer/final/recall_at_1"] == found["lens/answer/layer_1/recall_at_1"]
    assert list(pd.read_csv(path / "lens.csv")["reading"].unique()) == ["answer"]


def test_one_checkpoint_has_a_circuit_but_no_course(probed) -> None:
    tracing, lens = CausalTracing(num_examples=10), LogitLens(num_examples=10)
    folder = probed(COMPOSITION, tracing, lens)
    last = {40: paths(folder, tracing)[40]}
    found = tracing.over_time(folder, last)
    assert found is not None and list(found.figures) == ["circuit-answer"]
    assert lens.over_time(folder, {40: paths(folder, lens)[40]}) is None


def test_the_report_of_a_sweep_has_a_row_and_a_panel_for_each_setting(probed, tmp_path) -> None:
    folder = probed(COMPOSITION, LogitLens(num_examples=20), CausalTracing(num_examples=20))
    planned = [PlannedRun(folder.experiment(), {"weights": "own", "seed": 0}, "run")]
    results = load_results(SweepFolder(tmp_path / "sweep"), planned, ("weights", "seed"), "seed")
    report = circuits_report(results)
    (row,) = report.table.to_dict("records")
    assert row["weights"] == "own" and row["runs"] == "1" and row["fact 1"].startswith("b: ")
    assert row["state"].startswith("S[") and "->" in row["state"]
    assert len(report.figures["circuits"].axes) == 6


def test_a_run_that_was_never_right_has_no_state_to_report() -> None:
    lens = {"lens/b/layer_0/mrr": 0.1, "lens/b/layer_1/mrr": 0.2, "lens/b/layer_2/mrr": 0.3}
    run = _Run(Curves({}), {10: lens}, {10: {"trace/answer/h/layer_1/altered": 1.0}})
    assert run.grown() is None
    assert _row([run])["state"] == "-"
    shallow = {"lens/b/layer_0/mrr": 0.1, "lens/b/layer_1/mrr": 0.2}
    assert "fact 1" not in _row([_Run(Curves({}), {10: shallow}, {10: {}})])
