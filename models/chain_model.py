"""What the networks of an implicit chain of thought share: a decoder, its folder, and the teacher's states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from groundswell import stages
from groundswell.config import CLASS_KEY, ConfigError, import_path
from groundswell.protocols import Model, Parameters, ParameterSpec, Task
from models import chain_original, huggingface
from models.chain_original import StateDict, is_original
from models.chain_states import Delta, Separators, Subset, check_delta, find_separators, state_positions
from models.chain_teacher import Outline, read_outline, teacher_in, teacher_outline
from models.decoder import WPE, Decoder
from models.objectives import AnswerLoss
from models.weight_files import WeightFiles

if TYPE_CHECKING:
    from groundswell.experiment import Experiment
    from groundswell.planning.strategies import PlanExtras

MEGABYTE = 10**6


class NamedWeights(Protocol):
    """Tensors of a folder with their shapes, read one at a time or in parts."""

    def path(self, name: str) -> Path: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = slice(None)) -> Tensor: ...


def open_weights(folder: Path, specs: Sequence[ParameterSpec], field: str) -> NamedWeights:
    """The tensors of a folder of ours, of Hugging Face or of the published code. There may be more positions than the
    specs have. Raises ConfigError, which names `field`, where it holds another network."""
    names = [spec.name for spec in specs]
    reader: NamedWeights = StateDict(folder, names) if is_original(folder) else WeightFiles(folder, names)
    for spec in specs:
        shape = reader.shape(spec.name)
        if shape != spec.shape and not (spec.name == WPE and shape[0] >= spec.shape[0] and shape[1:] == spec.shape[1:]):
            raise ConfigError(
                f"model.{field}: {spec.name} in {reader.path(spec.name)} is {list(shape)}, the model needs "
                f"{list(spec.shape)}; set the model's fields as they were when it was trained"
            )
    return reader


class Start:
    """Initial weights: from folders where they have them, else drawn by the specs."""

    def __init__(self, specs: Sequence[ParameterSpec], sources: Mapping[str, tuple[str, NamedWeights]]) -> None:
        """`sources`: name of a tensor -> its name in a folder, the folder's tensors."""
        self._sizes, self._sources = {spec.name: spec.shape[0] for spec in specs}, sources

    def read(self, name: str, rows: slice = slice(None)) -> Tensor | None:
        if name not in self._sources:
            return None
        stored, reader = self._sources[name]
        return reader.read(stored, slice(*rows.indices(self._sizes[name])[:2]))  # the folder may have more positions


def linear_specs(name: str, num_inputs: int, num_outputs: int) -> list[ParameterSpec]:
    """Weight [o, i] and bias of a torch.nn.Linear. Drawn with its variance 1 / (3 i), but normal, not uniform."""
    std = 1 / math.sqrt(3 * num_inputs)
    return [
        ParameterSpec(f"{name}.weight", (num_outputs, num_inputs), True, std),
        ParameterSpec(f"{name}.bias", (num_outputs,), False, std),
    ]


def mlp_specs(name: str, num_inputs: int, width: int) -> list[ParameterSpec]:
    """Linear to 4 * width, ReLU, linear to width, numbered as in a torch.nn.Sequential."""
    return linear_specs(f"{name}.0", num_inputs, 4 * width) + linear_specs(f"{name}.2", 4 * width, width)


class ChainModel(Model):
    """A decoder whose states at a separator are overwritten, layer by layer. Without dropout, as published: the
    decoder's is not used."""

    form: ClassVar[str]  # of the task's rows
    teacher_passes: ClassVar[int] = 0  # in a step

    decoder: Decoder = Field(Decoder(), description="shape of the network, and how its weights are drawn")

    @model_validator(mode="after")
    def _check_decoder(self) -> ChainModel:
        if self.decoder.num_recurrences > 1:
            raise ValueError("decoder.num_recurrences must be 1: each layer has a state of its own")
        return self

    def check(self, task: Task) -> None:
        form, name = getattr(task, "form", None), type(self).__name__
        if form != self.form:
            has = "has no chain of thought" if form is None else f"is of form {form}"
            raise ValueError(
                f"task.form: {name} reads rows of form {self.form}, task {type(task).__name__} {has}; set "
                f"task.form={self.form}, with a task of chain_of_thought"
            )
        positions = self.decoder.num_positions
        if positions is not None and positions < task.max_length:
            raise ValueError(
                f"model.decoder.num_positions {positions} is less than the task's {task.max_length} tokens; set "
                f"model.decoder.num_positions={task.max_length} or leave it out"
            )

    def network(self, vocab_size: int, max_length: int) -> Any:
        from groundswell.scaling.network import FunctionalNetwork

        return FunctionalNetwork(self, self.parameters(vocab_size, max_length))

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Of the decoder on a whole row, which is more than is computed of it."""
        return self.decoder.flops_per_example(vocab_size, length, num_answers)

    def stand_in(self, experiment: Experiment) -> tuple[Experiment, PlanExtras]:
        """The decoder on whole rows, which is more than is computed of it, and the parameters beside it."""
        from groundswell.planning.strategies import Extra
        from tasks.random_tokens import RandomTokens

        task, decoder = experiment.task, self.decoder.with_overrides({"dropout": 0.0})
        sizes = task.vocab_size, task.max_length
        numbers = [
            sum(math.prod(spec.shape) for spec in model.parameters(*sizes) if spec.trained) for model in (self, decoder)
        ]
        flops = (self.flops_per_example(*sizes, task.num_answers), decoder.flops_per_example(*sizes, task.num_answers))
        extra = Extra(
            type(self).__name__,
            trained_parameters=max(0, numbers[0] - numbers[1]),
            flops_per_example=3 * (flops[0] - flops[1]),
            forwards=self.teacher_passes,
        )
        tokens = RandomTokens(
            vocabulary=sizes[0], length=sizes[1], answers=task.num_answers, num_examples=task.num_train or 1
        )
        changes = {"task": tokens, "model": decoder, "objective": AnswerLoss(), "optimizer.groups": ()}
        return experiment.with_overrides(changes), lambda *_: extra

    # ---- folders ----

    def save_folder(self, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
        """Write config.json, model.safetensors and vocabulary.json."""
        config = {
            "architectures": [import_path(type(self))],
            "model_type": f"groundswell_{self.form}_chain",
            huggingface.OURS: self.to_dict(),
        }
        huggingface.write_folder(folder, config, parameters, vocabulary)

    def load_folder(self, folder: Path, vocab_size: int, max_length: int) -> dict[str, Tensor]:
        """Tensors of a folder that `save_folder` wrote. Raises ConfigError for one of another network."""
        check_checkpoint(Path(folder), self, str(folder))
        return huggingface.read_weights(Path(folder), self.parameters(vocab_size, max_length), tied_head=False)


def check_checkpoint(folder: Path, model: ChainModel, where: str) -> Mapping[str, Any]:
    """-> settings in a folder that a model of this class wrote. Raises ConfigError where it holds another network in a
    way that shapes do not show; `where` begins the message."""
    config = huggingface.read_config(folder)
    stored = config.get(huggingface.OURS, {})
    name = import_path(type(model))
    if stored.get(CLASS_KEY) != name:
        raise ConfigError(f"{where}: holds {stored.get(CLASS_KEY, 'another network')}, not {name}; give a folder of it")
    check_decoder(Decoder.from_dict(stored["decoder"]), model.decoder, where)
    return stored


def check_decoder(
    theirs: Decoder, ours: Decoder, where: str, fields: Sequence[str] = huggingface.SILENT_FIELDS
) -> None:
    """Raise ConfigError, which names the field, where two decoders compute different things."""
    for name in fields:
        found, expected = getattr(theirs, name), getattr(ours, name)
        if found != expected:
            raise ConfigError(
                f"model.decoder.{name} is {expected}, in {where} it is {found}; set model.decoder.{name}={found}"
            )


def decoder_start(folder: str, decoder: Decoder, specs: Sequence[ParameterSpec]) -> dict[str, tuple[str, NamedWeights]]:
    """Sources of `Start` for the decoder's tensors. Raises ConfigError for a folder of another network."""
    path = stages.resolve(folder)
    if not path.exists():
        raise ConfigError(f"model.start: {folder} does not exist; give the folder of a GPT-2, or leave it out")
    check_decoder(read_outline(path).decoder, decoder, f"model.start ({folder})")
    reader = open_weights(path, specs, "start")
    return {spec.name: (spec.name, reader) for spec in specs}


class Taught(NamedTuple):
    """What is read of a teacher for rows of question, chain and answer."""

    separators: Separators
    places: Tensor  # [K, B, L], of the states in the rows
    states: Tensor  # [K, B, L, d]


class TaughtModel(ChainModel):
    """One that is trained with the states of a frozen teacher, which reads question and chain."""

    form = "hidden"
    teacher_passes = 1

    start: str = Field("", description="folder of a GPT-2 that the decoder starts from; else it is drawn")
    teacher: str = Field("", description="folder of the teacher: a checkpoint of ours, a GPT-2, or a released one")
    delta: Delta = Field("dynamic", description="places between the states of two layers; dynamic: the whole chain's")
    subset: Subset = Field("diagonal", description="which states of the grid of layers and places are read")
    seed_compat: bool = Field(
        False, description="the first row's dynamic delta serves the whole batch, as in the published code"
    )
    cache_megabytes: int = Field(
        512, ge=0, description="memory for the teacher's states of training examples; 0: computed at every visit"
    )

    @model_validator(mode="after")
    def _check_delta(self) -> TaughtModel:
        check_delta(self.delta, self.decoder.num_layers, self.subset)
        return self

    def check(self, task: Task) -> None:
        super().check(task)
        self._check_chain(task)
        if not self.teacher or not stages.is_there(self.teacher):
            return  # an earlier stage or another machine has it; a run fails for want of it
        outline = teacher_outline(self.teacher)
        self._check_teacher(outline)
        if outline.vocab_size < task.vocab_size:
            raise ValueError(
                f"model.teacher: has {outline.vocab_size} tokens, the task {task.vocab_size}; give a teacher of this "
                "task, or the task the teacher's tokenizer"
            )
        positions = outline.decoder.num_positions
        if outline.decoder.position_encoding == "absolute" and positions and positions < task.max_length:
            raise ValueError(
                f"model.teacher: has {positions} positions, less than the task's {task.max_length} tokens; give a "
                "teacher of this task"
            )

    def _check_chain(self, task: Task) -> None:
        """Of the second layer's state at least."""
        widths = getattr(task, "widths", None)
        longest = widths().chain if callable(widths) else None
        if longest is not None and isinstance(self.delta, int) and self.delta > longest:
            raise ValueError(
                f"model.delta {self.delta} is beyond the longest chain, whose end is {longest} tokens after its start; "
                "take fewer, or dynamic"
            )

    def _check_teacher(self, outline: Outline) -> None:
        check_decoder(outline.decoder, self.decoder, f"model.teacher ({self.teacher})", ("num_layers", "width"))

    def taught(self, tokens: Tensor, positions: Tensor) -> Taught:
        """tokens [K, B, T] of question, chain and answer, positions [K, B, A] from the second separator on.

        Raises ConfigError without a teacher of the decoder's depth and width, and for a row without a chain's end.
        """
        teacher = teacher_in(self.teacher, tokens.device)
        self._check_teacher(Outline(teacher.decoder, 0))
        separators = find_separators(tokens, positions)
        places = state_positions(
            *separators, self.decoder.num_layers, self.delta, self.subset, per_row=not self.seed_compat
        )
        # in training alone: evaluation's examples are many and come in the same batches
        budget = self.cache_megabytes * MEGABYTE if torch.is_grad_enabled() else 0
        return Taught(separators, places, teacher.states(tokens, places, self.subset, budget))

    def initial_weights(self, vocab_size: int, max_length: int) -> Start | None:
        if not self.start:
            return None
        sources = decoder_start(self.start, self.decoder, self.decoder.parameters(vocab_size, max_length))
        return Start(self.parameters(vocab_size, max_length), sources)


def network_settings(folder: Path, model: ChainModel, where: str) -> Mapping[str, Any]:
    """Settings of a network in a folder of ours or of the published code, as the model's class has them.

    Raises ConfigError where its decoder is another one than the model's.
    """
    if not folder.exists():
        raise ConfigError(f"{where} does not exist; give a checkpoint folder")
    if not is_original(folder):
        return check_checkpoint(folder, model, where)
    check_decoder(chain_original.decoder_of(folder)[0], model.decoder, where)
    return huggingface.read_config(folder)
