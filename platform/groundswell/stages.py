"""Pipelines: the stages of a sweep, whose runs start from what runs of other stages have trained.

A field that takes a folder may hold a reference, `run:<run id>@best` or `run:<run id>@last`, instead. It names a run by
the hash of everything that decides its result, not by a place on a disk: an experiment with it is the same on another
machine, and another one as soon as anything about the earlier stage changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from groundswell.config import ConfigError

Checkpoint = Literal["best", "last"]
REFERENCE = re.compile(r"run:([0-9a-f]{12})@(best|last)")
USABLE = ("finished", "stopped")  # states of a run whose checkpoints others may start from
_known_sweeps: dict[Path, None] = {}  # folders of sweeps that this process has met, in order


@dataclass(frozen=True)
class Stage:
    """One training of a pipeline. `changes`: what its experiment sets in the sweep's base, by dotted path. `inputs`:
    dotted path of a field that takes a folder -> the earlier stage that it comes from, as "stage" or "stage@last"
    (default: its best checkpoint, by its checkpointing.best_metric)."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def sources(self) -> dict[str, tuple[str, Checkpoint]]:
        """Field -> (stage, which of its checkpoints). Raises ConfigError."""
        found: dict[str, tuple[str, Checkpoint]] = {}
        for path, text in self.inputs.items():
            stage, _, checkpoint = text.partition("@")
            if checkpoint not in ("", "best", "last"):
                raise ConfigError(f"stage {self.name}: {path}={text}: write STAGE, STAGE@best or STAGE@last")
            found[path] = stage, "last" if checkpoint == "last" else "best"
        return found


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Raise ConfigError unless names differ and every stage's inputs come from stages before it."""
    seen: list[str] = []
    for stage in stages:
        if stage.name in seen:
            raise ConfigError(f"stage {stage.name}: there are two of that name")
        for path, (source, _) in stage.sources().items():
            if source not in seen:
                earlier = ", ".join(seen) or "none"
                raise ConfigError(f"stage {stage.name}: {path} comes from '{source}', which is no stage before it "
                                  f"({earlier})")  # fmt: skip
        seen.append(stage.name)


def reference(run_id: str, checkpoint: Checkpoint = "best") -> str:
    return f"run:{run_id}@{checkpoint}"


def referred_run(text: str) -> str | None:
    """The run id of a reference; None for a folder."""
    match = REFERENCE.fullmatch(text)
    return match[1] if match else None


def remember(sweep: Path) -> None:
    """References are looked up in this sweep's folder, too."""
    _known_sweeps[sweep.resolve()] = None


def resolve(place: str | Path) -> Path:
    """A folder as it is; a reference as the checkpoint's folder, in one of the sweeps that this process works on.

    Raises ConfigError where the run is not there, has not ended well, or has no checkpoint.
    """
    match = REFERENCE.fullmatch(str(place))
    if match is None:
        return Path(place)
    from groundswell.rundir import SweepFolder

    run_id, which = match.groups()
    for sweep in _known_sweeps:
        run = SweepFolder(sweep).run(run_id)
        if run.exists():
            status = run.status()
            if status.state not in USABLE:
                raise ConfigError(f"{place}: that run is {status.state}, not finished; run its sweep to the end")
            return run.checkpoint_folder(run.best_step() if which == "best" else run.checkpoint_step())
    raise ConfigError(f"{place}: no such run in {', '.join(map(str, _known_sweeps)) or 'any known sweep'}")


def is_there(place: str | Path) -> bool:
    """Is the folder, or what the reference stands for, ready to be read?"""
    try:
        return resolve(place).exists()
    except ConfigError:
        return False
