"""`groundswell convert`: a run's DeepSpeed state, so that it can go on with any number of workers."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

import tyro
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from groundswell.config import ConfigError
from groundswell.rundir import RunFolder
from groundswell.scaling import portable, states, zero_states
from groundswell.scaling.deepspeed_engine import TAG
from groundswell.scaling.states import States
from groundswell.scaling.worker import RUN_STATE
from groundswell.selection import find_run
from groundswell.storage import Storage

HELPERS = ("zero_to_fp32.py", "zero_to_torch.py")  # scripts that DeepSpeed puts beside its states


def main(arguments: Sequence[str]) -> int:
    return tyro.cli(convert, prog="groundswell convert", args=list(arguments))


def convert(run: Annotated[str, tyro.conf.Positional], output: Path = Path("results"), storage: str = "") -> int:
    """Make the newest DeepSpeed state of a run one that any number of workers can go on from. The run must not be
    training. Needs as much free disk space as the state takes; the old form is removed at the end.

    Args:
        run: The run's id (or its first characters), its name, or its folder.
        output: Folder of the sweeps.
        storage: URI where the sweep's states are, if it was started with --storage.
    """
    folder = RunFolder(run) if (Path(run) / "run.json").is_file() else find_run(output, run)[1].folder
    _check_strategy(folder)
    with _alone(folder):
        if storage:
            return _convert_stored(folder, Storage(storage))
        name = _newest(States.local(folder.path.resolve()), folder)
        return _convert(folder.path / states.FOLDER / name)


def _convert(state: Path) -> int:
    if portable.is_portable(state) and not (state / TAG).exists():
        print(f"{state} is converted already")
        return 0
    num_workers = convert_state(state)
    size = sum(path.stat().st_size for path in (state / portable.FOLDER).iterdir())
    print(f"{state}: {size / 2**20:.1f} MiB, saved by {num_workers} workers, can be read by any number of them")
    return 0


def _convert_stored(folder: RunFolder, storage: Storage) -> int:
    """The same in shared storage, by way of a folder here: what is new goes up before what is old is taken away."""
    run = f"{folder.path.resolve().parents[1].name}/runs/{folder.run_id}"
    name = _newest(States(*storage.ray_place(run)), folder)
    state = f"{run}/{states.FOLDER}/{name}"
    with tempfile.TemporaryDirectory(prefix="groundswell-") as scratch:
        local = Path(scratch) / name
        storage.pull(state, local)
        _convert(local)
        storage.push(local, state)
        kept = {path.name for path in local.iterdir()}
        for old in sorted(set(storage.list(state)) - kept, key=_lists_first):
            storage.delete(f"{state}/{old}")
    return 0


def _lists_first(name: str) -> tuple[bool, str]:
    """Without its lists a state is taken as it is."""
    return not PurePosixPath(name).match(states.LISTS), name


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


def _check_strategy(folder: RunFolder) -> None:
    strategy = folder.experiment_dict().get("scaling", {}).get("strategy", "single")
    if strategy != "deepspeed":
        raise ConfigError(
            f"run {folder.run_id} has no DeepSpeed state: its scaling.strategy is {strategy}, which needs no conversion"
        )


def _newest(place: States, folder: RunFolder) -> str:
    name = place.newest()
    if name is None:
        raise ConfigError(
            f"run {folder.run_id} has no training state in {place.path}; was its sweep started with --storage? If it "
            "has not been trained at all, start it with any number of workers"
        )
    return name


def convert_state(state: Path) -> int:
    """Replace DeepSpeed's files in a training state. Returns how many workers have saved it. Killed at any moment, it
    leaves a state that can be read: the new form counts as soon as it is whole, the old one goes only then."""
    try:
        with safe_open(state / RUN_STATE, "pt") as file:
            num_workers = int(file.get_tensor("world_size"))
    except (OSError, SafetensorError) as error:
        raise states.damaged(state / RUN_STATE, error) from None
    if not portable.is_portable(state):
        if not (state / TAG).is_dir():
            raise states.damaged(state, f"no folder {TAG}")
        tensors, step = zero_states.read(state / TAG, num_workers)
        portable.write(state, tensors, step)
    for path in (*state.glob(states.LISTS), *(state / name for name in HELPERS)):
        path.unlink(missing_ok=True)
    shutil.rmtree(state / TAG, ignore_errors=True)
    return num_workers
