"""Checkpoint folders of the published code of implicit chain of thought (Deng et al. 2023, arXiv 2311.01460).

A folder has config.json (base_model, tokenizer_name, and of an emulator mixture_size and softmax_temperature) and
state_dict.bin, whose names are ours but for the prefix "base_model." of the decoder.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import atomic_write
from models import huggingface
from models.decoder import HEAD, WPE, WTE, Decoder

STATES, BASE, COMPONENTS = "state_dict.bin", "base_model.", "mixture_components.weight"
TOKENIZER = "gpt2"  # what the published configurations name
# Released sizes of GPT-2 all have heads of 64 dimensions (Radford et al. 2019, table 2).
RELEASED, HEAD_WIDTH = re.compile(r"(openai-community/)?(gpt2(-medium|-large|-xl)?|distilgpt2)"), 64
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$")  # causal masks that older releases of transformers stored


def is_original(folder: Path) -> bool:
    return (folder / STATES).exists()


class StateDict:
    """Tensors of such a folder under our names, read as `models.weight_files.WeightFiles` reads those of others."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Raises ConfigError where a tensor is missing, or where there is one that is not among `names`."""
        self.file, self._tensors = folder / STATES, read_tensors(folder)
        wanted = set(names)
        for name in sorted(wanted - self._tensors.keys()):
            raise ConfigError(f"{self.file}: tensor {name} is missing; the folder holds another network")
        for name in sorted(self._tensors.keys() - wanted - {HEAD}):
            raise ConfigError(f"{self.file}: tensor {name} is not part of the model; the folder holds another network")

    def path(self, name: str) -> Path:
        return self.file

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        tensor = self._tensors[name][rows]
        return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor under our name. Raises ConfigError for a file that is damaged or holds more than tensors."""
    path = folder / STATES
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        names = {name.removeprefix(BASE): tensor for name, tensor in stored.items() if not _BUFFER.search(name)}
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); it is damaged or no file of plain tensors") from None
    if HEAD in names and not torch.equal(names[HEAD], names[WTE]):
        raise ConfigError(f"{path}: lm_head.weight differs from the token embedding; only tied ones are supported")
    return names


def decoder_of(folder: Path) -> tuple[Decoder, int]:
    """The decoder in a folder, and its vocabulary's size. Raises ConfigError where base_model, which decides the number
    of heads, is neither a GPT-2 as released nor a local folder."""
    tensors = read_tensors(folder)
    name = str(huggingface.read_config(folder).get("base_model"))
    vocab_size, width = tensors[WTE].shape
    found = {
        "num_layers": 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("transformer.h.")),
        "width": width,
        "num_positions": len(tensors[WPE]),
    }
    if (Path(name) / huggingface.CONFIG).exists():
        return Decoder.from_dict(huggingface.decoder_fields(Path(name)) | found), vocab_size
    if not RELEASED.fullmatch(name):
        raise ConfigError(
            f"{folder / huggingface.CONFIG}: base_model '{name}' is no local folder; it decides the number of heads: "
            "write gpt2, gpt2-medium, gpt2-large, gpt2-xl or the folder of a GPT-2"
        )
    return Decoder.from_dict(found | {"num_heads": width // HEAD_WIDTH, "dropout": 0.1}), vocab_size


def write_original(
    folder: Path, parameters: Mapping[str, Tensor], base_model: str, settings: Mapping[str, Any] | None = None
) -> None:
    """Write one network (tensors [*shape] under our names) so that the published code loads it. `settings`: what
    config.json has besides, as mixture_size and softmax_temperature. Raises ConfigError for an untied head."""
    if HEAD in parameters:
        raise ConfigError(f"{folder}: the published code has tied heads only; train with model.decoder.tied_head=true")
    tensors = {
        f"{BASE * name.startswith('transformer.')}{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in parameters.items()
    }
    tensors[BASE + HEAD] = tensors[BASE + WTE]
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / STATES, buffer.getvalue())
    config = {"base_model": base_model, "tokenizer_name": TOKENIZER, **(settings or {})}
    atomic_write(folder / huggingface.CONFIG, json.dumps(config, indent=2) + "\n")


def export_checkpoint(checkpoint: Path, folder: Path, base_model: str) -> None:
    """Write a checkpoint folder of ours (teacher, student or emulator) as one that the published code loads; of a
    coupled student two, in folder/student and folder/emulator. `base_model`: name of a released GPT-2 of this shape, or
    the local folder of one. Raises ConfigError where the checkpoint cannot be read or has an untied head."""
    settings = huggingface.read_config(checkpoint).get(huggingface.OURS, {})
    try:
        tensors = load_file(checkpoint / huggingface.WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{checkpoint}: cannot be read ({error}); give a checkpoint folder") from None
    parts = {name.split(".")[0] for name in tensors} & {"student", "emulator"}
    for part in sorted(parts) or [""]:
        start = f"{part}." if part else ""
        own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        mixture = {}
        if COMPONENTS in own:
            mixture = {"mixture_size": len(own[COMPONENTS]), "softmax_temperature": settings["softmax_temperature"]}
        write_original(folder / part, own, base_model, mixture)
