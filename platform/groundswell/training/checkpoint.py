"""Checkpoints of one run: a folder that others can load, and beside it what training needs to go on bit for bit.

`checkpoints/step-00000500/` holds the model's own folder (model.safetensors, config.json, vocabulary), `state.json`
(step, identity, sha256 of each file) and, in the newest two, `training_state.safetensors` (optimizer, data order,
generators). A folder appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.files import atomic_folder
from groundswell.protocols import Model
from groundswell.training.run import Run

log = logging.getLogger(__name__)
TRAINING_STATE = "training_state.safetensors"
KEEP_TRAINING_STATES = 2  # the newest, and the one before it in case the newest turns out damaged


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in checkpoints.glob("step-" + "[0-9]" * 8))


def save(
    checkpoints: Path,
    step: int,
    experiment: Experiment,
    weights: dict[str, Tensor],
    vocabulary: tuple[str, ...],
    training_state: dict[str, Tensor],
) -> Path:
    """Write one checkpoint."""
    target = checkpoints / folder_name(step)
    if target.exists():  # a damaged one that a resumed run writes again
        shutil.rmtree(target)
    with atomic_folder(target) as folder:
        experiment.model.save_folder(weights, folder, vocabulary)
        if training_state:  # runs over several workers keep theirs elsewhere
            save_file({name: tensor.contiguous() for name, tensor in training_state.items()}, folder / TRAINING_STATE)
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        state = {"step": step, "experiment": experiment.identity, "files": files}
        (folder / "state.json").write_text(json.dumps(state, indent=2))
    return target


def thin_out(run: Run) -> None:
    """Remove the checkpoints that need not stay, and all but the newest training states."""
    checkpoints = run.folder.checkpoints
    steps = list_steps(checkpoints)
    newest, kept = set(steps[-KEEP_TRAINING_STATES:]), run.kept_steps(steps)
    for step in steps:
        folder = checkpoints / folder_name(step)
        if step not in newest | kept:
            shutil.rmtree(folder, ignore_errors=True)
        elif step not in newest:
            (folder / TRAINING_STATE).unlink(missing_ok=True)


def load_weights(folder: Path, model: Model, vocab_size: int, max_length: int) -> dict[str, Tensor]:
    """One run's tensors. Raises ConfigError for a damaged or foreign folder."""
    _verify(folder, skip=(TRAINING_STATE,))
    return model.load_folder(folder, vocab_size, max_length)


def load_training(checkpoints: Path, step: int, experiment: Experiment) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> weights, training state. Raises ConfigError when anything about the folder is wrong."""
    folder = checkpoints / folder_name(step)
    state = _verify(folder)
    if state["experiment"] != experiment.identity:
        raise ConfigError(f"{folder}: belongs to another experiment")
    weights = experiment.model.load_folder(folder, experiment.task.vocab_size, experiment.task.max_length)
    return weights, load_file(folder / TRAINING_STATE)


def resumable_steps(checkpoints: Path, experiment: Experiment) -> list[int]:
    """Steps that training can go on from, newest first; damaged ones are passed over with a warning."""
    good = []
    for step in reversed(list_steps(checkpoints)):
        if not (checkpoints / folder_name(step) / TRAINING_STATE).exists():
            continue
        try:
            load_training(checkpoints, step, experiment)
        except (ConfigError, OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged, falling back to the one before: %s", folder_name(step), error)
            continue
        good.append(step)
    return good


def _verify(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder}: state.json cannot be read ({error})") from None
    for name, expected in state["files"].items():
        if name not in skip and _sha256(folder / name) != expected:
            raise ConfigError(f"{folder}/{name}: content differs from its checksum")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
