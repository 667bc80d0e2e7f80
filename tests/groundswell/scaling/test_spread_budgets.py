"""Runs over several workers: examples that are made, batches that grow, and seconds that the first worker counts."""

import pytest
from safetensors.torch import load_file

from groundswell.scaling.worker import RUN_STATE
from groundswell.training.run import TRAINING_SECONDS
from groundswell.training.trainer import PackTrainer
from tests.groundswell.made_examples import MadeModularArithmetic
from tests.groundswell.run_results import assert_equal_runs
from tests.groundswell.scaling.test_equal_science import assert_equal_science
from tests.groundswell.scaling.workers import run_workers, states

DDP = {"scaling.strategy": "ddp", "scaling.num_workers": 2}
RAMP = {"budget.batch_ramp": 0.6, "scaling.micro_batch": 5}


@pytest.fixture
def made(tiny):
    task = MadeModularArithmetic.from_dict({"modulus": 13, "train_fraction": 0.6})
    return tiny.with_overrides({"task": task, "budget.steps": 30, "metrics_every": 1})


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        pytest.param({"scaling.strategy": "fsdp"}, marks=pytest.mark.slow),
        pytest.param({"scaling.strategy": "deepspeed", "scaling.zero_stage": 2}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "zero_2"],
)
def test_made_examples_and_growing_batches_train_as_in_one_process(made, make_run, strategy):
    growing = made.with_overrides(RAMP)
    alone, spread = make_run(growing, "alone"), make_run(growing.with_overrides(DDP | strategy), "spread")
    trainer = PackTrainer([alone])
    while not trainer.finished:
        trainer.advance()
    run_workers(spread, 2)
    assert spread.status().state == "finished"
    assert_equal_science(spread, alone)


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not(made, make_run):
    growing = made.with_overrides(RAMP | DDP)
    whole, cut = make_run(growing, "whole"), make_run(growing, "cut")
    run_workers(whole, 2)
    run_workers(cut, 2, stop_after=20)
    assert cut.status().state == "running"
    run_workers(cut, 2)
    assert_equal_runs(cut, whole)


@pytest.mark.slow
def test_a_budget_of_seconds(made, make_run):
    """Cut off and gone on with: the seconds before count, and the end is evaluated and saved."""
    seconds = {"budget.seconds": 3.0, "budget.steps": None, "checkpointing.schedule.every": 10}
    folder = make_run(made.with_overrides(seconds | RAMP | DDP | {"optimizer.schedule": "linear"}))
    run_workers(folder, 2, stop_after=10)
    before = float(load_file(states(folder)[-1] / RUN_STATE)["elapsed"])
    assert 0 < before < 3
    run_workers(folder, 2)
    status, lines = folder.status(), folder.journal()
    assert (status.state, status.step) == ("finished", lines[-1]["step"])
    assert folder.checkpoint_step() == status.step > 10
    assert "eval/test/accuracy" in lines[-1]["metrics"]
    trained = [line["metrics"][TRAINING_SECONDS] for line in lines]
    assert trained == sorted(trained) and trained[-2] < 3 <= trained[-1]
    assert trained[10] == pytest.approx(before)
