"""What the benchmarks share: interleaved timing, the machine's matrix-multiply peak, a table and one JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table


def interleaved(variants: Mapping[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of one call of each variant, in each of `rounds` rounds that visit all variants in turn.

    CPU time of one thread, because other processes on the machine then disturb little; interleaved, because a
    machine's speed drifts.
    """
    repeats = {}
    for name, call in variants.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, round(seconds / max(time.process_time() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time() - start) / repeats[name])
    return times


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def sgemm_peak() -> float:
    """FLOP/s of the best of several 1024^3 float32 products on one thread."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(7):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def finish(figures: Mapping[str, float]) -> None:
    """The machine, then the last line: one JSON object with the named figures."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
