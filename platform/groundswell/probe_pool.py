"""Ray actors that ask probes of checkpoints. The driver hands each idle one the next job, so nothing is asked twice.

An actor that dies is replaced, and its job goes to another one. Answers appear in run folders whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groundswell.config import ConfigError
from groundswell.probes import DividedProbe, Opened, Part, Probe, ask, ask_part, look_over_time, open_checkpoint
from groundswell.rundir import RunFolder, SweepFolder

log = logging.getLogger(__name__)
LOG = Path("log") / "probes.log"  # in a sweep's folder
Key = tuple[Path, int | None, str, str]  # run's folder, step, name of a divided probe, name of a part
RETRIES = 3  # times a job whose actor died goes to another one; actors that die in a row before they have started


@dataclass(frozen=True)
class Job:
    """One checkpoint to ask; without a step, a run whose answers are looked at together.

    A divided probe's job has `parts`, jobs of their own that come before it; such a job has its `part`.
    """

    sweep: SweepFolder
    run: RunFolder
    step: int | None
    probes: tuple[Probe, ...]
    task: str  # the run's task; jobs of one task share its data set
    threads: int = 1
    may_use_gpu: bool = False
    parts: tuple[Part, ...] = ()
    part: Part | None = None

    @property
    def key(self) -> Key:
        divided = [probe.name() for probe in self.probes[:1] if isinstance(probe, DividedProbe)]
        return self.run.path, self.step, "".join(divided), self.part.name if self.part else ""

    @property
    def checkpoint(self) -> tuple[Path, int | None]:
        return self.run.path, self.step

    def part_jobs(self) -> list[Job]:
        return [replace(self, parts=(), part=part) for part in self.parts]


def answer(job: Job, device: str = "cpu") -> list[str]:
    """Returns what went wrong, a line each."""
    start = time.monotonic()
    try:
        if job.step is None:
            failed = _look_over_time(job)
        elif job.part is not None:
            failed = _ask_part(job, job.step, job.part, device)
        else:
            failed = ask(job.run, job.step, job.probes, device)
    except Exception as error:
        log.exception("run %s step %s: not probed", job.run.run_id, job.step)
        return [one_line(error)]
    for name, trouble in failed.items():
        log.error("run %s step %s: %s failed", job.run.run_id, job.step, name, exc_info=trouble)
    part = f" {job.part.name}" if job.part else ""
    log.info("run %s step %s%s: %.2f s", job.run.run_id, job.step, part, time.monotonic() - start)
    return [f"{name}: {one_line(trouble)}" for name, trouble in failed.items()]


def _ask_part(job: Job, step: int, part: Part, device: str) -> dict[str, Exception]:
    (probe,) = job.probes
    assert isinstance(probe, DividedProbe)
    opened = _open_once(job.run.path, step, device)
    try:
        ask_part(job.run, opened, probe, part)
    except Exception as error:
        return {probe.name(): error}
    return {}


@functools.lru_cache(maxsize=1)
def _open_once(run: Path, step: int, device: str) -> Opened:
    """A process answers the parts of one checkpoint after the other."""
    return open_checkpoint(RunFolder(run), step, device)


def _look_over_time(job: Job) -> dict[str, Exception]:
    failed: dict[str, Exception] = {}
    for probe in job.probes:
        try:
            look_over_time(job.run, probe)
        except Exception as error:
            failed[probe.name()] = error
    return failed


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


class ProbeActor:
    """One process that answers job after job."""

    def __init__(self, threads: int, on_gpu: bool, idle_time: bool) -> None:
        import torch  # only where it computes

        if idle_time:
            _take_idle_time()
        torch.set_num_threads(threads)
        self.on_gpu = on_gpu
        self._log, self._log_path = contextlib.ExitStack(), Path()

    def get_ready(self, probes: tuple[Probe, ...]) -> None:
        """That this can be called means that the probes' modules have been imported."""
        from groundswell.training import checkpoint, pack  # noqa: F401

    def answer(self, job: Job) -> list[str]:
        self._log_to(job.sweep.path / LOG)
        return answer(job, "cuda" if self.on_gpu and job.may_use_gpu else "cpu")

    def _log_to(self, path: Path) -> None:
        if path != self._log_path:
            self._log.close()
            self._log.enter_context(logging_to(path))
            self._log_path = path


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """The engine's remarks go to this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("groundswell")
    old_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(old_level)
        handler.close()


def _take_idle_time() -> None:
    os.nice(10)
    with contextlib.suppress(AttributeError, OSError):  # Linux; Ray's workers are nice already, so that 10 says little
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass(eq=False)
class _Member:
    """An actor, and what it was started with."""

    actor: Any
    num_cpus: int
    on_gpu: bool
    idle_time: bool
    ready: bool = False
    job: Job | None = None
    task: str = ""  # of its last job


class ProbePool:
    """On a cluster that is up. `finished` (job, what went wrong) returns further jobs. For one thread at a time."""

    def __init__(self, probes: Iterable[Probe], finished: Callable[[Job, list[str]], Iterable[Job]]) -> None:
        self._probes, self._finished = tuple(probes), finished
        self._members: list[_Member] = []
        self._waiting: dict[str, deque[Job]] = {}  # by task
        self._under_way: dict[Any, _Member] = {}  # Ray's reference -> whose call it is
        self._deaths: Counter[Key] = Counter()  # of actors, by the job they had
        self._failed_starts = 0  # in a row

    @property
    def num_ready(self) -> int:
        return sum(member.ready for member in self._members)

    @property
    def pending(self) -> int:
        """Jobs that have not ended."""
        return sum(map(len, self._waiting.values())) + sum(member.job is not None for member in self._members)

    def submit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._waiting.setdefault(job.task, deque()).append(job)

    def submit_first(self, jobs: Iterable[Job]) -> None:
        """Before what waits already."""
        for job in jobs:
            self._waiting.setdefault(job.task, deque()).appendleft(job)

    def grow(self, count: int, num_cpus: int = 1, on_gpu: bool = False, idle_time: bool = False) -> None:
        """Start actors until there are so many. `idle_time`: they give way to everything else on the machine."""
        while len(self._members) < count:
            self._start(num_cpus, on_gpu, idle_time)

    def dismiss(self) -> None:
        """End the actors; what they were asked waits for others."""
        members, self._members, self._under_way = self._members, [], {}
        for member in members:
            self._kill(member)
        self.submit(member.job for member in members if member.job)

    def turn(self, seconds: float) -> None:
        """Hand out jobs, and wait at most so long for something to end. Raises ConfigError if no actor starts."""
        import ray

        for member in self._members:
            if member.ready and member.job is None and (job := self._next_job(member.task)):
                member.job, member.task = job, job.task
                self._under_way[member.actor.answer.remote(job)] = member
        if not self._under_way:
            time.sleep(seconds)
            return
        done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=seconds)
        for reference in done:
            self._take(reference)

    def close(self) -> None:
        """End the actors, whatever they are doing; nothing waits any more."""
        self.dismiss()
        self._waiting = {}

    def _start(self, num_cpus: int, on_gpu: bool, idle_time: bool) -> None:
        import ray

        options = {"num_cpus": num_cpus, "num_gpus": int(on_gpu)}
        actor: Any = ray.remote(ProbeActor).options(**options).remote(max(1, num_cpus), on_gpu, idle_time)
        self._members.append(_Member(actor, num_cpus, on_gpu, idle_time))
        self._under_way[actor.get_ready.remote(self._probes)] = self._members[-1]

    def _next_job(self, task: str) -> Job | None:
        """Of the actor's last task where there is one, so that data sets are built as seldom as possible; else of the
        task that the fewest others are at."""
        if not self._waiting.get(task):
            left = [name for name, queue in self._waiting.items() if queue]
            busy = Counter(member.task for member in self._members if member.job)
            task = min(left, key=lambda name: (busy[name], -len(self._waiting[name])), default="")
        return self._waiting[task].popleft() if self._waiting.get(task) else None

    def _take(self, reference: Any) -> None:
        """A call has ended: well, with an error, or with its actor."""
        import ray

        member = self._under_way.pop(reference)
        job, member.job = member.job, None
        try:
            troubles = ray.get(reference)
        except ray.exceptions.RayActorError:
            self._replace(member, job)
            return
        except Exception as error:  # what the actor raises itself comes back as text: this is Ray's, or an import's
            last = str(error).strip().splitlines()[-1]
            if job is None:
                raise ConfigError(f"probe actors do not start: {last}") from None
            troubles = [last]
        self._failed_starts, member.ready = 0, True
        if job is not None:
            self.submit_first(self._finished(job, troubles))

    def _replace(self, member: _Member, job: Job | None) -> None:
        log.warning("a probe actor died while it %s", f"asked {job.key}" if job else "started")
        self._members.remove(member)
        self._kill(member)
        if job is None:
            self._failed_starts += 1
            if self._failed_starts > RETRIES:
                raise ConfigError("probe actors do not start: their processes die")
        else:
            self._deaths[job.key] += 1
            if self._deaths[job.key] > RETRIES:
                self.submit_first(self._finished(job, ["the process that asked died, and died again after each retry"]))
            else:
                self.submit_first([job])
        self._start(member.num_cpus, member.on_gpu, member.idle_time)

    def _kill(self, member: _Member) -> None:
        import ray

        with contextlib.suppress(Exception):  # it may be gone
            ray.kill(member.actor)
