"""Questions that are answered in parts: each part once, whatever goes wrong in between."""

import json
import threading
from collections import deque
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
from rich.console import Console

from groundswell.probe_pool import ProbePool, answer
from groundswell.probes import (
    DividedProbe,
    Findings,
    Part,
    Probe,
    answers,
    answers_over_time,
    ask,
    ask_part,
    open_checkpoint,
    parts_left,
    run_probes,
    scalars,
)
from groundswell.probing import Asking, Target, answer_here, make_plan
from groundswell.progress import ProbeProgress
from groundswell.rundir import SweepFolder
from groundswell.tracking.run_sync import unsent_answers
from groundswell.training.trainer import PackTrainer


class Squares(DividedProbe):
    """The sum of the first squares, two numbers a part."""

    up_to: int = 6
    power: int = 2
    asked: ClassVar[list[tuple[int, tuple[int, ...]]]] = []
    broken: ClassVar[set[int]] = set()

    def part_question(self):
        return json.dumps({"power": self.power})

    def parts(self, experiment, stored):
        known = {int(number) for path in stored for number in pd.read_csv(path / "values.csv")["number"]}
        left = [number for number in range(1, self.up_to + 1) if number not in known]
        pairs = [tuple(left[start : start + 2]) for start in range(0, len(left), 2)]
        return [Part("-".join(map(str, pair)), cost=sum(pair), items=pair) for pair in pairs]

    def run_part(self, opened, part):
        self.asked.append((opened.step, part.items))
        if self.broken & set(part.items):
            raise ValueError("no such number")
        rows = [{"number": number, "value": number**self.power} for number in part.items]
        return Findings(tables={"values": pd.DataFrame(rows)})

    def join(self, experiment, stored):
        table = pd.concat([pd.read_csv(path / "values.csv") for path in stored])
        table = table[table["number"] <= self.up_to].sort_values("number")
        return Findings({"squares/total": table["value"].sum()}, tables={"values": table})

    def over_time(self, folder, answers):
        return Findings(tables={"steps": pd.DataFrame({"step": list(answers)})})


class Step(Probe):
    def run(self, opened):
        return Findings({"step/step": opened.step})

    def over_time(self, folder, answers):
        return Findings(tables={"steps": pd.DataFrame({"step": list(answers)})})


@pytest.fixture
def run(tiny, make_run):
    """With checkpoints at steps 20, 40 and 60."""
    folder = make_run(tiny)
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    Squares.asked.clear()
    Squares.broken = set()
    return folder


def jobs_of(run, *probes, steps=(60,)):
    return make_plan([Target(SweepFolder(run.path.parents[1]), run, steps)], probes).jobs


def items():
    return [pair for _, pair in Squares.asked]


def test_the_parts_make_the_answer(run):
    (path,) = run_probes(run, [Squares()])
    assert items() == [(5, 6), (3, 4), (1, 2)]  # the most expensive first
    assert scalars(path) == {"squares/total": 91.0}
    assert list(pd.read_csv(path / "values.csv")["value"]) == [1, 4, 9, 16, 25, 36]
    assert list(answers(run)) == [(60, "squares")]  # parts are no answers
    assert unsent_answers(run, "sqlite:///none") == 1
    assert run_probes(run, [Squares()]) == [] and len(Squares.asked) == 3


def test_what_a_killed_process_has_finished_is_not_asked_again(run):
    Squares.broken = {3}
    failed = ask(run, 60, [Squares()])
    assert isinstance(failed["squares"], ValueError) and not answers(run)
    Squares.broken = set()
    assert [part.items for part in parts_left(run, 60, Squares())] == [(3, 4), (1, 2)]
    assert not ask(run, 60, [Squares()])
    assert items() == [(5, 6), (3, 4), (3, 4), (1, 2)]
    assert scalars(answers(run)[60, "squares"]) == {"squares/total": 91.0}


def test_a_larger_question_keeps_the_parts_and_another_one_does_not(run):
    ask(run, 60, [Squares(up_to=3)])
    ask(run, 60, [Squares(up_to=6)])
    assert items() == [(1, 2), (3,), (4, 5), (6,)]
    assert scalars(answers(run)[60, "squares"]) == {"squares/total": 91.0}
    ask(run, 60, [Squares(up_to=2)])  # all there
    assert len(Squares.asked) == 4
    assert scalars(answers(run)[60, "squares"]) == {"squares/total": 5.0}
    ask(run, 60, [Squares(up_to=2, power=3)])
    assert len(Squares.asked) == 5
    assert scalars(answers(run)[60, "squares"]) == {"squares/total": 9.0}
    ask(run, 40, [Squares(up_to=2)])  # another checkpoint
    assert Squares.asked[-1] == (40, (1, 2))


def test_jobs_are_the_parts_and_then_the_whole(run):
    told = []
    asking = Asking(told.append)
    jobs = asking.take(jobs_of(run, Squares(), Step(), steps=(20, 60)))
    kinds = [(job.step, job.part.name if job.part else [probe.name() for probe in job.probes]) for job in jobs]
    assert kinds == [(s, k) for s in (20, 60) for k in (["step"], "5-6", "3-4", "1-2")]
    assert len({job.key for job in jobs}) == len(jobs)
    assert asking.num_left == 10  # both joins too
    follow = [asking.finished(job, answer(job)) for job in jobs]
    assert [[after.step for after in each] for each in follow] == [[], [], [], [20], [], [], [], [60]]
    assert asking.num_answered == 0
    (whole,) = follow[3]
    assert asking.finished(whole, answer(whole)) == [] and asking.num_answered == 1
    (over_time,) = asking.finished(follow[7][0], answer(follow[7][0]))
    assert over_time.step is None and [probe.name() for probe in over_time.probes] == ["step", "squares"]
    assert asking.finished(over_time, answer(over_time)) == []
    assert (asking.num_answered, asking.num_failed, asking.num_left, asking.num_ended) == (2, 0, 0, 10)
    assert len(Squares.asked) == 6 and len(told) == 11
    assert set(answers(run)) == {(step, name) for step in (20, 60) for name in ("squares", "step")}
    for name in ("squares", "step"):
        assert list(pd.read_csv(answers_over_time(run)[name] / "steps.csv")["step"]) == [20, 60]


def test_a_part_that_fails_keeps_the_others(run):
    Squares.broken = {3}
    asking = Asking(lambda job: None)
    jobs = deque(asking.take(jobs_of(run, Squares(), Step())))
    console = Console(file=StringIO())
    answer_here(asking, jobs, ProbeProgress(console, asking.num_left), threading.Event())
    (failure,) = asking.all_failures()
    assert str(failure).endswith("step 60: squares: ValueError: no such number")
    assert (asking.num_answered, asking.num_left) == (0, 0)
    assert list(answers(run)) == [(60, "step")]
    Squares.broken = set()
    asking.forget_failures()
    again = asking.take(jobs_of(run, Squares(), Step()))
    assert [job.part.items for job in again] == [(3, 4)]
    answer_here(asking, deque(again), ProbeProgress(console, 1), threading.Event())
    assert asking.num_answered == 1 and not asking.failures
    assert scalars(answers(run)[60, "squares"]) == {"squares/total": 91.0}


def test_where_only_the_joining_is_left(run):
    opened = open_checkpoint(run, 60)
    for part in parts_left(run, 60, Squares()):
        ask_part(run, opened, Squares(), part)
    asking = Asking(lambda job: None)
    (whole,) = asking.take(jobs_of(run, Squares()))
    assert whole.part is None and not answers(run)
    asking.finished(whole, answer(whole))
    assert list(answers(run)) == [(60, "squares")] and len(Squares.asked) == 3


def test_what_follows_comes_before_what_waits(run):
    """A finished grid is there before the next checkpoint is begun."""
    pool = ProbePool((), lambda job, troubles: [])
    jobs = Asking(lambda job: None).take(jobs_of(run, Squares(), steps=(20, 60)))
    pool.submit(jobs[:2])
    pool.submit_first(jobs[2:3])
    task = jobs[0].task
    assert [pool._next_job(task) for _ in range(3)] == [jobs[2], jobs[0], jobs[1]]


def test_names_of_parts_are_checked(run):
    class Bad(Squares):
        def parts(self, experiment, stored):
            return [Part("../elsewhere", 1.0)]

    failed = ask(run, 60, [Bad()])
    assert "part name" in str(failed["bad"])
    assert not list(Path(run.path).rglob("elsewhere"))
