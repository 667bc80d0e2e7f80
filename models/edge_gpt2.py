"""Our decoders and Hugging Face's GPT-2s, both of the same tensor names, as networks whose edges can be masked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from groundswell.config import ConfigError
from models import huggingface
from models.decoder import HEAD, WPE, WTE, Decoder
from models.edge_graph import EdgeGraph
from models.edge_network import Outline
from models.edge_transformer import EdgeTransformer, Layer, Norm, Rotary, Tables
from models.layers import LAYER_NORM_EPS, ROTARY_BASE


def load(
    folder: str | Path,
    mask_embeddings: bool,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    kind: type[EdgeTransformer] = EdgeTransformer,
) -> EdgeTransformer:
    """Layers that are passed several times are as many layers of the graph. Raises ConfigError for re-embedding, and
    where the folder is no such network."""
    folder = Path(folder)
    decoder = _decoder(folder)
    config = huggingface.read_config(folder)
    sizes = config["vocab_size"], config["n_positions"]
    read = huggingface.read_weights(folder, decoder.parameters(*sizes), decoder.tied_head)
    return from_tensors(decoder, {name: x.to(device, dtype) for name, x in read.items()}, mask_embeddings, kind)


def outline(folder: Path, mask_embeddings: bool) -> Outline:
    """Raises ConfigError as `load`."""
    decoder = _decoder(folder)
    return Outline(_graph(decoder, mask_embeddings), decoder.width, huggingface.read_config(folder)["vocab_size"])


def _decoder(folder: Path) -> Decoder:
    decoder = Decoder.from_huggingface(folder)
    if decoder.re_embed:
        raise ConfigError(
            f"{folder}: re_embed has no masked form (its passes are not sums of writers); "
            "give a network of model.re_embed=false"
        )
    return decoder


def _graph(decoder: Decoder, mask_embeddings: bool) -> EdgeGraph:
    absolute = decoder.position_encoding == "absolute"
    names = (("tok_embeds", "pos_embeds") if absolute else ("tok_embeds",)) if mask_embeddings else ()
    return EdgeGraph(decoder.num_effective_layers, decoder.num_heads, decoder.num_heads, names)


def from_tensors(
    decoder: Decoder,
    tensors: dict[str, Tensor],
    mask_embeddings: bool,
    kind: type[EdgeTransformer] = EdgeTransformer,
) -> EdgeTransformer:
    """`tensors`: one run's, without the run axis, under the decoder's names."""
    positions = tensors[WPE] if decoder.position_encoding == "absolute" else None
    return kind(
        _graph(decoder, mask_embeddings),
        Tables(tensors[WTE], positions, tensors[WTE if decoder.tied_head else HEAD]),
        (_layer(decoder, tensors, f"transformer.h.{layer}.") for layer in range(decoder.num_layers)),
        _norm(decoder, tensors, "transformer.ln_f"),
        decoder.activation,
        _rotary(decoder),
        None if positions is None else len(positions),
    )


def _layer(decoder: Decoder, tensors: dict[str, Tensor], name: str) -> Layer:
    def pair(part: str) -> tuple[Tensor, Tensor]:
        return tensors[f"{name}{part}.weight"], tensors[f"{name}{part}.bias"]

    order = _half_order(decoder).to(tensors[WTE].device)
    weight, bias = (tensor[..., order].contiguous() for tensor in pair("attn.c_attn"))
    return Layer(
        _norm(decoder, tensors, f"{name}ln_1"), weight, bias, *pair("attn.c_proj"),
        _norm(decoder, tensors, f"{name}ln_2"), *pair("mlp.c_fc"), *pair("mlp.c_proj"),
    )  # fmt: skip


def _norm(decoder: Decoder, tensors: dict[str, Tensor], name: str) -> Norm:
    if not decoder.layer_norm:
        return Norm()
    return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], LAYER_NORM_EPS)


def _half_order(decoder: Decoder) -> Tensor:
    """[3d]: columns of c_attn. The decoder turns neighbours (2i, 2i+1), here i and r + i go together; scores are the
    same as long as queries and keys move alike."""
    head, turned = decoder.width // decoder.num_heads, decoder.rotary_dim
    columns = torch.arange(3 * decoder.width).view(3, decoder.num_heads, head)
    if decoder.position_encoding == "rotary":
        pairs = columns[:2, :, :turned].unflatten(-1, (-1, 2))
        columns[:2, :, :turned] = pairs.mT.flatten(-2).clone()
    return columns.flatten()


def _rotary(decoder: Decoder) -> Rotary | None:
    if decoder.position_encoding != "rotary":
        return None
    steps = torch.arange(0, decoder.rotary_dim, 2, dtype=torch.float64)
    return Rotary(ROTARY_BASE ** (-steps / decoder.rotary_dim))
