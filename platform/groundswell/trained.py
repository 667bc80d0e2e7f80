"""Networks that an earlier sweep has trained, for sweeps that start from them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from groundswell.config import ConfigError
from groundswell.rundir import RunFolder, SweepFolder


def trained_run(sweep: str | Path, command: str, **axes: Any) -> RunFolder:
    """A finished run of the sweep in this folder with these axis values; of several the one that ended last.

    Raises ConfigError where there is none: `command` is what trains it.
    """
    found = []
    for run in SweepFolder(sweep).runs():
        status, values = run.status(), run.description()["axes"]
        if status.state == "finished" and all(values.get(name) == value for name, value in axes.items()):
            found.append((status.ended_ms or 0, run.run_id, run))
    if not found:
        wanted = " and ".join(f"{name}={value}" for name, value in axes.items())
        raise ConfigError(f"{sweep}: no finished run{' with ' * bool(wanted)}{wanted}; train it first: {command}")
    return max(found)[2]


def trained_networks(sweep: str | Path, command: str, axis: str) -> dict[Any, str]:
    """Value of the axis -> folder of the newest checkpoint of such a run. Raises ConfigError where there is none."""
    values = {run.description()["axes"].get(axis) for run in SweepFolder(sweep).runs()} - {None}
    found = {}
    for value in sorted(values, key=str):
        with contextlib.suppress(ConfigError):
            run = trained_run(sweep, command, **{axis: value})
            found[value] = str(run.checkpoint_folder(run.checkpoint_step()))
    if not found:
        trained_run(sweep, command)
    return found
