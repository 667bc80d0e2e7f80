"""Runs over several workers that are cut off and go on."""

import json

import pytest

from tests.groundswell import run_results
from tests.groundswell.run_results import curves
from tests.groundswell.scaling.workers import run_workers, states

DDP = {"scaling.strategy": "ddp"}
FSDP = {"scaling.strategy": "fsdp"}
ZERO = {f"zero_{stage}": {"scaling.strategy": "deepspeed", "scaling.zero_stage": stage} for stage in (1, 2, 3)}
GROUPS = {  # a frozen tensor, one with a rate of its own, one that climbs
    "optimizer.groups": [
        {"match": "wpe", "frozen": True},
        {"match": "mlp", "lr": 1e-3, "weight_decay": 0.0},
        {"match": r"ln_f\.bias", "ascent": True, "lr": 1e-4},
    ],
    "optimizer.schedule": "cosine",
}


def assert_equal_runs(one, other):
    assert one.status().state == other.status().state == "finished"
    run_results.assert_equal_runs(one, other)


@pytest.mark.parametrize("strategy", [DDP, FSDP, *ZERO.values()], ids=["ddp", "fsdp", *ZERO])
@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(tiny, make_run, strategy):
    experiment = tiny.with_overrides(strategy | GROUPS | {"scaling.num_workers": 2})
    whole, cut = make_run(experiment, "whole"), make_run(experiment, "cut")
    run_workers(whole, 2)
    run_workers(cut, 2, stop_after=40)
    assert [state.name for state in states(cut)] == ["step-00000020", "step-00000040"]
    assert cut.status().state == "running"
    run_workers(cut, 2)
    assert_equal_runs(cut, whole)


@pytest.mark.slow
def test_fsdp_goes_on_with_another_number_of_workers(tiny, make_run):
    experiment = tiny.with_overrides(FSDP | GROUPS | {"scaling.num_workers": 2, "metrics_every": 1})
    whole, cut = make_run(experiment, "whole"), make_run(experiment, "cut")
    assert experiment.run_id == experiment.with_overrides({"scaling.num_workers": 1}).run_id
    run_workers(cut, 2, stop_after=40)
    run_workers(cut, 1)
    run_workers(whole, 2)
    assert cut.status().state == "finished"
    for (step, mine), (other_step, others) in zip(curves(cut), curves(whole), strict=True):
        assert step == other_step
        assert mine == pytest.approx(others, abs=1e-5, rel=1e-5), step  # each loss: the same batches in the same order


@pytest.mark.slow
def test_deepspeed_says_what_to_do_about_another_number_of_workers(tiny, make_run):
    cut = make_run(tiny.with_overrides(ZERO["zero_2"] | {"scaling.num_workers": 2}), "cut")
    run_workers(cut, 2, stop_after=20)
    message = r"scaling.num_workers 1: DeepSpeed's state .* saved by 2 workers .* groundswell convert"
    with pytest.raises(RuntimeError, match=message):
        run_workers(cut, 1)


@pytest.mark.slow
def test_more_workers_than_examples_in_a_batch(tiny, make_run):
    folder = make_run(tiny.with_overrides(DDP | {"scaling.num_workers": 2, "budget.batch_size": 1}))
    with pytest.raises(RuntimeError, match="ConfigError: budget.batch_size 1 is less than scaling.num_workers 2"):
        run_workers(folder, 2)


@pytest.mark.slow
def test_a_checkpoint_is_what_a_pack_writes(tiny, make_run):
    """Weights in the same files under the same names, so that whatever reads one reads the other."""
    from groundswell.training import checkpoint

    experiment = tiny.with_overrides(DDP | {"scaling.num_workers": 2, "budget.steps": 20})
    folder = make_run(experiment)
    run_workers(folder, 2)
    task = experiment.task
    path = folder.checkpoint_folder(20)
    loaded = checkpoint.load_weights(path, experiment.model, task.vocab_size, task.max_length)
    assert loaded.keys() == {spec.name for spec in experiment.model.parameters(task.vocab_size, task.max_length)}
    assert json.loads((path / "state.json").read_text())["experiment"] == experiment.identity
