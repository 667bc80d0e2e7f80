"""Student and emulator in one: question to states to answer, without a chain of thought (Deng et al. 2023, arXiv
2311.01460, section 3.3).

Shapes: K runs, B rows, T tokens, A answer positions, L layers, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from groundswell import stages
from groundswell.config import ConfigError
from groundswell.protocols import Parameters, ParameterSpec
from models import chain_student
from models.chain_emulator import MixtureSize, ThoughtEmulator, emulate, emulator_specs
from models.chain_model import ChainModel, NamedWeights, Start, network_settings, open_weights
from models.chain_student import MindReadingStudent, student_specs

Part = Literal["student", "emulator"]


def part_of(parameters: Parameters, part: Part) -> dict[str, Tensor]:
    """The tensors of one of the two, by its own names."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


class CoupledStudent(ChainModel):
    """An emulator and a student of one shape, trained on the answer alone; gradients reach the emulator through its
    states. Rows are of form none. An optimizer group with match=^emulator. and frozen=true trains the student only."""

    form = "none"

    student_folder: str = Field("", description="checkpoint of the student to start from; else it is drawn")
    emulator_folder: str = Field("", description="checkpoint of the emulator to start from; else it is drawn")
    mixture_size: MixtureSize = Field(1, description="of the emulator")
    softmax_temperature: float = Field(0.05, gt=0, description="of the emulator's softmax over mixture components")

    # ---- parameters ----

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        parts = self._parts(vocab_size, max_length)
        return [replace(spec, name=f"{part}.{spec.name}") for part, specs in parts.items() for spec in specs]

    def _parts(self, vocab_size: int, max_length: int) -> dict[Part, list[ParameterSpec]]:
        return {
            "student": student_specs(self.decoder, vocab_size, max_length),
            "emulator": emulator_specs(self.decoder, vocab_size, max_length, self.mixture_size),
        }

    def initial_weights(self, vocab_size: int, max_length: int) -> Start | None:
        """Of the two folders, each of ours or of the published code. They may have more positions than this task."""
        sources: dict[str, tuple[str, NamedWeights]] = {}
        for part, specs in self._parts(vocab_size, max_length).items():
            field = f"{part}_folder"
            folder = getattr(self, field)
            if folder:
                place = stages.resolve(folder)
                self._check_part(part, place, f"model.{field} ({folder})")
                reader = open_weights(place, specs, field)
                sources |= {f"{part}.{spec.name}": (spec.name, reader) for spec in specs}
        return Start(self.parameters(vocab_size, max_length), sources) if sources else None

    def _check_part(self, part: Part, folder: Path, where: str) -> None:
        """Raises ConfigError where the folder has another kind of network, or one that computes something else."""
        kinds = {"student": MindReadingStudent, "emulator": ThoughtEmulator}
        settings = network_settings(folder, kinds[part](decoder=self.decoder), where)
        temperature = settings.get("softmax_temperature", self.softmax_temperature)
        if part == "emulator" and self.mixture_size != 1 and temperature != self.softmax_temperature:
            raise ConfigError(
                f"model.softmax_temperature is {self.softmax_temperature}, in {where} it is {temperature}; set "
                f"model.softmax_temperature={temperature}"
            )

    # ---- forward passes ----

    def states(self, parameters: Parameters, tokens: Tensor, places: Tensor) -> Tensor:
        """tokens [K, B, T], places of the separators [K, B] -> the emulator's states [K, B, L, d]."""
        emulator = part_of(parameters, "emulator")
        return emulate(self.decoder, emulator, tokens, places, self.softmax_temperature).states

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, T] of question and answer, positions [K, B, A] from the separator on -> [K, B, A, V]."""
        states = self.states(parameters, tokens, positions[..., 0])
        length = int(positions.max()) + 1
        student = part_of(parameters, "student")
        return chain_student.answer_logits(self.decoder, student, tokens[:, :, :length], positions, states)

    @torch.no_grad()
    def generate(
        self, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        """As `Model.generate`, with one pass of the emulator; prompts [K, B, P] end with the separator."""
        last = torch.full_like(prompts[..., 0], prompts.shape[-1] - 1)
        states = self.states(parameters, prompts, last)
        student = part_of(parameters, "student")
        return chain_student.generate(self.decoder, student, prompts, states, num_tokens, stop_token)

    def flops_per_example(self, vocab_size: int, length: int, num_answers: int) -> float:
        """Of both decoders on a whole row; the emulator computes the question only."""
        return 2 * super().flops_per_example(vocab_size, length, num_answers)
