"""Shared by all tests: one thread, small real experiments."""

import os
import secrets

os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Ray, which reads these once: clusters that tests start and join have a token of their own.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import hypothesis
import pytest
import torch

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.sweep import PlannedRun, run_name
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.modular_arithmetic import ModularArithmetic

torch.set_num_threads(1)
hypothesis.settings.register_profile("no clock", deadline=None)  # tests never fail for a busy machine
hypothesis.settings.load_profile("no clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for Ray come first: beside them the other process has all the quick ones to do."""
    items.sort(key=lambda item: "sweeps" not in item.path.parts)


@pytest.fixture
def tiny() -> Experiment:
    """Modular addition, one layer: milliseconds a step."""
    return Experiment(
        task=ModularArithmetic(modulus=13, train_fraction=0.6),
        model=Decoder(num_layers=1, num_heads=2, width=16, init_scale=3.0),
        objective=AnswerLoss(),
        optimizer=AdamW(lr=3e-3, weight_decay=0.3, warmup_steps=5),
        budget=Budget(steps=60, batch_size=32),
        metrics_every=10,
        evaluation=Evaluation(schedule=Every(every=20)),
        checkpointing=Checkpointing(schedule=Every(every=20)),
    )


@pytest.fixture
def make_run(tmp_path):
    """experiment, overrides -> a run folder in a fresh sweep folder."""

    def make(experiment: Experiment, sweep: str = "sweep", **axes) -> RunFolder:
        experiment = experiment.with_overrides(axes)
        planned = PlannedRun(experiment, axes, run_name(axes) or "run")
        return SweepFolder(tmp_path / sweep).create_run(planned, "pack", 0)

    return make
