"""From a folder to a network whose edges can be masked."""

from __future__ import annotations

from pathlib import Path

import torch

from groundswell.config import ConfigError
from models import edge_gpt2, edge_llama, huggingface
from models.edge_network import EdgeNetwork

GPT2_FAMILIES = ("gpt2", "groundswell_decoder")
TRACR = "tracr"


def load_edge_network(
    folder: str | Path,
    mask_embeddings: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EdgeNetwork:
    """A checkpoint folder of our decoder, a GPT-2 or Llama folder of Hugging Face, or a compiled Tracr program.

    `mask_embeddings`: embeddings are writers (of a Tracr program always). Weights are read as `dtype`, whatever they
    are stored as. Raises ConfigError, which names the folder, for a network that has no masked form.
    """
    folder = Path(folder)
    family = huggingface.read_config(folder).get("model_type")
    if family in GPT2_FAMILIES:
        return edge_gpt2.load(folder, mask_embeddings, device, dtype)
    if family in edge_llama.FAMILIES:
        return edge_llama.load(folder, mask_embeddings, device, dtype)
    if family == TRACR:
        from models.tracr_network import TracrNetwork

        return TracrNetwork.load(folder, device, dtype)
    known = (*GPT2_FAMILIES, *edge_llama.FAMILIES, TRACR)
    raise ConfigError(
        f"{folder / huggingface.CONFIG}: model_type '{family}' has no masked form; give one of {', '.join(known)}"
    )
