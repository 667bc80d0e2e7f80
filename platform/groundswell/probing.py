"""Probes of many checkpoints: what is left to ask, a pool of actors that ask it, and the answers' way to MLflow."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from groundswell import cluster
from groundswell.asking import Asking, Failure
from groundswell.config import ConfigError
from groundswell.interrupts import interruptible
from groundswell.probe_pool import LOG, Job, ProbePool, answer, logging_to, one_line
from groundswell.probes import DividedProbe, Probe, is_over_time_due, objection, parts_left, unanswered
from groundswell.progress import ProbeProgress
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.tracking import Tracker, default_uri
from groundswell.tracking.run_sync import unsent_answers

log = logging.getLogger(__name__)
TURN_SECONDS = 0.5
POOL_START_SECONDS = 10.0  # what actors cost before they answer: less work than that is done in the driver
JUDGE_SECONDS = 2.0  # into the work, when the driver knows how long it takes
LIVE_SECONDS = 3.0  # between two looks for new checkpoints while a sweep trains
DRAIN_SECONDS = 60.0  # how long the end waits for a slow tracking store
MAX_ALIKE = 3  # failures of one reason that are told one by one
STOPPING = "Stopping: what has been answered is kept (Ctrl-C again to leave at once)"


@dataclass(frozen=True)
class Target:
    """A run, and the steps of the checkpoints to ask."""

    sweep: SweepFolder
    run: RunFolder
    steps: tuple[int, ...]


@dataclass
class Plan:
    """What is left to ask. `asked`: which probes ask a run, by its folder; `objections`: why others do not."""

    jobs: list[Job] = field(default_factory=list)
    asked: dict[Path, tuple[Probe, ...]] = field(default_factory=dict)
    objections: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)  # runs whose description cannot be read


@dataclass(frozen=True)
class Outcome:
    """`answered`: checkpoints that were asked just now without a failure; `asked` as in the plan; `objections`: why
    probes did not ask, and how many runs."""

    answered: int = 0
    failures: tuple[Failure, ...] = ()
    interrupted: bool = False
    asked: dict[Path, tuple[Probe, ...]] = field(default_factory=dict)
    objections: Counter[str] = field(default_factory=Counter)

    @property
    def exit_code(self) -> int:
        return 130 if self.interrupted else int(bool(self.failures))


def make_plan(targets: Iterable[Target], probes: Sequence[Probe]) -> Plan:
    """Reads the runs' folders only."""
    plan = Plan()
    for target in targets:
        run = RunFolder(target.run.path.resolve())  # an actor may have another working directory
        try:
            experiment = run.experiment()
            told = [(probe, objection(probe, experiment)) for probe in probes]
            mine = tuple(probe for probe, text in told if text is None)
            sweep, scaling = SweepFolder(target.sweep.path.resolve()), experiment.scaling
            task, may_use_gpu = experiment.task.canonical_json(), scaling.device != "cpu"
            whole = Job(sweep, run, None, mine, task, scaling.num_threads, may_use_gpu)
            jobs = [job for step in target.steps for job in _checkpoint_jobs(whole, step)]
        except Exception as error:
            plan.failures.append(Failure(run, None, one_line(error)))
            continue
        plan.asked[target.run.path] = mine
        plan.objections += [f"{probe.name()}: {text}" for probe, text in told if text is not None]
        plan.jobs += jobs or ([whole] if any(is_over_time_due(run, probe) for probe in mine) else [])
    return plan


def _checkpoint_jobs(whole: Job, step: int) -> list[Job]:
    """What is left to ask: one job for all probes that answer at once, one for each that has parts."""
    jobs, plain = [], []
    for probe in unanswered(whole.run, step, whole.probes):
        if isinstance(probe, DividedProbe):
            parts = tuple(parts_left(whole.run, step, probe))
            jobs.append(replace(whole, step=step, probes=(probe,), parts=parts))
        else:
            plain.append(probe)
    return [replace(whole, step=step, probes=tuple(plain)), *jobs] if plain else jobs


def answer_here(asking: Asking, jobs: deque[Job], progress: ProbeProgress, interrupted: threading.Event) -> None:
    """Answer in this process while what is left takes less time than starting actors."""
    start, count = time.monotonic(), 0
    progress.begin()
    while jobs and not interrupted.is_set():
        elapsed = time.monotonic() - start
        if elapsed > JUDGE_SECONDS and elapsed / max(1, count) * len(jobs) > POOL_START_SECONDS:
            return
        job = jobs.popleft()
        jobs.extendleft(asking.finished(job, answer(job)))
        count += 1
        progress.count(asking.num_ended - asking.num_failed, asking.num_failed)


def answer_with_pool(pool: ProbePool, asking: Asking, progress: ProbeProgress, interrupted: threading.Event) -> None:
    """Until nothing is left."""
    while pool.pending and not interrupted.is_set():
        pool.turn(TURN_SECONDS)
        progress.actors = pool.num_ready
        if pool.num_ready:
            progress.begin()
        progress.count(asking.num_ended - asking.num_failed, asking.num_failed)


def probe_checkpoints(
    targets: Iterable[Target],
    probes: Sequence[Probe],
    workers: int | None = None,
    address: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Ask what has not been answered yet, on actors of a local cluster or of that at `address`, and track the answers.

    Raises ConfigError when no run can be asked, and where the cluster is not there.
    """
    console, targets = console or Console(), list(targets)
    plan = make_plan(targets, probes)
    if plan.objections and not plan.failures and not any(plan.asked.values()):
        raise ConfigError(plan.objections[0])
    interrupted = threading.Event()
    tracking = AnswerTracking(targets, console)
    asking = Asking(tracking.answered)
    jobs = asking.take(plan.jobs)
    with interruptible(interrupted, console, STOPPING), contextlib.closing(tracking):
        if jobs:
            _on_actors(asking, jobs, probes, workers, address, console, interrupted)
    failures = (*plan.failures, *asking.all_failures())
    return Outcome(asking.num_answered, failures, interrupted.is_set(), plan.asked, Counter(plan.objections))


def _on_actors(
    asking: Asking,
    jobs: Sequence[Job],
    probes: Sequence[Probe],
    workers: int | None,
    address: str | None,
    console: Console,
    interrupted: threading.Event,
) -> None:
    where = f"the cluster at {address}" if address else "this machine"
    runs = len({job.run.path for job in jobs})
    steps = len({job.checkpoint for job in jobs if job.step is not None})
    text = f"{steps} checkpoints of {runs} runs to ask: starting Ray on {where}"
    console.print(text, soft_wrap=True, highlight=False)
    num_cpus = workers * _threads(jobs) if workers else None
    with (
        logging_to(jobs[0].sweep.path / LOG),
        ProbeProgress(console, asking.num_left) as progress,
        cluster.connect(address, num_cpus) as resources,
        contextlib.closing(ProbePool(probes, asking.finished)) as pool,
    ):
        pool.submit(jobs)
        start_actors(pool, resources, jobs, workers)
        answer_with_pool(pool, asking, progress, interrupted)


def start_actors(
    pool: ProbePool, resources: cluster.Resources, jobs: Sequence[Job], workers: int | None = None
) -> None:
    """One for each GPU, else one for each core; no more than the pool has jobs."""
    on_gpu = resources.num_gpus > 0 and any(job.may_use_gpu for job in jobs)
    threads = _threads(jobs)
    if on_gpu:
        pool.dismiss()  # one that took a processor's idle time
    pool.grow(min(workers or resources.workers(threads, on_gpu), pool.pending), threads, on_gpu)


def _threads(jobs: Iterable[Job]) -> int:
    return max((job.threads for job in jobs), default=1)


# ---- in a sweep ----


def finish_asking(
    asking: Asking,
    plan: Plan,
    live: LiveAnswers | None,
    connect: Callable[[], cluster.Resources],
    num_gpus: int,
    console: Console,
    interrupted: threading.Event,
) -> None:
    """After training: what is quickly answered in this process (not what belongs on a GPU), the rest on actors for all
    cores."""
    asking.forget_failures()
    asking.looks_over_time = True
    jobs = deque(asking.take(plan.jobs))
    under_way = live.pool.pending if live else 0
    if not jobs and not under_way:
        return
    asking.num_ended = 0
    with ProbeProgress(console, asking.num_left) as progress:
        if not under_way and not (num_gpus and any(job.may_use_gpu for job in jobs)):
            answer_here(asking, jobs, progress, interrupted)
        if jobs or under_way:
            probes = {probe.canonical_json(): probe for job in jobs for probe in job.probes}
            with contextlib.closing(live.pool if live else ProbePool(probes.values(), asking.finished)) as pool:
                pool.submit(jobs)
                start_actors(pool, connect(), jobs)
                answer_with_pool(pool, asking, progress, interrupted)


class LiveAnswers:
    """A thread of the driver, and one actor that takes idle time first. What fails is asked again after training."""

    def __init__(self, asking: Asking, probes: Sequence[Probe], targets: Callable[[], list[Target]]) -> None:
        self._asking, self._probes, self._targets = asking, probes, targets
        self.pool = ProbePool(probes, asking.finished)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probes", daemon=True)

    def __enter__(self) -> LiveAnswers:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """What is being answered goes on in the pool."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        looked = float("-inf")
        try:
            while not self._stop.is_set():
                if time.monotonic() - looked >= LIVE_SECONDS:
                    looked = time.monotonic()
                    self.pool.submit(self._asking.take(make_plan(self._new_targets(), self._probes).jobs))
                if self.pool.pending:
                    self.pool.grow(1, num_cpus=0, idle_time=True)
                    self.pool.turn(TURN_SECONDS)
                else:
                    self._stop.wait(TURN_SECONDS)
        except Exception:
            log.exception("answering while training has ended")  # training goes on, and the rest is asked after it

    def _new_targets(self) -> list[Target]:
        """Without what has been looked at before: this is done often."""
        found = []
        for target in self._targets():
            steps = tuple(step for step in target.steps if self._asking.is_new(target.run, step))
            found += [replace(target, steps=steps)] if steps else []
        return found


# ---- tracking ----


class AnswerTracking:
    """Trackers of the sweeps that get answers. Where another process trains or tracks a sweep, that one sends them."""

    def __init__(self, targets: Iterable[Target], console: Console) -> None:
        self._runs = {target.run.path.resolve(): SweepFolder(target.sweep.path.resolve()) for target in targets}
        self._console = console
        self._trackers: dict[Path, Tracker] = {}

    def answered(self, job: Job) -> None:
        if tracker := self._tracker(job.sweep):
            tracker.look_again(job.run.run_id)

    def _tracker(self, sweep: SweepFolder) -> Tracker | None:
        if sweep.path not in self._trackers and not is_at_work(sweep):
            self._trackers[sweep.path] = Tracker(sweep)
            self._trackers[sweep.path].start()
        return self._trackers.get(sweep.path)

    def close(self) -> None:
        """Also what an earlier command has left unsent."""
        unsent = {
            sweep.path: sweep
            for path, sweep in self._runs.items()
            if sweep.path in self._trackers or unsent_answers(RunFolder(path), default_uri(sweep.path.parent))
        }
        for sweep in unsent.values():
            tracker = self._tracker(sweep)
            if tracker is None:
                text = f"{sweep.name} is in use by another process, which sends the answers to MLflow"
                self._console.print(text, soft_wrap=True, highlight=False)
            elif leftover := tracker.close(DRAIN_SECONDS):
                self._console.print(f"[yellow]{leftover}[/]", soft_wrap=True)


def is_at_work(sweep: SweepFolder) -> bool:
    """Does another process train or track this sweep right now?"""
    for name in ("sweep.lock", "tracking.lock"):
        try:
            FileLock(sweep.path / name, timeout=0).acquire().lock.release()
        except Timeout:
            return True
    return False


def print_failures(failures: Iterable[Failure], console: Console) -> None:
    """One line each; where many have one reason, one line for all of them."""
    by_reason: dict[str, list[Failure]] = {}
    for failure in failures:
        by_reason.setdefault(failure.reason, []).append(failure)
    for reason, alike in by_reason.items():
        lines = [str(failure) for failure in alike]
        if len(alike) > MAX_ALIKE:
            lines = [f"not probed: {len(alike)} checkpoints of {len({f.run.path for f in alike})} runs: {reason}"]
        for line in lines:
            console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True, highlight=False)
