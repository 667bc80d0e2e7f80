"""Budgets of seconds, by a clock that ticks once a look; and batches that grow."""

import itertools

import pytest
import torch
from test_trainer import assert_equal_runs, train

from groundswell.training import stopwatch
from groundswell.training.pack import Member, Pack
from groundswell.training.run import TRAINING_SECONDS
from groundswell.training.trainer import PackTrainer

CPU = torch.device("cpu")
RAMP = {"budget.batch_ramp": 0.6, "scaling.micro_batch": 5}
TIMED = {
    "budget.seconds": 20.0,
    "budget.steps": None,
    "optimizer.schedule": "trapezoid",
    "optimizer.warmup_steps": 0,
    "evaluation.schedule.every": 20,
}


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the clock takes half a second: so does every update."""
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "clock", lambda: next(ticks) / 2)


def test_a_run_ends_when_its_seconds_are_over(tiny, make_run, ticking):
    """40 updates of half a second. What is done at the end of a run is done then, although no step says so."""
    folder = make_run(tiny.with_overrides({**TIMED, "budget.seconds": 17.0, "checkpointing.schedule.every": 1000}))
    train(folder)
    assert (folder.status().state, folder.status().step) == ("finished", 34)
    last = folder.journal()[-1]
    assert last["step"] == 34 and "eval/test/accuracy" in last["metrics"]
    assert last["metrics"][TRAINING_SECONDS] == 17.0
    assert folder.checkpoint_steps() == [34]
    assert PackTrainer([folder]).finished


def test_steps_are_the_most_updates(tiny, make_run, ticking):
    folder = make_run(tiny.with_overrides({**TIMED, "budget.steps": 25}))
    train(folder)
    assert (folder.status().state, folder.status().step) == ("finished", 25)


@pytest.mark.parametrize("stop_after", [10, 20, 30])
@pytest.mark.parametrize("ramp", [{}, RAMP], ids=["full", "ramp"])
def test_killed_and_resumed_equals_undisturbed(tiny, make_run, ticking, stop_after, ramp):
    """The seconds before count: rates, batch sizes and the end are those of the undisturbed run."""
    timed = tiny.with_overrides(TIMED | ramp)
    whole, killed = make_run(timed, "whole"), make_run(timed, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    assert not killed.status().is_final
    train(killed)
    assert killed.status().step == 40
    assert_equal_runs(whole, killed)


def test_cut_off_between_the_last_checkpoint_and_the_word_that_it_is_finished(tiny, make_run, ticking):
    folder = make_run(tiny.with_overrides(TIMED))
    train(folder)
    lines = folder.journal()
    folder.update_status(state="running")
    assert PackTrainer([folder]).finished
    assert folder.status().state == "finished"
    assert folder.journal() == lines


def test_rates_follow_the_clock(tiny, ticking):
    """20 seconds are 40 updates: the same run as with a budget of 40 steps."""
    timed = Pack([Member.create(tiny.with_overrides(TIMED | RAMP), CPU)])
    steps = {**TIMED, "budget.seconds": None, "budget.steps": 40}
    counted = Pack([Member.create(tiny.with_overrides(steps | RAMP), CPU)])
    for pack in (timed, counted):
        pack.train(30)
        pack.train(10)
    assert torch.equal(timed.parameters.flat, counted.parameters.flat)


def test_batches_grow(tiny):
    """Every row once and in order, whatever the sizes."""
    pack = Pack([Member.create(tiny.with_overrides({**RAMP, "budget.steps": 20}), CPU)])
    sizes, rows = [], []
    update = pack._update

    def watched(batch):
        sizes.append(batch.shape[1])
        rows.append(batch)
        return update(batch)

    pack._update = watched
    pack.train(20)
    assert sizes == [5, 5, 10, 10, 15, 15, 20, 20, 25, 25, 30, 30] + [32] * 8
    taken = Member.create(tiny, CPU).order.take(sum(sizes))
    assert torch.equal(torch.cat(rows, 1)[0], taken)


@pytest.mark.parametrize("stop_after", [10, 30])
def test_a_growing_batch_goes_on_where_it_was(tiny, make_run, stop_after):
    growing = tiny.with_overrides(RAMP)
    whole, killed = make_run(growing, "whole"), make_run(growing, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    train(killed)
    assert_equal_runs(whole, killed)


def test_a_pack_that_shrinks_keeps_its_time(tiny, ticking):
    pack = Pack([Member.create(tiny.with_overrides({**TIMED, "seed": seed}), CPU) for seed in (0, 1)])
    pack.train(10)
    assert pack.subset([1]).watch.elapsed == pack.watch.elapsed == 5.0
