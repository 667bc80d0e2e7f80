"""From a folder to a network whose edges can be masked."""

from __future__ import annotations

from pathlib import Path

import torch

from groundswell.config import ConfigError
from models import edge_gpt2, edge_llama, edge_sharded, huggingface
from models.edge_graph import EdgeGraph
from models.edge_network import EdgeNetwork, Outline

GPT2_FAMILIES = ("gpt2", "groundswell_decoder")
TRACR = "tracr"


def load_edge_network(
    folder: str | Path,
    mask_embeddings: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
) -> EdgeNetwork:
    """A checkpoint folder of our decoder, a GPT-2 or Llama folder of Hugging Face, or a compiled Tracr program.

    `mask_embeddings`: embeddings are writers (of a Tracr program always). Weights are read as `dtype`, whatever they
    are stored as. `sharded`: over the workers of torch's default process group, which all call this; of a Llama each
    reads its part of the files only. Tracr programs stay whole. Raises ConfigError, which names the folder, for a
    network that has no masked form.
    """
    folder, family = _family(folder)
    kind = edge_sharded.ShardedTransformer if sharded else edge_llama.EdgeTransformer
    if family in GPT2_FAMILIES:
        return edge_gpt2.load(folder, mask_embeddings, device, dtype, kind)
    if family in edge_llama.FAMILIES:
        read = edge_sharded.read_together if sharded else edge_llama.read_alone
        return edge_llama.load(folder, mask_embeddings, device, dtype, kind, read)
    from models.tracr_network import TracrNetwork

    return TracrNetwork.load(folder, device, dtype)


def load_outline(folder: str | Path, mask_embeddings: bool = True) -> Outline:
    """Of the network that `load_edge_network` gives, from its configuration alone. Raises ConfigError as it does."""
    folder, family = _family(folder)
    if family in GPT2_FAMILIES:
        return edge_gpt2.outline(folder, mask_embeddings)
    if family in edge_llama.FAMILIES:
        return edge_llama.outline(folder, mask_embeddings)
    network = load_edge_network(folder)  # a few kilobytes
    return Outline(network.graph, network.width, network.num_outputs, network.causal)


def load_graph(folder: str | Path, mask_embeddings: bool = True) -> EdgeGraph:
    return load_outline(folder, mask_embeddings).graph


def _family(folder: str | Path) -> tuple[Path, str]:
    folder = Path(folder)
    family = huggingface.read_config(folder).get("model_type")
    known = (*GPT2_FAMILIES, *edge_llama.FAMILIES, TRACR)
    if family not in known:
        raise ConfigError(
            f"{folder / huggingface.CONFIG}: model_type '{family}' has no masked form; give one of {', '.join(known)}"
        )
    return folder, str(family)
