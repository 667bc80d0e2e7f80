"""The command line of a sweep file, up to the point where something would start."""

import dataclasses
from pathlib import Path

import pytest

from groundswell import ConfigError
from groundswell.cli import Options, customise, run, split_dotted
from groundswell.sweep import Axis, Sweep
from tasks.modular_arithmetic import ModularArithmetic
from tasks.reverse import Reverse


@pytest.fixture
def sweep(tiny):
    axes = {"optimizer.weight_decay": Axis(values=(0.1, 1.0)), "seed": Axis(values=(0, 1), also=("task.seed",))}
    return Sweep("toy", tiny, axes, metric="eval/test/accuracy")


@pytest.fixture
def command(sweep, tmp_path):
    """Run the command line; returns the exit code."""
    return lambda *arguments: run(
        lambda preset: sweep, {"demo": "a demo", "full": "all"}, "demo", ["--output", str(tmp_path / "out"), *arguments]
    )


def test_dotted_options_are_taken_out():
    fields, rest = split_dotted(
        [
            "--preset",
            "demo",
            "--optimizer.lr",
            "3e-4",
            "--model.num-layers=3",
            "--scaling.compile",
            "--model.no-tied-head",
            "--metrics-every",
            "50",
            "--seed=3",
            "--dry-run",
        ]
    )
    assert fields == {
        "optimizer.lr": 3e-4,
        "model.num_layers": 3,
        "scaling.compile": True,
        "model.tied_head": False,
        "metrics_every": 50,
        "seed": 3,
    }
    assert rest == ["--preset", "demo", "--dry-run"]


def test_changed_experiment_changes_the_name_and_axis_values_do_not(sweep):
    assert customise(sweep, "demo", Options(), {}).name == "toy-demo"
    other = customise(sweep, "demo", Options(axis=("optimizer.weight_decay=0.5",)), {})
    assert other.name == "toy-demo"
    assert other.axes["optimizer.weight_decay"].values == (0.5,)
    changed = customise(sweep, "demo", Options(search="optuna", scheduler="asha"), {"optimizer.lr": 0.5})
    assert changed.name.startswith("toy-demo-optuna-asha-")
    assert changed.base.optimizer.lr == 0.5


def test_new_values_keep_what_else_an_axis_sets(sweep):
    runs = customise(sweep, "demo", Options(axis=("seed=7",)), {}).runs({"optimizer.weight_decay": 0.1})
    assert [(r.experiment.seed, r.experiment.task.seed) for r in runs] == [(7, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr", "1"], "optimizer.lrr: 'optimizer' has no field 'lrr'; did you mean 'lr'?"),
        (["--model.num-layers", "-1"], "model.num_layers: Input should be greater than 0, got -1"),
        (["--model.num-heads", "3"], "model.num_heads: 3 does not divide width 16"),
        (
            ["--optimizer.weight-decay", "1"],
            "is an axis of this sweep; set its values with --axis optimizer.weight_decay=",
        ),
        (["--optimizer.lr"], "optimizer.lr: needs a value, for instance --optimizer.lr 0.003"),
        (["--axis", "optimizer.lr"], "write PATH=V1,V2"),
        (["--axis", "optimizer.rate=1,2"], "'optimizer' has no field 'rate'"),
        (["--axis", "model.num_layers=2,0"], "model.num_layers: Input should be greater than 0, got 0 (run"),
        (["--preset", "ful"], "did you mean 'full'?"),
        (["--pack", "0"], "--pack 0: write auto or a number"),
        (["--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["--outputt", "x"], "--outputt: no such option; did you mean '--output'?"),
    ],
)
def test_bad_input_is_one_line_and_code_2(command, capsys, tmp_path, arguments, message):
    assert command("--dry-run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_unwritable_output(command, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert command("--output", str(tmp_path / "file" / "below")) == 2
    assert "output: cannot write to" in capsys.readouterr().err


def test_help_lists_every_field_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as end:
        command("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--optimizer.lr", "--model.num-layers", "--task.modulus", "--scheduler", "--dry-run", "--axis"):
        assert option in text
    assert "default: 0.003" in text  # this sweep's own learning rate


def test_dry_run_prints_runs_and_estimate_and_writes_nothing(command, capsys, tmp_path):
    assert command("--dry-run") == 0
    text = capsys.readouterr().out
    assert "4 runs" in text
    assert "weight_decay=0.1 seed=1" in text
    assert "of training on" in text
    assert not (tmp_path / "out").exists()


def test_dry_run_of_a_budget_of_seconds(command, capsys):
    """The time is known, the steps are guessed; and runs do not share their seconds in a pack."""
    made = "tests.groundswell.made_examples.MadeModularArithmetic"
    fields = ["--budget.seconds", "7200", "--budget.steps", "null", "--task.class", made]
    fields += ["--scaling.micro-batch", "4", "--budget.batch-ramp", "0.5"]
    assert command("--dry-run", "--pack", "4", *fields) == 0
    text = capsys.readouterr().out
    assert "4 runs in 4 packs" in text
    assert text.count("120 min") == 4 or text.count("2.0 h") == 4
    assert text.count("about ") >= 5


def test_a_scheduler_wants_steps(command, capsys, tmp_path):
    assert command("--budget.seconds", "60", "--budget.steps", "null", "--scheduler", "asha") == 2
    assert (
        "error: budget.seconds: a scheduler compares runs at equal steps; set --budget.steps" in capsys.readouterr().err
    )


def test_grid_sweep_of_a_range_needs_values(tiny):
    sweep = Sweep("toy", tiny, {"optimizer.lr": Axis(low=1e-4, high=1e-2, log=True)}, metric="eval/test/accuracy")
    with pytest.raises(ConfigError, match="optimizer.lr: a grid needs values"):
        sweep.grid()


def test_options_are_documented():
    """tyro shows each option's docstring; an option without one would be bare in --help."""
    source = Path(__file__).parents[2].joinpath("platform/groundswell/cli.py").read_text()
    body = source.split("class Options:")[1].split("\ndef ")[0]
    assert body.count('"""') // 2 == len(dataclasses.fields(Options)) + 1


def test_fields_reach_every_value_of_a_named_axis(tiny):
    named = Axis.of_names(
        {
            "add": {"task": ModularArithmetic(modulus=11)},
            "divide": {"task": ModularArithmetic(modulus=13, operation="divide"), "budget.steps": 20},
        }
    )
    sweep = Sweep("toy", tiny, {"task": named}, metric="eval/test/accuracy")
    plain = customise(sweep, "demo", Options(), {})
    assert plain.name == "toy-demo"
    changed = customise(sweep, "demo", Options(), {"task.train_fraction": 0.5, "budget.steps": 5})
    experiments = [run.experiment for value in ("add", "divide") for run in changed.runs({"task": value})]
    assert [e.task.modulus for e in experiments] == [11, 13]
    assert {(e.task.train_fraction, e.budget.steps) for e in experiments} == {(0.5, 5)}
    assert changed.name.startswith("toy-demo-")
    chosen = customise(sweep, "demo", Options(axis=("task=divide",)), {"task.modulus": 7})
    assert chosen.runs({"task": "divide"})[0].experiment.task.modulus == 7
    with pytest.raises(ConfigError, match="--axis task: no such value 'mul'; known: add, divide"):
        customise(sweep, "demo", Options(axis=("task=mul",)), {})
    replaced = customise(sweep, "demo", Options(), {"task.class": "tasks.reverse.Reverse"})
    assert "task" not in replaced.axes and replaced.base.task == Reverse()
