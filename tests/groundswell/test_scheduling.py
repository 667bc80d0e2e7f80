"""Ray Tune's own ASHA and median rules, asked about the members of packs."""

import pytest

from groundswell.rundir import SweepFolder
from groundswell.scheduling import MemberScheduler, make_scheduler
from groundswell.sweep import PlannedRun

METRIC = "eval/test/accuracy"


@pytest.fixture
def sweep(tmp_path, tiny):
    folder = SweepFolder(tmp_path / "sweep")
    for seed in range(9):
        folder.create_run(PlannedRun(tiny.with_overrides({"seed": seed}), {"seed": seed}, f"seed={seed}"), "p", seed)
    return folder


def requests(sweep):
    return lambda run_id, reason: sweep.run(run_id).request_prune(reason)


def report(scheduler, run_id, step, value):
    """One evaluation of one member, as a pack reports it."""
    members = [{"run_id": run_id, "state": "running", "step": step, METRIC: value}]
    return scheduler.on_trial_result(None, None, {"members": members})


def pruned(sweep):
    return {run.run_id for run in sweep.runs() if run.prune_request()}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_asha_keeps_the_best_third_of_each_rung(sweep, mode):
    scheduler = MemberScheduler(make_scheduler("asha", METRIC, mode, total_steps=900), requests(sweep))
    runs = [run.run_id for run in sweep.runs()]
    sign = 1 if mode == "max" else -1
    for place, run_id in enumerate(runs):  # each worse than all before it
        answer = report(scheduler, run_id, 100, sign * (0.9 - 0.05 * place))
        assert answer == MemberScheduler.CONTINUE  # the Tune trial itself (the pack) always goes on
    lost = pruned(sweep)
    assert runs[0] not in lost
    assert set(runs[3:]) <= lost
    assert "behind its rivals at step 100" in sweep.run(runs[8]).prune_request()


def test_nobody_is_judged_before_the_grace_period(sweep):
    scheduler = MemberScheduler(make_scheduler("asha", METRIC, "max", total_steps=900), requests(sweep))
    for place, run in enumerate(sweep.runs()):
        report(scheduler, run.run_id, 99, 0.9 - 0.05 * place)
    assert pruned(sweep) == set()


def test_median_rule_stops_what_is_below_the_others(sweep):
    scheduler = MemberScheduler(make_scheduler("median", METRIC, "max", total_steps=90), requests(sweep))
    runs = [run.run_id for run in sweep.runs()]
    for step in (10, 20, 30):
        for run_id in runs[:-1]:
            report(scheduler, run_id, step, 0.5)
    for step in (10, 20, 30):
        report(scheduler, runs[-1], step, 0.1)
    assert pruned(sweep) == {runs[-1]}


def test_a_new_session_judges_by_the_old_record(sweep):
    """The best of the first session are in the way of a mediocre one in the second."""
    runs = sweep.runs()
    for run in runs[:-1]:
        run.append_metrics(100, {METRIC: 0.9}, time_ms=1)
        run.sync_journal()
    fresh = MemberScheduler(make_scheduler("asha", METRIC, "max", total_steps=900), requests(sweep))
    report(fresh, runs[-1].run_id, 100, 0.5)
    assert pruned(sweep) == set()  # the first one that it has ever seen
    recalled = MemberScheduler(make_scheduler("asha", METRIC, "max", total_steps=900), requests(sweep), runs)
    assert pruned(sweep) == set()  # remembering prunes nobody
    report(recalled, runs[-1].run_id, 100, 0.5)
    assert pruned(sweep) == {runs[-1].run_id}


def test_a_retried_worker_reports_steps_twice(sweep):
    scheduler = MemberScheduler(make_scheduler("median", METRIC, "max", total_steps=90), requests(sweep))
    run_id = sweep.runs()[0].run_id
    assert scheduler._judge(None, run_id, {"step": 20, METRIC: 0.5}) is False
    judged = dict(scheduler._judged)
    report(scheduler, run_id, 10, 0.0)
    assert scheduler._judged == judged


def test_no_scheduler():
    assert make_scheduler("none", METRIC, "max", 100) is None
