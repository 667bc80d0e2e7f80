"""Decoders as Hugging Face folders: config.json, model.safetensors, vocabulary.json.

A plain decoder is written as GPT2LMHeadModel. One that GPT-2 cannot express (looped, rotary, without LayerNorm) names
our class instead, so that no other library loads it as something it is not. Our own configuration is kept under
"groundswell".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groundswell.config import ConfigError, import_path
from groundswell.files import atomic_write
from groundswell.protocols import ParameterSpec
from models.layers import LAYER_NORM_EPS

if TYPE_CHECKING:
    from models.decoder import Decoder

CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.json"
OURS = "groundswell"
# settings that tensor shapes do not show, so that a mismatch would go unnoticed
SILENT_FIELDS = (
    "num_layers",
    "num_heads",
    "activation",
    "layer_norm",
    "tied_head",
    "position_encoding",
    "num_recurrences",
    "re_embed",
)
# settings that matter only together with another one
CONDITIONAL_FIELDS = {"re_embed_temperature": ("re_embed", True), "rotary_dim": ("position_encoding", "rotary")}
ACTIVATION_NAMES = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# GPT2Config switches that change what GPT-2 computes, with the value that is computed here
FIXED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": LAYER_NORM_EPS,
}
_CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # buffers that old releases stored


# ---- configuration ----


def to_config(decoder: Decoder, vocab_size: int, num_positions: int | None) -> dict[str, Any]:
    """GPT2Config's fields and, under "groundswell", our own."""
    plain = decoder.layer_norm and decoder.num_recurrences == 1 and decoder.position_encoding == "absolute"
    return {
        "architectures": ["GPT2LMHeadModel" if plain else import_path(type(decoder))],
        "model_type": "gpt2" if plain else "groundswell_decoder",
        "vocab_size": vocab_size,
        "n_positions": num_positions,
        "n_embd": decoder.width,
        "n_layer": decoder.num_layers,
        "n_head": decoder.num_heads,
        "n_inner": decoder.hidden_width,
        "activation_function": decoder.activation,
        "resid_pdrop": decoder.dropout,
        "embd_pdrop": decoder.dropout,
        "attn_pdrop": decoder.dropout,
        "initializer_range": decoder.init_std,
        "tie_word_embeddings": decoder.tied_head,
        "bos_token_id": None,
        "eos_token_id": None,
        **FIXED_SETTINGS,
        OURS: decoder.to_dict(),
    }


def read_config(
    folder: Path, name: str = CONFIG, remedy: str = "give a folder that save_folder or save_pretrained wrote"
) -> dict[str, Any]:
    """Raises ConfigError where the file is missing or no JSON object."""
    path = folder / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; {remedy}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the file again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a JSON object is expected")
    return config


def decoder_fields(folder: Path) -> dict[str, Any]:
    """Fields of `Decoder` for the network in a folder of ours or of Hugging Face. Raises ConfigError."""
    config, path = read_config(folder), folder / CONFIG
    try:
        if OURS in config:
            return config[OURS] | {"num_positions": config["n_positions"]}
        return _fields_of_gpt2(config, path)
    except KeyError as error:
        raise ConfigError(f"{path}: has no field {error}; it is not the config.json of a GPT-2") from None


def _fields_of_gpt2(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if config.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(
            f"{path}: model_type '{config['model_type']}' is not supported; give a GPT-2 folder (model_type gpt2)"
        )
    for name, value in FIXED_SETTINGS.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{path}: {name}={config[name]} is not supported; only {value} is")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATION_NAMES:
        raise ConfigError(
            f"{path}: activation_function '{activation}' is not supported; known: {', '.join(ACTIVATION_NAMES)}"
        )
    rates = [config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]  # 0.1: GPT2Config's default
    if len(set(rates)) > 1:
        raise ConfigError(f"{path}: resid_pdrop, embd_pdrop, attn_pdrop are {rates}; they must be equal here")
    return {
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "width": config["n_embd"],
        "mlp_width": config.get("n_inner"),
        "activation": ACTIVATION_NAMES[activation],
        "tied_head": config.get("tie_word_embeddings", True),
        "dropout": rates[0],
        "init_std": config.get("initializer_range", 0.02),
        "num_positions": config["n_positions"],
    }


def check_config(decoder: Decoder, folder: Path) -> None:
    """Raise ConfigError where the folder's network differs from `decoder` in a way that shapes do not show."""
    stored = type(decoder).from_dict(decoder_fields(folder))
    for name in SILENT_FIELDS:
        theirs, ours = getattr(stored, name), getattr(decoder, name)
        if theirs != ours:
            raise ConfigError(
                f"{folder / CONFIG}: {name} is {theirs} there and {ours} in the model; set model.{name}={theirs}"
            )
    for name, (other, value) in CONDITIONAL_FIELDS.items():
        theirs = getattr(stored, name)
        if getattr(decoder, other) == value and theirs != getattr(decoder, name):
            raise ConfigError(f"{folder / CONFIG}: {name} differs; set model.{name}={theirs}")


# ---- tensors ----


def write_folder(
    folder: Path, config: dict[str, Any], parameters: Mapping[str, Tensor], vocabulary: Sequence[str]
) -> None:
    """Write the three files, each atomically; config.json last, so that a folder with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    # copies: rows of a pack share one buffer, which safetensors refuses
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in parameters.items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    atomic_write(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    atomic_write(folder / VOCABULARY, json.dumps(list(vocabulary), ensure_ascii=False))
    atomic_write(folder / CONFIG, json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def read_weights(folder: Path, specs: Iterable[ParameterSpec], tied_head: bool) -> dict[str, Tensor]:
    """The tensors named by `specs`, float32 (float64 stays). Raises ConfigError where one is missing or misshapen.

    Takes the layouts of released GPT-2s: one file or shards, with or without the prefix "transformer.", any float type.
    """
    specs = list(specs)
    found = _read_files(folder, {spec.name for spec in specs})
    if tied_head and "lm_head.weight" in found:
        head, path = found.pop("lm_head.weight")
        table = found.get("transformer.wte.weight")
        if table is not None and not torch.equal(head, table[0]):
            raise ConfigError(f"{path}: lm_head.weight differs from the token embedding; set model.tied_head=false")
    weights = {}
    for spec in specs:
        if spec.name not in found:
            raise ConfigError(f"{folder}: tensor {spec.name} is missing; the folder holds another network")
        tensor, path = found.pop(spec.name)
        if tuple(tensor.shape) != spec.shape:
            remedy = "set the model's fields, or use the task, that the folder was written with"
            raise ConfigError(
                f"{path}: {spec.name} is {list(tensor.shape)}, the model needs {list(spec.shape)}; {remedy}"
            )
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {spec.name} is {tensor.dtype}; only floating-point weights can be loaded")
        weights[spec.name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    if found:
        name, (_, path) = next(iter(found.items()))
        raise ConfigError(f"{path}: tensor {name} is not part of the model; the folder holds another network")
    return weights


def _read_files(folder: Path, known: set[str]) -> dict[str, tuple[Tensor, Path]]:
    """Every tensor under its known name (released GPT-2s leave "transformer." out), with the file it came from."""
    paths = [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not paths[0].exists() and index.exists():
        paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    found: dict[str, tuple[Tensor, Path]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if not _CAUSAL_MASK.search(key):
                        name = f"transformer.{key}" if f"transformer.{key}" in known else key
                        found[name] = (file.get_tensor(key), path)
        except (OSError, SafetensorError) as error:
            remedy = "weights are read from safetensors only" if not path.exists() else "the file is damaged"
            raise ConfigError(f"{path}: cannot be read ({error}); {remedy}") from None
    return found
