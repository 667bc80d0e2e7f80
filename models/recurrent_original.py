"""Checkpoints of the published code (github.com/mcleish7/arithmetic): its configuration and weights in our terms.

A folder holds model_config.json (or the tensors' file alone, where the configuration is known) and model.safetensors or
state_dict.pth. Names may carry `_orig_mod.`, which torch.compile leaves. Matrices are stored [out, in] there, attention
as one matrix: thirds q|k|v (`type: pytorch`) or such triplets head by head (`type: self-attention`).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import ParameterSpec
from models.huggingface import read_config

if TYPE_CHECKING:
    from models.recurrent_settings import RecurrentSettings

CONFIG = "model_config.json"
WEIGHT_FILES = ("model.safetensors", "state_dict.pth")
NORMS = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "ScaleNorm": "scale_norm"}
POSITIONS = {
    "None": "null",
    "abacus": "abacus",
    "learned": "learned",
    "sinusoidal": "sinusoidal",
    "scaled-sinusoidal": "scaled_sinusoidal",
}
ROTARY = {False: "null", True: "rotary", "fire": "fire", "llama": "rotary_interleaved"}
# buffers and constants, which hold nothing that was trained
_BUFFERS = re.compile(r"\.(position_ids|norm_factor|inv_freq|init_L)$")
# one of theirs -> ours; layers are numbered by what stands before
_NAMES = (
    (r"^encoder\.embedding\.word_embedding\.", "embedding.token."),
    (r"^encoder\.embedding\.pos_embedding\.embedding\.", "embedding.position."),
    (r"^encoder\.embedding\.pos_embedding\.scale_factor$", "embedding.position.scale"),
    (r"^encoder\.embedding\.norm\.", "embedding.norm."),
    (r"^encoder\.adapter\.", "embedding.adapter."),
    (r"^encoder\.(head|final_norm)\b", r"\1"),
    (r"^encoder\.recurrent_blocks\.(\d+)\.layers\.0\.", r"layers.\1."),
    (r"^encoder\.recurrent_blocks\.(\d+)\.(adapter|ffn)\.", r"layers.\1.injection."),
    (r"^encoder\.recurrent_block\.(adapter|ffn)\.", "injection."),
    (r"^encoder\.(recurrent_block\.)?layers\.", "layers."),
    (r"^adapter\.", "output_adapter."),
    (r"^(layers\.\d+\.)attn\.attn\.", r"\1attn."),
    (r"^layers\.(\d+)\.attn\.rotary_emb\.c$", r"fire.\1.c"),
    (r"^layers\.(\d+)\.attn\.rotary_emb\.L_multiplier$", r"fire.\1.multiplier"),
    (r"^layers\.(\d+)\.attn\.rotary_emb\.mlp\.0\.", r"fire.\1.hidden."),
    (r"^layers\.(\d+)\.attn\.rotary_emb\.mlp\.2\.", r"fire.\1.output."),
    (r"\.attn\.out_proj\.", ".attention.output."),
    (r"\.ffn\.", ".mlp."),
    (r"\.residual1\.norm2\.", ".attention_norm_after."),
    (r"\.residual2\.norm2\.", ".mlp_norm_after."),
    (r"\.residual1\.norm\.", ".attention_norm."),
    (r"\.residual2\.norm\.", ".mlp_norm."),
    (r"\.dense_in\.", ".up."),
    (r"\.dense_out\.", ".down."),
    (r"\.learnable_scale$", ".weight"),
)
_PACKED = re.compile(r"^(layers\.\d+)\.attn\.in_proj_(weight|bias)$")
_TABLES = ("embedding.token.", "embedding.position.", "decoder.", "output_adapter.")  # laid out as ours are


def is_original(folder: Path) -> bool:
    return (folder / CONFIG).exists()


# ---- configuration ----


def fields_of_folder(folder: Path) -> dict[str, Any]:
    """Fields of `RecurrentDecoder` for a checkpoint folder. Raises ConfigError."""
    path, config = folder / CONFIG, read_config(folder, CONFIG, "give a checkpoint folder of the published code")
    try:
        return fields_of_config(config.get("arch", config))
    except (KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: not a configuration of the published code ({error!r})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def fields_of_config(arch: Mapping[str, Any]) -> dict[str, Any]:
    """The published code's `arch` in our terms. Raises ConfigError for what this project does not compute."""
    embedding, attending = arch["embedding"], arch["attention"]
    refuse = {
        "sub_normalization": arch.get("sub_normalization") or attending.get("sub_normalization"),
        "attention.skip_output_projection": attending.get("skip_output_projection"),
        "final_norm=false": not arch.get("final_norm", True),
        "embedding.normalization=false": not embedding.get("normalization", True),
    }
    for name, found in refuse.items():
        if found:
            raise ConfigError(f"{name} is not supported here")
    plain = "num_transformer_layers" in arch
    separate = attending["type"] == "self-attention"
    adapted = not plain and (arch["objective_layout"] != "albert" or embedding["embedding_dim"] != arch["hidden_size"])
    fields = {
        "width": arch["hidden_size"],
        "mlp_width": arch["intermed_size"],
        "embedding_width": embedding["embedding_dim"],
        "num_heads": attending["num_attention_heads"],
        "activation": _activation(arch["nonlin"]),
        "norm": _one_of(NORMS, arch["norm"], "norm"),
        "norm_eps": arch["norm_eps"],
        "norm_scheme": arch["norm_scheme"],
        "biases": _biases(arch, attending),
        "position_encoding": _one_of(POSITIONS, str(embedding["pos_embedding"]), "embedding.pos_embedding"),
        "num_positions": embedding["max_seq_length"],
        "abacus_max_offset": min(embedding.get("max_abacus_len", 0), embedding["max_seq_length"] - 2),
        "attention_positions": _one_of(ROTARY, attending["rotary_embedding"], "attention.rotary_embedding")
        if separate
        else "null",
        "fire_max_length": attending.get("max_length", 0),
        "output_adapter": adapted,
        # the plain class shares the table whatever its setting says
        "tied_head": plain or arch["tie_weights"],
        "init": "normal" if arch["init"]["type"] == "normal" else "deepnorm_straight",
        "init_std": arch["init"]["std"],
    }
    return fields | (_plain_fields(arch) if plain else _looped_fields(arch))


def _plain_fields(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": arch["num_transformer_layers"],
        "input_injection": "none",
        "initial_state": "input",
        "head": "identity",
    }


def _looped_fields(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": arch["layers_in_recurrent_block"],
        "num_recurrences": arch["maximal_recurrence"],
        "num_recurrences_in_eval": arch["maximal_recurrence_in_eval"],
        "input_injection": arch["input_injection_type"],
        "inject_every_layer": bool(arch.get("forward_only_model_with_skip")),
        "initial_state": arch["state_init"] if arch["initial_hidden_randomized"] else "input",
        "head": arch["head"],
    }


def _one_of(table: Mapping[Any, str], value: Any, name: str) -> str:
    if value not in table:
        raise ConfigError(f"{name}={value} is not supported; known: {', '.join(map(str, table))}")
    return table[value]


def _activation(name: str) -> str:
    found = name.lower().replace("glu", "_glu") if name != "GLU" else name
    if found not in ("gelu_glu", "silu_glu", "relu_glu", "gelu", "silu", "relu"):
        raise ConfigError(f"nonlin={name} is not supported")
    return found


def _biases(arch: Mapping[str, Any], attending: Mapping[str, Any]) -> bool:
    """All or none: in attention, MLPs and the output matrix."""
    names = ("bias_in_proj",) if attending["type"] == "pytorch" else ("bias_in_proj", "qkv_bias")
    found = {bool(arch["use_bias"]), bool(arch["decoder_bias"]), *(bool(attending[name]) for name in names)}
    if len(found) > 1:
        raise ConfigError("use_bias, decoder_bias and attention biases differ; they must be equal here")
    return found.pop()


# ---- weights ----


def read_weights(model: RecurrentSettings, folder: Path, specs: Sequence[ParameterSpec]) -> dict[str, Tensor]:
    """One run's tensors from a checkpoint folder. Raises ConfigError, which names file and tensor."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise ConfigError(f"{folder}: has neither {' nor '.join(WEIGHT_FILES)}; copy the whole folder")
    try:
        pickled = path.suffix == ".pth"
        stored = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); it is damaged or no file of plain tensors") from None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    per_head = config.get("arch", config)["attention"]["type"] == "self-attention"
    try:
        return from_state_dict(model, stored, specs, per_head)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_state_dict(
    model: RecurrentSettings, stored: Mapping[str, Tensor], specs: Sequence[ParameterSpec], per_head: bool
) -> dict[str, Tensor]:
    """Their tensors under our names and in our layout, float32. `per_head`: attention is stored head by head.

    Raises ConfigError for one that is missing, misshapen or unknown.
    """
    found: dict[str, Tensor] = {}
    for theirs, value in stored.items():
        name = our_name(theirs)
        if not _BUFFERS.search(name):
            found |= _ours(model, name, value.float(), per_head)
    wanted = {spec.name: spec.shape for spec in specs}
    if model.tied_head:  # stored twice
        found.pop("decoder.weight", None)
        if "output_adapter.weight" not in wanted:
            found.pop("output_adapter.weight", None)
    for name, shape in wanted.items():
        if name not in found:
            raise ConfigError(f"tensor {name} is missing; the file holds another network")
        if tuple(found[name].shape) != shape:
            raise ConfigError(f"{name} is {list(found[name].shape)}, the model needs {list(shape)}")
    unknown = found.keys() - wanted.keys()
    if unknown:
        raise ConfigError(f"tensor {min(unknown)} is not part of the model; the file holds another network")
    return {name: found[name] for name in wanted}


def our_name(theirs: str) -> str:
    name = theirs.replace("_orig_mod.", "")
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _ours(model: RecurrentSettings, name: str, value: Tensor, per_head: bool) -> dict[str, Tensor]:
    packed = _PACKED.match(name)
    if packed:
        heads = model.num_heads if per_head else 1
        parts = value.unflatten(0, (heads, 3, -1)).unbind(1)
        names = [f"{packed[1]}.attention.{part}.{packed[2]}" for part in ("query", "key", "value")]
        joined = [part.flatten(0, 1) for part in parts]
        return {new: (x.t() if x.dim() == 2 else x).contiguous() for new, x in zip(names, joined, strict=True)}
    if value.dim() == 0:
        return {name: value.reshape(1)}
    transposed = value.dim() == 2 and not name.startswith(_TABLES)
    return {name: value.mT.contiguous() if transposed else value}
