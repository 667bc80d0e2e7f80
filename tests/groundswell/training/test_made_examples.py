"""Examples that are made as they are read: the same training as from memory, and exact resume."""

import pytest
import torch
from test_trainer import assert_equal_runs, train

from groundswell import ConfigError
from groundswell.training.pack import Member, Pack
from groundswell.training.sampler import SequentialOrder, generator
from tests.groundswell.made_examples import MadeModularArithmetic

CPU = torch.device("cpu")


@pytest.fixture
def made(tiny):
    task = MadeModularArithmetic.from_dict({"modulus": 13, "train_fraction": 0.6})
    return tiny.with_overrides({"task": task, "model.dropout": 0.1})


def in_sequence(experiment):
    """A member whose data are in memory, and who reads them in the order of those that are made."""
    member = Member.create(experiment, CPU)
    member.order = SequentialOrder(len(member.dataset.train), generator(experiment.seed, "order"))
    return member


def test_equal_to_resident_examples_in_the_same_order(tiny, made):
    """Also members of several data sets, side by side."""
    seeds = [{"seed": 0}, {"seed": 1, "task.seed": 1}, {"seed": 2}]
    resident = tiny.with_overrides({"model.dropout": 0.1})
    one = Pack([in_sequence(resident.with_overrides(s)) for s in seeds])
    other = Pack([Member.create(made.with_overrides(s), CPU) for s in seeds])
    for pack in (one, other):
        pack.train(20)
    assert torch.equal(one.parameters.flat, other.parameters.flat)
    assert one.read_metrics() == other.read_metrics()
    assert other.members[0].dataset is other.members[2].dataset
    assert other.members[0].dataset.train.calls == 20  # one a batch for both members


@pytest.mark.parametrize("stop_after", [10, 40])
@pytest.mark.parametrize("changes", [{}, {"budget.epochs": 40}], ids=["steps", "epochs"])
def test_killed_and_resumed_equals_undisturbed(made, make_run, stop_after, changes):
    made = made.with_overrides(changes)
    whole, killed = make_run(made, "whole"), make_run(made, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    train(killed)
    assert_equal_runs(whole, killed)


def test_runs_start_at_places_of_their_own(made):
    starts = {int(Member.create(made.with_overrides({"seed": seed}), CPU).order.take(1)) for seed in range(20)}
    assert len(starts) > 10


def test_no_cuda_graph(made):
    """The graph holds rows of resident data."""
    pack = Pack([Member.create(made, CPU)])
    pack.scaling = pack.scaling.model_copy(update={"cuda_graph": True})
    with pytest.raises(ConfigError, match="scaling.cuda_graph: this task makes its examples as they are read"):
        pack._place_data()


def test_all_of_them_as_tensors(tiny, made):
    assert torch.equal(made.task.build().train_split.tokens, tiny.task.build().train_split.tokens)
