"""Folders of transformers' causal language models: configuration, checks, and writing in shards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.files import atomic_write
from models import huggingface
from models.huggingface import CONFIG, VOCABULARY, WEIGHTS
from models.weight_files import INDEX

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedConfig

SHARD_BYTES = 4 * 10**9
SHARD_PATTERN = "model{suffix}.safetensors"  # as transformers names them
DROPOUTS = frozenset({"attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"})
# What does not change the logits, or shows in the shapes; anything else must agree.
UNCOMPARED = DROPOUTS | {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "n_positions", "pad_token_id", "pretraining_tp", "transformers_version", "use_cache",
    "vocab_size", huggingface.OURS,
}  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def sizes(folder: Path, families: Collection[str]) -> tuple[int, int]:
    """Vocabulary and positions by config.json, without the time that transformers takes to load.

    Raises ConfigError for a folder whose model_type is not one of `families`.
    """
    config = huggingface.read_config(folder)
    _check_family(folder, config, families)
    positions = config.get("n_positions", config.get("max_position_embeddings"))
    if not (isinstance(config.get("vocab_size"), int) and isinstance(positions, int)):
        raise ConfigError(f"{folder / CONFIG}: lacks vocab_size or the number of positions; save the model again")
    return config["vocab_size"], positions


def _check_family(folder: Path, config: Mapping[str, Any], families: Collection[str]) -> None:
    found = config.get("model_type")
    if found not in families:
        raise ConfigError(f"{folder / CONFIG}: model_type '{found}' is not supported; known: {', '.join(families)}")
    if "quantization_config" in config:
        raise ConfigError(
            f"{folder / CONFIG}: quantized weights cannot be trained; give the folder before quantization"
        )


def read_config(folder: Path, families: Collection[str]) -> PreTrainedConfig:
    """Raises ConfigError where config.json is missing, damaged, or of a network that is not supported."""
    _check_family(folder, huggingface.read_config(folder), families)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{folder / CONFIG}: transformers cannot read it ({text}); mend the field") from None


def check(folder: Path, ours: PreTrainedConfig, families: Collection[str]) -> None:
    """Raise ConfigError where the folder's network computes something else than `ours`."""
    theirs, expected = read_config(folder, families).to_dict(), ours.to_dict()
    for name in sorted((theirs.keys() | expected.keys()) - UNCOMPARED):
        if theirs.get(name) != expected.get(name):
            raise ConfigError(
                f"{folder / CONFIG}: {name} is {theirs.get(name)} there and {expected.get(name)} in the model; "
                "set the model's fields as they were, or model.path to this folder"
            )


def write(
    folder: Path,
    config: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    vocabulary: Sequence[str],
    tokenizer_from: Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """One shard in memory at a time, each file written atomically; config.json last, so a folder with it is whole."""
    from huggingface_hub import split_state_dict_into_shards_factory

    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(parameters),
        get_storage_size=lambda tensor: math.prod(tensor.shape) * tensor.element_size(),
        filename_pattern=SHARD_PATTERN,
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        # copies: rows of a pack share one buffer, which safetensors refuses
        shard = {name: parameters[name].detach().cpu().contiguous().clone() for name in names}
        atomic_write(folder / file, safetensors.torch.save(shard, metadata={"format": "pt"}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")
        (folder / WEIGHTS).unlink(missing_ok=True)
    atomic_write(folder / VOCABULARY, json.dumps(list(vocabulary), ensure_ascii=False))
    for name in TOKENIZER_FILES if tokenizer_from is not None else ():
        if tokenizer_from is not None and (tokenizer_from / name).exists():
            shutil.copyfile(tokenizer_from / name, folder / name)
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    atomic_write(folder / CONFIG, json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
