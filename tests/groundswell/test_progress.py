"""The progress line: counts, rates, the best run, and the time left."""

import io
import itertools

import pytest
from rich.console import Console

from groundswell import progress as progress_module
from groundswell.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def make(total_runs=4, total_work=400.0, mode="max"):
    return Progress(Console(file=io.StringIO()), total_runs, total_work, "eval/test/accuracy", mode)


def test_counts_rate_best_and_time_left(clock):
    progress = make()
    clock[0] += 5
    assert progress.line() == "0/4 runs done | starting Ray | 5 s so far"
    progress.begin("a", "lr=1", step=0, total_steps=100, work=100.0)
    progress.begin("b", "lr=2", step=0, total_steps=100, work=100.0)
    assert progress.line() == "0/4 runs done | 2 running | 5 s so far"
    clock[0] += 10
    for run_id, accuracy in (("a", 0.5), ("b", 0.75)):
        report = {"step": 50, "state": "running", "perf/steps_per_s": 5.0, "eval/test/accuracy": accuracy}
        progress.report({"run_id": run_id, **report})
    # 100 of 400 units of work in 10 s: 30 s more.
    expected = "0/4 runs done | 2 running | 10 steps/s | best test/accuracy 0.750 (lr=2) | 30 s left | 15 s so far"
    assert progress.line() == expected


def test_early_stops_and_finished_runs_shorten_the_rest(clock):
    progress = make()
    progress.skip("finished", work=100.0)  # done before this session
    progress.begin("a", "a", step=50, total_steps=100, work=100.0)  # goes on from half
    progress.begin("b", "b", step=0, total_steps=100, work=100.0)
    clock[0] += 10
    progress.report({"run_id": "a", "step": 100, "state": "finished"})
    progress.report({"run_id": "b", "step": 50, "state": "stopped"})
    line = progress.line()
    assert line.startswith("3/4 runs done | 0 running")
    assert "10 s left" in line  # 100 units trained in 10 s, 100 are left


def test_a_budget_of_seconds_counts_seconds(clock):
    progress = make(total_runs=1, total_work=100.0)
    progress.begin("a", "a", 20.0, 80.0, 100.0, counted="perf/training_s")  # goes on from a quarter
    clock[0] += 30
    progress.report({"run_id": "a", "step": 7, "state": "running", "perf/training_s": 40.0})
    assert "60 s left" in progress.line()  # a quarter in 30 s, half is left
    progress.report({"run_id": "a", "step": 9, "state": "finished", "perf/training_s": 81.0})
    assert "0 s left" in progress.line()


def test_troubles_are_counted_and_strangers_ignored(clock):
    progress = make()
    for run_id, state in (("a", "failed"), ("b", "diverged")):
        progress.begin(run_id, run_id, 0, 10, 100.0)
        progress.report({"run_id": run_id, "step": 1, "state": state})
    progress.report({"run_id": "nobody", "step": 3, "state": "finished"})
    assert "2/4 runs done | 0 running | 1 failed, 1 diverged" in progress.line()


def test_best_of_a_loss_is_the_lowest(clock):
    progress = make(mode="min")
    progress.begin("a", "a", 0, 10, 100.0)
    for step, value in ((1, 0.5), (2, 0.25), (3, 0.4)):
        progress.report({"run_id": "a", "step": step, "state": "running", "eval/test/accuracy": value})
    assert "best test/accuracy 0.250" in progress.line()


def test_lines_go_to_a_file_now_and_then():
    stream = io.StringIO()
    progress = Progress(Console(file=stream), 1, 1.0, "m", "max")
    with progress:
        for _ in itertools.count():
            if stream.getvalue():
                break
    assert stream.getvalue().startswith("0/1 runs done")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (89.4, "89 s"), (91, "2 min"), (5_399, "90 min"), (5_400, "1.5 h"), (48 * 3_600, "2.0 days")],
)
def test_times_are_short(seconds, text):
    assert format_seconds(seconds) == text
