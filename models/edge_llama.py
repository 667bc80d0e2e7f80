"""Llama-family folders of Hugging Face (llama, mistral, qwen2) as networks whose edges can be masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundswell.config import ConfigError
from models import transformers_folder
from models.edge_graph import EdgeGraph
from models.edge_network import Outline
from models.edge_transformer import EdgeTransformer, Layer, Norm, Rotary, Tables
from models.weight_files import WeightFiles

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2")
ACTIVATIONS = {"silu": "silu", "swish": "silu"}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others' frequencies change with the sequence
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Read = Callable[[WeightFiles, str, str | torch.device, torch.dtype], Tensor]


def read_alone(files: WeightFiles, name: str, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    return files.read(name).to(device, dtype)


def load(
    folder: str | Path,
    mask_embeddings: bool,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    kind: type[EdgeTransformer] = EdgeTransformer,
    read: Read = read_alone,
) -> EdgeTransformer:
    """Raises ConfigError where the folder is no such network, or computes something that has no masked form."""
    folder = Path(folder)
    config = _config(folder)
    names = [EMBEDDING, "model.norm.weight", *([] if config.tie_word_embeddings else [HEAD])]
    names += [name for layer in range(config.num_hidden_layers) for name in _layer_names(config, layer)]
    files = WeightFiles(folder, names)

    def tensor(name: str) -> Tensor:
        return read(files, name, device, dtype)

    def layers() -> Iterator[Layer]:
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield _layer({n.removeprefix(prefix): tensor(n) for n in names if n.startswith(prefix)}, config)

    tokens = tensor(EMBEDDING)
    tables = Tables(tokens, None, tokens if config.tie_word_embeddings else tensor(HEAD))
    final = Norm(tensor("model.norm.weight"), None, config.rms_norm_eps, centred=False)
    activation, rotary, limit = ACTIVATIONS[config.hidden_act], _rotary(config), _window(config)
    return kind(_graph(config, mask_embeddings), tables, layers(), final, activation, rotary, limit, gated=True)


def outline(folder: Path, mask_embeddings: bool) -> Outline:
    """Raises ConfigError as `load`."""
    config = _config(folder)
    return Outline(_graph(config, mask_embeddings), config.hidden_size, config.vocab_size)


def _config(folder: Path) -> PreTrainedConfig:
    config = transformers_folder.read_config(folder, FAMILIES)
    _check(folder, config)
    return config


def _graph(config: PreTrainedConfig, mask_embeddings: bool) -> EdgeGraph:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return EdgeGraph(config.num_hidden_layers, heads, groups, ("embeds",) if mask_embeddings else ())


def _check(folder: Path, config: PreTrainedConfig) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"{folder}: hidden_act '{config.hidden_act}' has no masked form; known: silu")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise ConfigError(f"{folder}: rope_type '{kind}' has no masked form; known: {', '.join(STATIC_ROPE)}")


def _window(config: PreTrainedConfig) -> int | None:
    """Attention over the last tokens only is the whole of it up to that many."""
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _biased(config: PreTrainedConfig) -> list[str]:
    """Projections with a bias: of all, or of some, by family."""
    found = []
    if config.model_type == "qwen2" or getattr(config, "attention_bias", False):
        found += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    if getattr(config, "attention_bias", False):
        found += ["self_attn.o_proj"]
    if getattr(config, "mlp_bias", False):
        found += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return found


def _layer_names(config: PreTrainedConfig, layer: int) -> list[str]:
    parts = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    parts += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    parts += [f"{part}.bias" for part in _biased(config)]
    return [f"model.layers.{layer}.{part}" for part in parts]


def _layer(tensors: dict[str, Tensor], config: PreTrainedConfig) -> Layer:
    def norm(name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"], None, config.rms_norm_eps, centred=False)

    def joined(*names: str) -> tuple[Tensor, Tensor]:
        """Side by side [in, out] and their biases [out]; stored is [out, in]."""
        weight = torch.cat([tensors[f"{name}.weight"] for name in names]).T.contiguous()
        biases = [tensors.get(f"{name}.bias", torch.zeros_like(tensors[f"{name}.weight"][:, 0])) for name in names]
        return weight, torch.cat(biases)

    return Layer(
        norm("input_layernorm"),
        *joined(*(f"self_attn.{part}_proj" for part in "qkv")),
        *joined("self_attn.o_proj"),
        norm("post_attention_layernorm"),
        *joined("mlp.gate_proj", "mlp.up_proj"),
        *joined("mlp.down_proj"),
    )


def _rotary(config: PreTrainedConfig) -> Rotary:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # the families' fields are the same
    return Rotary(module.inv_freq.double(), float(module.attention_scaling))
