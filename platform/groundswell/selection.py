"""Finding sweeps, runs and checkpoints below an output folder, as commands name them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from groundswell.config import ConfigError
from groundswell.rundir import RunFolder, SweepFolder, list_sweeps
from groundswell.tracking.listing import RunRow, filter_rows, read_row, read_rows


def all_sweeps(output: Path) -> list[SweepFolder]:
    sweeps = list_sweeps(output)
    if not sweeps:
        raise ConfigError(f"output: no sweeps in '{output}'; start one, or name its folder with --output")
    return sweeps


def find_sweep(output: Path, name: str) -> SweepFolder:
    """Raises ConfigError, with near matches, for a sweep that is not there."""
    sweeps = all_sweeps(output)
    for sweep in sweeps:
        if sweep.name == name:
            return sweep
    raise ConfigError(f"no sweep '{name}' in '{output}'; {_near(name, [sweep.name for sweep in sweeps])}")


def find_run(output: Path, wanted: str, sweep: str | None = None) -> tuple[SweepFolder, RunRow]:
    """By id, first characters of an id, or name. Raises ConfigError when there is none, or more than one."""
    sweeps = [find_sweep(output, sweep)] if sweep else all_sweeps(output)
    found = [(each, folder) for each in sweeps for folder in each.runs()]
    names = [str(folder.description()["name"]) for _, folder in found]
    chosen = [pair for pair in found if pair[1].run_id.startswith(wanted)] if wanted else []
    chosen = chosen or [pair for pair, name in zip(found, names, strict=True) if name == wanted]
    if len({folder.run_id for _, folder in chosen}) == 1:
        owner, folder = chosen[0]
        return owner, read_row(owner.name, folder)
    if chosen:
        ids = ", ".join(f"{folder.run_id} ({owner.name})" for owner, folder in chosen[:5])
        raise ConfigError(f"run '{wanted}' is not unique: {ids}; give more of the id")
    where = f"sweep {sweep} of '{output}'" if sweep else f"'{output}'"
    raise ConfigError(f"no run '{wanted}' in {where}; {_near(wanted, [*(f.run_id for _, f in found), *names])}")


def select_runs(
    output: Path, sweep: str | None = None, filter: str | None = None, runs: Sequence[str] = ()
) -> list[tuple[SweepFolder, RunFolder]]:
    """Runs that are in the sweep, pass the filter (as of `groundswell runs`) and are named in `runs`, as far as these
    are given. Raises ConfigError when none is given, and when no run is left."""
    if not (sweep or filter or runs):
        raise ConfigError("which runs? name them with --sweep NAME, --filter 'weight_decay > 0.3', --runs ID ...")
    wanted = {find_run(output, name, sweep)[1].folder.path for name in runs}
    sweeps = [find_sweep(output, sweep)] if sweep else all_sweeps(output)
    pairs = [(folder, row) for folder in sweeps for row in read_rows(folder)]
    kept = {row.folder.path for row in filter_rows([row for _, row in pairs], filter)} if filter else None
    chosen = [
        (folder, row.folder)
        for folder, row in pairs
        if (not runs or row.folder.path in wanted) and (kept is None or row.folder.path in kept)
    ]
    if not chosen:
        where = f"sweep {sweep}" if sweep else f"'{output}'"
        raise ConfigError(f"none of the {len(pairs)} runs in {where} is selected; `groundswell runs` lists them")
    return chosen


def select_steps(folder: RunFolder, steps: str = "all") -> list[int]:
    """Steps of the run's checkpoints: all | last | every:N (every N-th, back from the last one) | 100,200,500.

    Raises ConfigError for other words and for a step without a checkpoint.
    """
    known = folder.checkpoint_steps()
    word, _, number = steps.partition(":")
    if steps in ("all", "last"):
        return known if steps == "all" else known[-1:]
    if word == "every" and number.isdigit() and int(number) > 0:
        return known[:: -int(number)][::-1]
    wanted = steps.replace(" ", "").split(",")
    if not all(text.isdigit() for text in wanted):
        raise ConfigError(f"steps: cannot read '{steps}'; write all, last, every:N (every N-th) or 100,200,500")
    for step in map(int, wanted):
        if step not in known:
            there = ", ".join(map(str, known)) or "none"
            raise ConfigError(f"steps: run {folder.run_id} has no checkpoint at step {step}; there are: {there}")
    return sorted(set(map(int, wanted)))


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"near: {', '.join(near)}" if near else "`groundswell runs` lists all"
