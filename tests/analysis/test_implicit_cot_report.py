"""The report of chain-of-thought runs: settings, stages that some axes do not concern, figure, published points."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.chain_of_thought import ChainOfThoughtEvaluation
from analysis.implicit_cot_report import draw, implicit_cot_report, kind_of, panels, published_size, read_rows
from groundswell import AdamW, Budget, Experiment
from groundswell.results import Results
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_objective import StateRegression
from models.chain_student import MindReadingStudent
from models.decoder import Decoder
from models.objectives import AnswerLoss
from models.stepwise import StepwiseInternalization
from tasks.multiplication_chain import MultiplicationChain

DECODER = Decoder(num_layers=2, num_heads=2, width=8)
NETWORKS = {  # stage -> model, form, objective; accuracy, relative speed
    "no_chain": (DECODER, "none", AnswerLoss(), 0.10, 1.0),
    "explicit": (DECODER, "explicit", AnswerLoss(), 0.98, 0.15),
    "stepwise": (DECODER, "explicit", StepwiseInternalization(remove_every=9, remove_all_from=5), 0.90, 0.9),
    "student": (MindReadingStudent(decoder=DECODER), "hidden", AnswerLoss(), 0.95, 0.85),
    "emulator": (ThoughtEmulator(decoder=DECODER), "hidden", StateRegression(), None, None),
    "coupled": (CoupledStudent(decoder=DECODER), "none", AnswerLoss(), 0.80, 0.6),
}
KINDS = {
    "no_chain": "no chain", "explicit": "explicit chain", "stepwise": "stepwise", "student": "student",
    "emulator": "emulator", "coupled": "emulator + student",
}  # fmt: skip
AXES = ("stage", "task.digits", "model.delta", "seed")


def experiment(stage, digits=2):
    model, form, objective, *_ = NETWORKS[stage]
    return Experiment(
        task=MultiplicationChain(digits=digits, form=form, train_size=10, validation_size=5, test_size=5),
        model=model, objective=objective, optimizer=AdamW(lr=1e-3), budget=Budget(steps=1, batch_size=2),
    )  # fmt: skip


def write_answer(run, values):
    folder = run.path / "probes" / "step-00000010" / ChainOfThoughtEvaluation.name()
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text(json.dumps({f"chain/{name}": value for name, value in values.items()}))
    (folder / "probe.json").write_text("{}")


def make_results(root, digits=(2, 4), deltas=("dynamic", 2), with_stages=True):
    """Runs with answers of two seeds; delta concerns the student and what comes of it."""
    sweep, rows, history = SweepFolder(root), [], []
    for number in digits:
        for stage, (*_, accuracy, speed) in NETWORKS.items():
            for delta in deltas if stage in ("student", "emulator", "coupled") else (None,):
                for seed in (0, 1):
                    axes = {"stage": stage, "task.digits": number, "model.delta": delta, "seed": seed}
                    changed = experiment(stage, number).with_overrides(
                        {"seed": seed} | ({"model.delta": delta} if stage in ("student", "emulator") else {})
                    )
                    if stage == "coupled":  # another student and emulator
                        changed = changed.with_overrides({"optimizer.lr": 1e-3 if delta == "dynamic" else 2e-3})
                    run = sweep.create_run(PlannedRun(changed, axes, f"{stage} {seed}"), "pack", 0)
                    rows.append({"run_id": changed.run_id, "name": stage, "state": "finished", **axes})
                    line = {"run_id": changed.run_id, "step": 10, "perf/training_s": 30.0 + seed}
                    if accuracy is None:
                        line["eval/validation/state_loss"] = 4.0 + seed
                        history.append({**line, "step": 5, "eval/validation/state_loss": 9.0})
                    else:
                        values = {"exact_match": accuracy + 0.02 * seed, "relative_speed": speed * (1 + 0.1 * seed)}
                        values |= {"relative_speed_batched": 0.7, "tokens_per_answer": 9.5, "truncated": 0.0}
                        write_answer(run, values)
                    history.append(line)
    axes = AXES if with_stages else AXES[1:]
    return Results(pd.DataFrame(rows), pd.DataFrame(history), axes, "seed", sweep)


def test_each_stage_and_setting_has_a_row(tmp_path):
    report = implicit_cot_report(make_results(tmp_path))
    table = report.table.set_index(["stage", "digits", "delta"])
    assert len(table) == 2 * (3 + 3 * 2)
    coupled = table.loc[("coupled", "4", "dynamic")]
    assert coupled["accuracy"] == "0.810 (0.800-0.820)"
    assert coupled["relative speed"] == "0.63 (0.60-0.66)"
    assert coupled["runs"] == "2" and coupled["train s"] == "30 (30-31)" and coupled["state loss"] == "-"
    emulator = table.loc[("emulator", "2", "2")]
    assert emulator["accuracy"] == "-" and emulator["state loss"] == "4.5 (4-5)"
    assert table.loc[("explicit", "2", "-")]["tokens"] == "9.5"
    assert list(report.figures) == ["accuracy_and_speed"]


def test_a_stage_that_an_axis_does_not_concern_is_in_all_its_panels(tmp_path):
    rows = [row for row in read_rows(make_results(tmp_path)) if row.is_point]
    found = panels(rows)
    assert [setting for setting, _ in found] == [
        {"task.digits": digits, "model.delta": delta} for digits in (2, 4) for delta in ("dynamic", 2)
    ]
    for setting, mine in found:
        assert sorted(row.method for row in mine) == ["coupled", "explicit", "no_chain", "stepwise", "student"]
        assert all(row.axes["task.digits"] == setting["task.digits"] for row in mine)
    figure = draw(rows)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown][:2] == ["digits 2, delta dynamic", "digits 2, delta 2"]
    assert all(len(ax.containers) == 5 for ax in shown)
    low, high = shown[0].get_xlim()
    assert low < 0.15 and high > 1.1
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(set(NETWORKS) - {"emulator"})


def test_points_of_the_paper_are_only_with_its_sizes(tmp_path):
    results = make_results(tmp_path, deltas=("dynamic",))
    report = implicit_cot_report(results, paper=True)
    assert "table 1" in report.remarks[-1]
    two, four = [ax for ax in report.figures["accuracy_and_speed"].axes if ax.get_visible()]
    published = [line for line in four.lines if str(line.get_label()).startswith("paper: ")]
    assert len(published) == 6 and not [line for line in two.lines if str(line.get_label()).startswith("paper: ")]
    assert ("explicit" in str(published[-1].get_label())) and np.allclose(published[-1].get_xydata(), [[0.17, 1.0]])
    plain = implicit_cot_report(results)
    assert plain.table.equals(report.table)
    assert not any(
        "paper" in str(line.get_label()) for ax in plain.figures["accuracy_and_speed"].axes for line in ax.lines
    )


@pytest.mark.parametrize("stage", list(NETWORKS))
def test_kinds(stage):
    assert kind_of(experiment(stage)) == KINDS[stage]
    assert [published_size(experiment(stage, digits)) for digits in (4, 5, 6)] == ["4x4", "5x5", None]


def test_one_ordinary_run(make_run):
    one = experiment("explicit")
    run = make_run(one)
    runs = pd.DataFrame([{"run_id": one.run_id, "name": "run", "state": "finished"}])
    sweep = SweepFolder(run.path.parents[1])
    results = Results(runs, pd.DataFrame(columns=["run_id", "step"]), (), "seed", sweep)
    empty = implicit_cot_report(results)
    assert not len(empty.table) and not empty.figures
    write_answer(run, {"exact_match": 0.25, "relative_speed": 0.5})
    report = implicit_cot_report(results)
    assert report.table.to_dict("records")[0] | {"accuracy": ""} == {
        "method": "explicit chain", "runs": "1", "accuracy": "", "relative speed": "0.50", "in a batch": "-",
        "tokens": "-", "truncated": "-", "state loss": "-", "train s": "-",
    }  # fmt: skip
    assert list(report.figures) == ["accuracy_and_speed"]
