"""Budgets of steps, epochs and seconds; batches that grow; the trapezoid; against the published schedule."""

import json
from pathlib import Path

import pytest

from groundswell import AdamW, Budget, ConfigError, Experiment
from groundswell.sweep import PlannedRun, cost, pack_size

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/arithmetic/schedule.json").read_text())


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(row["budget_fraction"]))
def test_the_published_schedule(row):
    """Recorded: rate, batch and accumulation at fractions of a day. Its clock is cut to units of a 12,000,000th, hence
    the tolerance: at 0.3 batches are about to grow, and its clock is still one unit before that."""
    done, peak, micro_batch = row["budget_fraction"], GOLDEN["peak_lr"], GOLDEN["microbatch"]
    warmup, cooldown = GOLDEN["warmup"], GOLDEN["cooldown"]
    optimizer = AdamW(lr=peak, schedule="trapezoid", warmup_fraction=warmup, cooldown_fraction=cooldown)
    assert optimizer.lr * optimizer.lr_factor(7, 9, done) == pytest.approx(row["lr"], abs=1e-10)
    by_steps = optimizer.lr_factor(round(12_000_000 * done), 12_000_000)
    assert optimizer.lr * by_steps == pytest.approx(row["lr"], abs=1e-10)
    budget = Budget(seconds=86_400, batch_size=GOLDEN["final_batch"], batch_ramp=GOLDEN["ramp"])
    late = 1 / 12_000_000 if done == 0.3 else 0.0
    batch = budget.ramped_batch(budget.done(123, (done - late) * 86_400), micro_batch)
    assert (batch, batch / micro_batch) == (row["batch_size"], row["accumulation"])


def test_the_trapezoid_ends_at_the_final_rate():
    optimizer = AdamW(schedule="trapezoid", warmup_fraction=0.2, cooldown_fraction=0.5, final_lr=0.1)
    found = [optimizer.lr_factor(update, 10) for update in range(11)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28, 0.1])
    sudden = AdamW(schedule="trapezoid", warmup_fraction=0, cooldown_fraction=0)
    assert [sudden.lr_factor(update, 10) for update in (0, 10)] == [1, 1]


def test_other_schedules_follow_the_clock_too():
    linear = AdamW(schedule="linear", warmup_steps=4)
    assert [linear.lr_factor(update, 10**9, done) for update, done in ((2, 0.5), (9, 0.5), (99, 1.5))] == [
        0.5,
        0.5,
        0.0,
    ]


def test_a_batch_that_is_no_multiple_of_the_micro_batch():
    budget = Budget(steps=10, batch_size=10, batch_ramp=1.0)
    sizes = [budget.ramped_batch(budget.done(step, 0.0), 4) for step in range(10)]
    assert sizes == [4, 4, 4, 4, 8, 8, 8, 8, 10, 10]


def test_what_ends_a_run():
    steps, seconds, both = Budget(steps=5), Budget(seconds=2.5), Budget(seconds=2.5, steps=5)
    assert [budget.is_over(5, 1.0) for budget in (steps, seconds, both)] == [True, False, True]
    assert [budget.is_over(4, 2.5) for budget in (steps, seconds, both)] == [False, True, True]
    assert seconds.steps is None
    assert Budget.from_dict(seconds.to_dict()) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget.seconds": 0}, "budget.seconds: Input should be greater than 0, got 0"),
        ({"budget.steps": 0}, "budget.steps: Input should be greater than 0, got 0"),
        ({"budget.steps": None}, "budget.steps: is not set; give steps, epochs or seconds"),
        ({"budget.seconds": 5, "budget.epochs": 1}, "budget.seconds: does not go with epochs; set one of them"),
        ({"budget.batch_ramp": 0.5, "budget.epochs": 1}, "budget.batch_ramp: does not go with epochs"),
        ({"budget.batch_ramp": 1.5}, "budget.batch_ramp: Input should be less than or equal to 1, got 1.5"),
        ({"budget.batch_ramp": 0.5}, "budget.batch_ramp: grows by micro-batches; set scaling.micro_batch below"),
        ({"optimizer.schedule": "trapezoid"}, "optimizer.warmup_steps: does not go with the trapezoid"),
        (
            {"optimizer.schedule": "trapezoid", "optimizer.warmup_steps": 0, "optimizer.cooldown_fraction": 0.95},
            "optimizer.warmup_fraction: and cooldown_fraction are more than 1 together; lower one of them",
        ),
    ],
)
def test_what_is_refused(tiny, changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny.with_overrides(changes)
    assert str(caught.value).startswith(message)


def test_fields_that_are_not_used_are_no_part_of_the_identity(tiny):
    """Runs that were made before there were such fields go on."""
    values = tiny.to_dict()
    for part, names in (
        ("budget", ("seconds", "batch_ramp")),
        ("optimizer", ("warmup_fraction", "cooldown_fraction")),
    ):
        for name in names:
            del values[part][name]
    assert Experiment.from_dict(values).run_id == tiny.run_id
    trapezoid = tiny.with_overrides({"optimizer.schedule": "trapezoid", "optimizer.warmup_steps": 0})
    ids = {
        tiny.run_id,
        tiny.with_overrides({"budget.seconds": 5}).run_id,
        tiny.with_overrides({"budget.seconds": 6}).run_id,
        tiny.with_overrides({"budget.batch_ramp": 0.5, "scaling.micro_batch": 8}).run_id,
        trapezoid.run_id,
        trapezoid.with_overrides({"optimizer.warmup_fraction": 0.2}).run_id,
    }
    assert len(ids) == 6


def test_packs_and_costs(tiny):
    """Runs that share a clock would share its seconds."""
    timed = tiny.with_overrides({"budget.seconds": 5, "budget.steps": None})
    assert pack_size(tiny, 8, 1, False, 8) == 8
    assert pack_size(timed, 8, 1, False, 8) == pack_size(timed, 8, 1, True, "auto") == 1
    assert cost([PlannedRun(timed, {}, "run")]) * 2 == cost(
        [PlannedRun(timed.with_overrides({"budget.seconds": 10}), {}, "run")]
    )
