"""Run folders as training leaves them, for the tests of tracking and of the commands."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from groundswell import AdamW, Budget, Experiment
from groundswell.files import atomic_folder, atomic_write
from groundswell.rundir import RunFolder, SweepFolder
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.modular_arithmetic import ModularArithmetic

START_MS = 1_750_000_000_000


def sample_experiment(num_layers: int = 2, weight_decay: float = 0.1, seed: int = 1) -> Experiment:
    return Experiment(
        task=ModularArithmetic(modulus=23),
        model=Decoder(num_layers=num_layers, width=32),
        objective=AnswerLoss(),
        optimizer=AdamW(weight_decay=weight_decay),
        budget=Budget(steps=500, batch_size=64),
        seed=seed,
    )


def make_sweep(output: Path, name: str = "demo") -> SweepFolder:
    sweep = SweepFolder(output / name)
    description = {
        "name": name,
        "metric": "eval/test/accuracy",
        "mode": "max",
        "axes": {"model.num_layers": {"values": [2, 4]}, "optimizer.weight_decay": {"values": [0.1, 0.3]}},
    }
    atomic_write(sweep.path / "sweep.json", json.dumps(description))
    return sweep


def make_run(
    sweep: SweepFolder, number: int, num_layers: int = 2, weight_decay: float = 0.1, seed: int = 1
) -> RunFolder:
    experiment = sample_experiment(num_layers, weight_decay, seed)
    folder = sweep.run(experiment.run_id)
    axes = {"model.num_layers": num_layers, "optimizer.weight_decay": weight_decay, "seed": seed}
    name = f"num_layers={num_layers} weight_decay={weight_decay:g} seed={seed}"
    folder.write_new(experiment, name, axes, pack="pack0", number=number)
    return folder


def sample_metrics(step: int, speed: float = 1.0) -> dict[str, float]:
    """Memorising first, then generalising."""
    learned, grokked = 1 - math.exp(-step * speed / 60), 1 / (1 + math.exp(-(step * speed - 300) / 30))
    metrics = {"train/loss": 3 * (1 - learned) + 0.01, "train/grad_norm": 1.0, "perf/steps_per_s": 210.0}
    if step % 50 == 0:
        metrics |= {"eval/train/accuracy": learned, "eval/test/accuracy": grokked}
    return metrics


def train(
    folder: RunFolder, first: int, last: int, every: int = 10, speed: float = 1.0, time_ms: int = START_MS
) -> None:
    """Readings of steps first, first + every, ..., last."""
    folder.update_status(state="running", step=first, started_ms=folder.status().started_ms or START_MS)
    for step in range(first, last + 1, every):
        folder.append_metrics(step, sample_metrics(step, speed), time_ms=time_ms + 100 * step)
    folder.sync_journal()


def save_checkpoint(folder: RunFolder, step: int, training_state: bool = True) -> None:
    """As training does: the new one can be resumed from, the one before its predecessor no more."""
    with atomic_folder(folder.checkpoint_folder(step)) as target:
        weights = {"token_embedding": np.full((24, 32), step, dtype=np.float32)}
        save_file(weights, target / "model.safetensors")
        (target / "config.json").write_text('{"width": 32}')
        (target / "state.json").write_text(json.dumps({"step": step}))
        if training_state:
            save_file(weights, target / "training_state.safetensors")
    for old in folder.checkpoint_steps()[:-2]:
        (folder.checkpoint_folder(old) / "training_state.safetensors").unlink(missing_ok=True)


def end(folder: RunFolder, state: str = "finished", step: int = 500, **fields: str) -> None:
    folder.update_status(state=state, step=step, ended_ms=START_MS + 100 * step, **fields)


def whole_run(sweep: SweepFolder, number: int, state: str = "finished", **axes: float) -> RunFolder:
    folder = make_run(sweep, number, **axes)  # type: ignore[arg-type]
    train(folder, 0, 500)
    for step in (250, 500):
        save_checkpoint(folder, step)
    end(folder, state)
    return folder
