"""From axes to runs to packs."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundswell.config import ConfigError
from groundswell.sweep import Axis, Sweep, format_value, make_packs, pack_size, run_name
from tasks.modular_arithmetic import ModularArithmetic


def make_sweep(base, **axes):
    return Sweep(
        "toy", base, {path.replace("__", "."): axis for path, axis in axes.items()}, metric="eval/test/accuracy"
    )


def all_runs(sweep):
    return [run for setting in sweep.grid() for run in sweep.runs(setting)]


def test_grid_is_the_product_and_each_run_has_its_experiment(tiny):
    sweep = make_sweep(
        tiny,
        model__num_layers=Axis(values=(1, 2)),
        optimizer__lr=Axis(values=(1e-3, 3e-3)),
        seed=Axis(values=(0, 1, 2)),
    )
    runs = all_runs(sweep)
    assert len({run.run_id for run in runs}) == 12
    for run in runs:
        assert run.axes == {
            "model.num_layers": run.experiment.model.num_layers,
            "optimizer.lr": run.experiment.optimizer.lr,
            "seed": run.experiment.seed,
        }
    assert runs[0].name == "num_layers=1 lr=0.001 seed=0"


def test_names_are_short_unless_two_axes_end_alike():
    assert run_name({"task.seed": 1, "seed": 2}) == "task.seed=1 seed=2"
    assert run_name({"model.width": 64, "optimizer.lr": 0.00031234567}) == "width=64 lr=0.0003123"
    assert format_value(np.int64(3)) == "3"


@given(low=st.floats(1e-6, 1e-2), factor=st.floats(1.5, 1e4), log=st.booleans(), seed=st.integers(0, 50))
def test_samples_stay_in_range(low, factor, log, seed):
    axis = Axis(low=low, high=low * factor, log=log)
    assert low * 0.999 <= axis.sample(np.random.default_rng(seed)) <= low * factor * 1.001


def test_random_search_is_reproducible(tiny):
    sweep = make_sweep(tiny, optimizer__lr=Axis(low=1e-4, high=1e-2, log=True), model__num_layers=Axis(values=(1, 2)))
    assert sweep.sample(5, seed=1) == sweep.sample(5, seed=1) != sweep.sample(5, seed=2)
    assert sweep.sample(3, seed=1) == sweep.sample(5, seed=1)[:3]  # asking for more keeps the first ones


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs values"),
        ({"low": 1.0}, "both low and high"),
        ({"low": 2.0, "high": 1.0}, "must be below"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low > 0"),
    ],
)
def test_axis_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        Axis.from_dict(fields)


def test_packs_hold_one_shape_and_every_run_once(tiny):
    sweep = make_sweep(
        tiny,
        model__num_layers=Axis(values=(1, 2)),
        optimizer__lr=Axis(values=(1e-3, 2e-3, 3e-3)),
        seed=Axis(values=(0, 1)),
    )
    runs = all_runs(sweep)
    for pack in ("auto", 1, 4, 100):
        packs = make_packs(runs, 2, False, pack)
        assert sorted(run.run_id for members in packs for run in members) == sorted(run.run_id for run in runs)
        assert all(len({run.experiment.pack_key() for run in members}) == 1 for members in packs)
        if pack != "auto":
            assert max(len(members) for members in packs) <= pack
    assert make_packs(runs, 2, False, 4) == make_packs(list(runs), 2, False, 4)
    assert make_packs(runs, 2, False, 4)[0][0].experiment.model.num_layers == 2  # the costliest first


def test_auto_pack_size(tiny):
    assert pack_size(tiny, 100, 2, False, "auto") == 8  # dispatch-bound
    assert pack_size(tiny, 6, 2, False, "auto") == 3  # no worker idle
    big = tiny.with_overrides({"model.width": 64, "model.num_layers": 2, "budget.batch_size": 2048})
    assert pack_size(big, 100, 2, False, "auto") == 1
    assert pack_size(big, 100, 1, True, "auto") == 64
    assert pack_size(big, 100, 2, False, 5) == 5


def test_impossible_combination_names_field_and_run(tiny):
    sweep = make_sweep(tiny, model__width=Axis(values=(16, 15)))
    with pytest.raises(ConfigError, match=r"model.num_heads: 2 does not divide width 15.*\(run width=15\)"):
        all_runs(sweep)


def test_describe_is_json(tiny):
    import json

    sweep = make_sweep(tiny, optimizer__lr=Axis(low=1e-4, high=1e-2, log=True))
    assert math.isclose(json.loads(json.dumps(sweep.describe()))["axes"]["optimizer.lr"]["low"], 1e-4)


NAMED = {
    "add": {"task": ModularArithmetic(modulus=11)},
    "divide": {"task": ModularArithmetic(modulus=13, operation="divide"), "budget.steps": 20},
}


def test_names_stand_for_several_fields(tiny):
    sweep = make_sweep(tiny, task=Axis.of_names(NAMED), seed=Axis(values=(0, 1), also=("task.seed",)))
    runs = all_runs(sweep)
    assert [run.name for run in runs] == [
        "task=add seed=0", "task=add seed=1", "task=divide seed=0", "task=divide seed=1",
    ]  # fmt: skip
    assert runs[1].axes == {"task": "add", "seed": 1}
    assert runs[1].experiment.task == ModularArithmetic(modulus=11, seed=1)
    assert (runs[1].experiment.budget.steps, runs[3].experiment.budget.steps) == (60, 20)
    described = json.loads(json.dumps(sweep.describe()))
    assert described["axes"]["task"]["values"] == ["add", "divide"]
    with pytest.raises(ConfigError, match="no such value 'ad'; did you mean 'add'"):
        Axis.from_dict(dict(Axis.of_names(NAMED)) | {"values": ("ad",)})


def test_fields_of_the_command_line_win_over_names_and_lose_to_axes(tiny):
    sweep = make_sweep(tiny, task=Axis.of_names(NAMED), seed=Axis(values=(5,), also=("task.seed",)))
    sweep = dataclasses.replace(sweep, fields={"budget.steps": 7, "task.seed": 9})
    for run in all_runs(sweep):
        assert (run.experiment.budget.steps, run.experiment.task.seed) == (7, 5)


def test_axis_values_are_those_of_the_experiment(tiny):
    """The bare word null on a command line is None in JSON, and a name here."""
    sweep = make_sweep(tiny, model__position_encoding=Axis(values=(None, "absolute")))
    runs = all_runs(sweep)
    assert [run.axes["model.position_encoding"] for run in runs] == ["null", "absolute"]
    assert runs[0].name == "position_encoding=null"
