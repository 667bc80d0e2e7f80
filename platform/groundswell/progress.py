"""Progress on the terminal: one live line, or a line now and then where there is no terminal."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_SECONDS = (10.0, 60.0)  # between lines when the output is not a terminal: in the first minute, and later


class LiveLine(ABC):
    """A line that is kept up to date while the block lasts."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @abstractmethod
    def line(self) -> str: ...

    def _refresh(self) -> None:
        if self.console.is_terminal:
            with Live(Text(self.line()), console=self.console, refresh_per_second=2, transient=True) as live:
                while not self._stop.wait(0.5):
                    live.update(Text(self.line(), style="cyan"))
            return
        delay = 1.0  # the first line soon: a sign of life
        while not self._stop.wait(delay):
            self.console.print(self.line(), soft_wrap=True, highlight=False)
            delay = PLAIN_SECONDS[time.monotonic() - self._start > 60]


class Progress(LiveLine):
    """Of a sweep. Counts work in FLOPs, so that the time left is right for runs of different size."""

    def __init__(
        self, console: Console, total_runs: int, total_work: float, metric: str, mode: str, unit: str = "step"
    ) -> None:
        super().__init__(console)
        self.unit = unit  # of the runs' steps
        self.metric, self.mode = metric, mode
        self.total_runs, self.total_work = total_runs, total_work
        self.ended: dict[str, int] = {}
        # run id -> done of the budget, the whole of it, steps a second, work
        self._live_runs: dict[str, tuple[float, float, float, float]] = {}
        self._counted: dict[str, str] = {}
        self._saved_work = 0.0  # work that an earlier session or an early stop has taken off
        self._done_work = 0.0
        self._first_begin: float | None = None
        self._best: tuple[float, str] | None = None
        self._names: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(
        self, run_id: str, name: str, step: float, total_steps: float, work: float, counted: str = "step"
    ) -> None:
        """A run starts (or goes on) at `step`; `work` is that of the whole run. `counted`: what of a report tells how
        far it is, where the budget is not one of steps."""
        with self._lock:
            self._first_begin = self._first_begin or time.monotonic()
            self._names[run_id] = name
            self._counted[run_id] = counted
            self._live_runs[run_id] = (step, total_steps, 0.0, work)
            self._saved_work += work * step / total_steps

    def skip(self, state: str, work: float) -> None:
        """A run that was already at its end."""
        with self._lock:
            self.ended[state] = self.ended.get(state, 0) + 1
            self._saved_work += work

    def report(self, member: Mapping[str, Any]) -> None:
        with self._lock:
            run_id = member["run_id"]
            if run_id not in self._live_runs:
                return
            old_step, total, rate, work = self._live_runs[run_id]
            step = min(total, member.get(self._counted[run_id], old_step))
            self._done_work += max(0, step - old_step) / total * work
            self._live_runs[run_id] = (step, total, member.get(f"perf/{self.unit}s_per_s", rate), work)
            value = member.get(self.metric)
            if value is not None and (self._best is None or (value > self._best[0]) == (self.mode == "max")):
                self._best = (value, self._names[run_id])
            if member["state"] != "running":
                self.ended[member["state"]] = self.ended.get(member["state"], 0) + 1
                self._saved_work += (total - step) / total * work
                del self._live_runs[run_id]

    def line(self) -> str:
        with self._lock:
            now = time.monotonic()
            ended = sum(self.ended.values())
            running = f"{len(self._live_runs)} running" if self._first_begin else "starting Ray"
            parts = [f"{ended}/{self.total_runs} runs done", running]
            bad = ", ".join(
                f"{n} {state}" for state, n in self.ended.items() if state in ("failed", "diverged", "pruned")
            )
            parts += [bad] if bad else []
            rate = sum(rate for _, _, rate, _ in self._live_runs.values())
            if rate:
                parts.append(f"{rate:,.0f} {self.unit}s/s")
            if self._best:
                parts.append(f"best {self.metric.removeprefix('eval/')} {self._best[0]:.3f} ({self._best[1]})")
            left = self.total_work - self._saved_work - self._done_work
            if self._done_work > 0 and self._first_begin:
                parts.append(f"{format_seconds(left / self._done_work * (now - self._first_begin))} left")
            parts.append(f"{format_seconds(now - self._start)} so far")
            return " | ".join(parts)


class ProbeProgress(LiveLine):
    """Of probes: checkpoints answered, out of those that were left."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console)
        self.total, self.actors = total, 0
        self.done, self.failed = 0, 0
        self._begin: float | None = None  # of the first answer

    def begin(self) -> None:
        self._begin = self._begin or time.monotonic()

    def count(self, answered: int, failed: int) -> None:
        self.done, self.failed = answered + failed, failed

    def line(self) -> str:
        parts = [f"{self.done}/{self.total} questions"]
        parts += [f"{self.actors} actor{'s' if self.actors > 1 else ''}"] if self.actors else []
        if self._begin is None:
            parts.append("starting actors")
        elif self.done:
            rate = self.done / max(time.monotonic() - self._begin, 1e-9)
            parts.append(f"{rate:.1f}/s" if rate >= 0.1 else f"{format_seconds(1 / rate)} each")
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        parts += [f"{self.failed} failed"] if self.failed else []
        return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
