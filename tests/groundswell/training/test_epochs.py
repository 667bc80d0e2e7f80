"""A budget of epochs: every example once, a short batch at the end, and everything else as with steps."""

import pytest
import torch
from test_trainer import assert_equal_runs, assert_nearly_equal_curves, curves, train

from groundswell import ConfigError
from groundswell.training.pack import Member, Pack
from tasks.reverse import Reverse


@pytest.fixture
def epochs(tiny):
    """101 training pairs in batches of 32: four updates an epoch, the last one of 5."""
    changes = {
        "budget.epochs": 6,
        "metrics_every": 1,
        "evaluation.schedule.every": 2,
        "checkpointing.schedule.every": 2,
    }
    return tiny.with_overrides(changes | {"model.dropout": 0.1})


def test_an_epoch_takes_every_example_once(epochs):
    pack = Pack([Member.create(epochs, torch.device("cpu"))])
    assert pack.updates_per_step == 4
    for _ in range(2):
        batches = list(pack._batches(1))
        assert [batch.shape[1] for batch in batches] == [32, 32, 32, 5]
        assert torch.cat(batches, 1).sort().values.tolist() == [list(range(101))]
    pack.train(3)
    assert (pack.step_count, pack.optimizer.step_count) == (3, 12)


def test_a_run_counts_in_epochs(epochs, make_run):
    folder = make_run(epochs)
    train(folder)
    assert folder.status().step == 6
    assert [line["step"] for line in folder.journal()] == list(range(7))
    assert [line["step"] for line in folder.journal() if "eval/test/accuracy" in line["metrics"]] == [0, 2, 4, 6]
    assert folder.checkpoint_steps() == [2, 4, 6]
    assert "perf/epochs_per_s" in folder.journal()[-1]["metrics"]


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_killed_and_resumed_equals_undisturbed(epochs, make_run, stop_after):
    whole, killed = make_run(epochs, "whole"), make_run(epochs, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    train(killed)
    assert_equal_runs(whole, killed)


def test_a_pack_equals_its_members_alone(epochs, make_run):
    """Different data, rates and dropout streams; frozen embeddings; evaluated together."""
    base = epochs.with_overrides({"model.freeze_embeddings": True, "model.tied_head": False})
    axes = [{"seed": seed, "task.seed": seed, "optimizer.lr": 1e-3 * (seed + 1)} for seed in range(3)]
    packed = [make_run(base, "packed", **a) for a in axes]
    train(*packed)
    for folder, a in zip(packed, axes, strict=True):
        alone = make_run(base, "alone", **a)
        train(alone)
        assert_nearly_equal_curves(folder, alone)
    assert curves(packed[0]) != curves(packed[1])


def test_members_with_other_numbers_of_examples_are_told_to_part(tiny):
    base = tiny.with_overrides({"budget.epochs": 2})
    members = [
        Member.create(base.with_overrides({"task": Reverse(entity_vocab_size=size)}), torch.device("cpu"))
        for size in (40, 80)
    ]
    with pytest.raises(ConfigError, match=r"budget\.epochs: the runs of a pack have 17 to 34 training examples"):
        Pack(members)
