"""The recorded networks and batches of the published code of implicit chain of thought."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from groundswell.protocols import IGNORE, Answer, Split
from models import chain_original
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_student import MindReadingStudent
from models.decoder import HEAD, Decoder

FOLDER = Path(__file__).parents[1] / "golden" / "implicit_cot"
CASES = ("mult4", "mixed", "gsm8k")
SEPARATOR = 1
ANSWER = Answer(slice(None))


@cache
def expected() -> Any:
    return json.loads((FOLDER / "tiny_expected.json").read_text())


@cache
def positions_cases() -> Any:
    return json.loads((FOLDER / "teacher_positions.json").read_text())


@cache
def arrays() -> Mapping[str, Tensor]:
    with np.load(FOLDER / "tiny_io.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def array(case: str, name: str) -> Tensor:
    return arrays()[f"{case}/{name}"]


@cache
def tensors(network: str) -> Mapping[str, Tensor]:
    """One network under our names: teacher, student, emulator_k1 or emulator_k5."""
    stored, start = load_file(FOLDER / "tiny_models.safetensors"), f"{network}."
    found = {key.removeprefix(start): value for key, value in stored.items() if key.startswith(start)}
    return {key.removeprefix(chain_original.BASE): value for key, value in found.items()}


def parameters(network: str) -> dict[str, Tensor]:
    """As a pack of one run has them, with gradients."""
    return {name: value[None].clone().requires_grad_() for name, value in tensors(network).items()}


def coupled_parameters(components: int) -> dict[str, Tensor]:
    parts = {"student": parameters("student"), "emulator": parameters(f"emulator_k{components}")}
    return {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}


def decoder() -> Decoder:
    config = json.loads((FOLDER / "tiny_gpt2_config.json").read_text())
    return Decoder(
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        width=config["n_embd"],
        num_positions=config["n_positions"],
        dropout=config["resid_pdrop"],
        init_std=config["initializer_range"],
    )


def write_base(folder: Path) -> Path:
    """The base model's folder, which the networks' configurations name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((FOLDER / "tiny_gpt2_config.json").read_text())
    return folder


def write_released(network: str, folder: Path) -> Path:
    """A folder as the published code writes them, old causal masks included."""
    stored = {
        f"{chain_original.BASE * name.startswith('transformer.')}{name}": value
        for name, value in tensors(network).items()
    }
    stored["base_model.lm_head.weight"] = stored["base_model.transformer.wte.weight"]
    for layer in range(decoder().num_layers):
        stored[f"base_model.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 160, 160, dtype=torch.uint8)
        stored[f"base_model.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stored, folder / "state_dict.bin")
    config = {"base_model": str(write_base(folder.parent / "base")), "tokenizer_name": "gpt2"}
    if network.startswith("emulator"):
        config |= {"mixture_size": int(network[-1]), "softmax_temperature": 0.05}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_teacher(folder: Path) -> Path:
    """The teacher as a checkpoint of ours."""
    values = {name: value for name, value in tensors("teacher").items() if name != HEAD}
    decoder().save_folder(values, folder, [str(token) for token in range(len(values["transformer.wte.weight"]))])
    return folder


def student(teacher: Path, **fields: Any) -> MindReadingStudent:
    return MindReadingStudent(decoder=decoder(), teacher=str(teacher), **fields)


def emulator(teacher: Path, components: int, **fields: Any) -> ThoughtEmulator:
    return ThoughtEmulator(decoder=decoder(), teacher=str(teacher), mixture_size=components, **fields)


def coupled(components: int, **fields: Any) -> CoupledStudent:
    return CoupledStudent(decoder=decoder(), mixture_size=components, **fields)


def _columns(tokens: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Positions and targets from separator `number` (from 0) of each row to the next one, as a task has them."""
    places = [row.eq(SEPARATOR).nonzero().flatten()[number : number + 2].tolist() for row in tokens]
    most = max(end - start for start, end in places)
    positions = torch.tensor([[min(start + n, end) for n in range(most)] for start, end in places])
    counted = torch.tensor([[n < end - start for n in range(most)] for start, end in places])
    positions = torch.where(counted, positions, positions[:, :1])
    return positions, tokens.gather(1, positions + 1).masked_fill(~counted, IGNORE)


def hidden_batch(case: str) -> Split:
    tokens = array(case, "input_ids_all")
    return Split(*(x[None] for x in (tokens, *_columns(tokens, 1))))


def none_batch(case: str) -> Split:
    tokens = array(case, "input_ids_nocot")
    return Split(*(x[None] for x in (tokens, *_columns(tokens, 0))))


def explicit_batch(case: str) -> Split:
    """The teacher's: all from the first separator on."""
    batch = hidden_batch(case)
    chain, targets = _columns(batch.tokens[0], 0)
    return Split(
        batch.tokens, torch.cat([batch.positions, chain[None]], 2), torch.cat([batch.targets, targets[None]], 2)
    )


def every_position(tokens: Tensor, start: Tensor) -> Tensor:
    """Positions [K, B, T] of all tokens, the one in `start` [K, B] first."""
    order = torch.arange(tokens.shape[-1]).expand_as(tokens)
    return torch.where(order == 0, start.unsqueeze(-1), order - (order <= start.unsqueeze(-1)).long())


def norm(values: Mapping[str, Tensor], prefix: str = "") -> float:
    grads = [value.grad for name, value in values.items() if name.startswith(prefix) and value.grad is not None]
    return float(torch.stack([grad.norm() for grad in grads]).norm())
