"""Recurrent decoders as folders: ours are config.json, model.safetensors, vocabulary.json; published ones are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundswell.config import ConfigError, import_path
from groundswell.protocols import Parameters, ParameterSpec
from models import huggingface, recurrent_original
from models.recurrent_parameters import TOKENS

if TYPE_CHECKING:
    from models.recurrent import RecurrentDecoder

# what only training or the initial values depend on
FREE_FIELDS = {
    "class",
    "num_recurrences",
    "num_recurrences_in_eval",
    "abacus_max_offset",
    "fire_max_length",
    "init",
    "init_std",
}


def write(model: RecurrentDecoder, parameters: Parameters, folder: Path, vocabulary: Sequence[str]) -> None:
    """Raises ConfigError where the vocabulary has more tokens than the embedding has rows."""
    rows = len(parameters[TOKENS])
    if len(vocabulary) > rows:
        raise ConfigError(
            f"vocabulary: {len(vocabulary)} tokens for {rows} embedding rows; build the model for this task"
        )
    config = {
        "architectures": [import_path(type(model))],
        "model_type": "groundswell_recurrent",
        "vocab_size": rows,
        huggingface.OURS: model.to_dict(),
    }
    huggingface.write_folder(folder, config, parameters, vocabulary)


def read(model: RecurrentDecoder, folder: Path, specs: Sequence[ParameterSpec]) -> dict[str, Tensor]:
    """One run's tensors. Raises ConfigError, which names the field or the tensor, for a folder of another network."""
    folder = Path(folder)
    if recurrent_original.is_original(folder):
        check(model, recurrent_original.fields_of_folder(folder), folder / recurrent_original.CONFIG)
        return recurrent_original.read_weights(model, folder, specs)
    config = huggingface.read_config(folder)
    if config.get("model_type") != "groundswell_recurrent":
        raise ConfigError(
            f"{folder / huggingface.CONFIG}: model_type '{config.get('model_type')}' is no recurrent decoder"
        )
    check(model, config[huggingface.OURS], folder / huggingface.CONFIG)
    return huggingface.read_weights(folder, specs, tied_head=False)


def check(model: RecurrentDecoder, fields: dict[str, Any], path: Path) -> None:
    """Raise ConfigError where a field that decides what the weights mean differs."""
    stored = type(model).from_dict({name: value for name, value in fields.items() if name != "class"})
    free = FREE_FIELDS if model.norm_scheme != "deepnorm" else FREE_FIELDS - {"num_recurrences"}
    for name in type(model).model_fields:
        theirs, ours = getattr(stored, name), getattr(model, name)
        if name in ("mlp_width", "embedding_width"):  # their defaults depend on the width
            resolved = {"mlp_width": "hidden_width", "embedding_width": "embedded_width"}[name]
            theirs, ours = getattr(stored, resolved), getattr(model, resolved)
        if name not in free and theirs != ours:
            raise ConfigError(f"{path}: {name} is {theirs} there and {ours} in the model; set model.{name}={theirs}")
