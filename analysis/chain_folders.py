"""Evaluation of the networks of implicit chain of thought in folders as the published code writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.chain_of_thought import ChainOfThoughtEvaluation
from analysis.circuit_evaluation import choose_split
from groundswell.config import ConfigError
from groundswell.probes import Findings
from groundswell.protocols import Model, ParameterSpec
from models import chain_original, huggingface
from models.chain_coupled import CoupledStudent
from models.chain_emulator import emulator_specs
from models.chain_model import check_decoder, open_weights
from models.chain_student import MindReadingStudent, student_specs
from models.chain_teacher import teacher_in
from tasks.chain_files import ChainFiles

Opened = tuple[Model, Mapping[str, Tensor]]  # parameters [1, *shape]


def evaluate_folders(
    lines: str | Path,
    tokenizer: str | Path,
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    emulator: str | Path | None = None,
    probe: ChainOfThoughtEvaluation | None = None,
    **fields: Any,
) -> Findings:
    """On a file of `question||chain #### answer` lines. `teacher` alone writes chains; `student` with `teacher` reads
    its true states, which `fields` choose (delta, subset); `student` with `emulator` answers alone.

    Raises ConfigError for another choice of folders, and for what they hold.
    """
    path, probe = Path(lines), probe or ChainOfThoughtEvaluation()
    given = {"teacher": teacher, "student": student, "emulator": emulator}
    folders = {name: Path(folder) for name, folder in given.items() if folder is not None}
    form, (model, parameters) = _open(folders, fields)
    names = dict.fromkeys(("train", "validation", "test"), path.name)
    task = ChainFiles.from_dict({"path": str(path.parent), "form": form, "tokenizer": str(tokenizer), **names})
    split = choose_split(task.build(), probe.split, probe.max_examples)
    return probe.evaluate(probe.answerer(model, parameters, task), split, task.texts(probe.split)[: len(split)])


def _open(folders: Mapping[str, Path], fields: Mapping[str, Any]) -> tuple[str, Opened]:
    """-> form of the rows, the network."""
    for name, folder in folders.items():
        if not (folder / huggingface.CONFIG).is_file():
            raise ConfigError(f"{name} {folder}: has no {huggingface.CONFIG}; give a checkpoint folder")
    if folders.keys() == {"teacher"}:
        network = teacher_in(str(folders["teacher"]), torch.device("cpu"))
        return "explicit", (network.decoder, network.parameters)
    if folders.keys() == {"teacher", "student"}:
        return "hidden", _student(folders["student"], {"teacher": str(folders["teacher"]), **fields})
    if folders.keys() == {"student", "emulator"}:
        return "none", _coupled(folders["student"], folders["emulator"])
    given = ", ".join(folders) or "no folder"
    raise ConfigError(f"{given}: give teacher, teacher and student, or student and emulator")


def _student(folder: Path, fields: Mapping[str, Any]) -> Opened:
    decoder, vocab_size = chain_original.decoder_of(folder)
    model = MindReadingStudent.from_dict({"decoder": decoder.to_dict(), **fields})
    return model, _read(folder, student_specs(decoder, vocab_size, decoder.num_positions or 0), "student")


def _coupled(student: Path, emulator: Path) -> Opened:
    decoder, vocab_size = chain_original.decoder_of(student)
    config = huggingface.read_config(emulator)
    found = {
        "mixture_size": config.get("mixture_size", 1),
        "softmax_temperature": config.get("softmax_temperature", 0.05),  # the published default
    }
    model = CoupledStudent.from_dict({"decoder": decoder.to_dict(), **found})
    check_decoder(chain_original.decoder_of(emulator)[0], decoder, f"emulator ({emulator})")
    sizes = vocab_size, decoder.num_positions or 0
    parts = {
        "student": _read(student, student_specs(decoder, *sizes), "student"),
        "emulator": _read(emulator, emulator_specs(decoder, *sizes, model.mixture_size), "emulator"),
    }
    return model, {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}


def _read(folder: Path, specs: Sequence[ParameterSpec], name: str) -> dict[str, Tensor]:
    weights = open_weights(folder, specs, name)
    return {spec.name: weights.read(spec.name)[None] for spec in specs}
