"""Every strategy trains the same network: losses, norms and evaluations of 30 steps against the pack's.

Weights themselves are not compared: Adam turns the rounding of gradients that should be zero (those of attention's key
biases) into whole steps.
"""

import pytest

from groundswell.training.trainer import PackTrainer
from tests.groundswell.scaling.workers import run_workers

STRATEGIES = {
    "ddp": {"scaling.strategy": "ddp"},
    "ddp_accumulated": {"scaling.strategy": "ddp", "scaling.micro_batch": 5},
    "fsdp": {"scaling.strategy": "fsdp"},
    "fsdp_accumulated_recomputed": {
        "scaling.strategy": "fsdp",
        "scaling.micro_batch": 5,
        "scaling.activation_checkpointing": True,
    },
    "zero_1": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 1},
    "zero_2_accumulated": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 2, "scaling.micro_batch": 5},
    "zero_3": {"scaling.strategy": "deepspeed", "scaling.zero_stage": 3},
    "zero_3_accumulated_recomputed": {
        "scaling.strategy": "deepspeed",
        "scaling.zero_stage": 3,
        "scaling.micro_batch": 5,
        "scaling.activation_checkpointing": True,
    },
}


def curves(folder):
    return {
        line["step"]: {k: v for k, v in line["metrics"].items() if not k.startswith("perf/")}
        for line in folder.journal()
    }


def assert_equal_science(one, other, tolerance=1e-5):
    mine, others = curves(one), curves(other)
    assert mine.keys() == others.keys()
    for step, metrics in mine.items():
        assert metrics.keys() == others[step].keys()
        for name, value in metrics.items():
            assert value == pytest.approx(others[step][name], abs=tolerance, rel=tolerance), (step, name)


@pytest.fixture
def short(tiny):
    return tiny.with_overrides({"budget.steps": 30, "metrics_every": 1, "budget.batch_size": 31})


QUICK = ("ddp_accumulated", "fsdp")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_losses_and_evaluations_of_30_steps(short, make_run, name):
    alone = make_run(short, "alone")
    trainer = PackTrainer([alone])
    while not trainer.finished:
        trainer.advance()
    spread = make_run(short.with_overrides(STRATEGIES[name] | {"scaling.num_workers": 2}), "spread")
    run_workers(spread, 2)
    assert spread.status().state == "finished"
    assert_equal_science(spread, alone)
