"""`groundswell convert`: a run's DeepSpeed state, so that it can go on with any number of workers."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from groundswell.config import ConfigError
from groundswell.files import check_name
from groundswell.rundir import RunFolder
from groundswell.scaling import portable, zero_states
from groundswell.scaling.deepspeed_engine import TAG
from groundswell.scaling.session import STATES
from groundswell.scaling.worker import RUN_STATE
from groundswell.selection import find_run

RAY_RECORD = "checkpoint_manager_snapshot.json"  # of Ray Train 2.60, below `training`
HELPERS = ("zero_to_fp32.py", "zero_to_torch.py")  # scripts that DeepSpeed puts beside its states


def main(arguments: Sequence[str]) -> int:
    return tyro.cli(convert, prog="groundswell convert", args=list(arguments))


def convert(run: Annotated[str, tyro.conf.Positional], output: Path = Path("results")) -> int:
    """Make the newest DeepSpeed state of a run one that any number of workers can go on from. The run must not be
    training. Needs as much free disk space as the state takes; the old form is removed at the end.

    Args:
        run: The run's id (or its first characters), its name, or its folder.
        output: Folder of the sweeps.
    """
    folder = RunFolder(run) if (Path(run) / "run.json").is_file() else find_run(output, run)[1].folder
    with _alone(folder):
        state = newest_state(folder)
        if portable.is_portable(state) and not (state / TAG).exists():
            print(f"{state} is converted already")
            return 0
        num_workers = convert_state(state)
    size = sum(path.stat().st_size for path in (state / portable.FOLDER).iterdir())
    print(f"{state}: {size / 2**20:.1f} MiB, saved by {num_workers} workers, can be read by any number of them")
    return 0


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """While nobody trains the run. Raises ConfigError."""
    with contextlib.ExitStack() as locks:
        for name in ("training.lock", "workers.lock"):
            try:
                locks.enter_context(FileLock(folder.path / name, timeout=0))
            except Timeout:
                raise ConfigError(
                    f"run {folder.run_id} is being trained; interrupt its sweep (Ctrl-C) and convert it then"
                ) from None
            except OSError as error:
                raise ConfigError(f"run {folder.run_id}: cannot write to '{folder.path}' ({error.strerror})") from None
        yield


def newest_state(folder: RunFolder) -> Path:
    """The DeepSpeed state that training goes on from. Raises ConfigError where there is none."""
    strategy = folder.experiment_dict().get("scaling", {}).get("strategy", "single")
    if strategy != "deepspeed":
        raise ConfigError(
            f"run {folder.run_id} has no DeepSpeed state: its scaling.strategy is {strategy}, which needs no conversion"
        )
    states = folder.path / STATES
    name = _recorded(states / RAY_RECORD) or max((path.name for path in states.glob("step-*")), default=None)
    if name is None:
        raise ConfigError(f"run {folder.run_id} has no training state yet; start it with any number of workers")
    return states / name


def _recorded(path: Path) -> str | None:
    """Name of the newest state in Ray Train's record: a folder beyond it may be half written."""
    try:
        newest = json.loads(path.read_bytes())["latest_checkpoint_result"]
        return None if newest is None else check_name(newest["checkpoint_dir_name"], str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise portable.damaged(path, error) from None


def convert_state(state: Path) -> int:
    """Replace DeepSpeed's files in a training state. Returns how many workers have saved it. Killed at any moment, it
    leaves a state that can be read: the new form counts as soon as it is whole, the old one goes only then."""
    try:
        with safe_open(state / RUN_STATE, "pt") as file:
            num_workers = int(file.get_tensor("world_size"))
    except (OSError, SafetensorError) as error:
        raise portable.damaged(state / RUN_STATE, error) from None
    if not portable.is_portable(state):
        if not (state / TAG).is_dir():
            raise portable.damaged(state, f"no folder {TAG}")
        tensors, step = zero_states.read(state / TAG, num_workers)
        portable.write(state, tensors, step)
    shutil.rmtree(state / TAG, ignore_errors=True)
    for name in HELPERS:
        (state / name).unlink(missing_ok=True)
    return num_workers
