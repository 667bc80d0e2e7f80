"""The recorded runs of the published Edge Pruning code, as vectors of our graphs."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.edge_graph import EdgeGraph
from models.edge_original import edge_vector, node_vector, short_name

FOLDER = Path(__file__).parents[1] / "golden" / "edge_pruning"


@cache
def arrays(name: str) -> Mapping[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@cache
def notes(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors_under(name: str, prefix: str) -> dict[str, Tensor]:
    """Arrays whose key begins so, by the short form of the rest."""
    return {short_name(k[len(prefix) :]): v for k, v in arrays(name).items() if k.startswith(prefix)}


def vectors(name: str, prefix: str, graph: EdgeGraph) -> tuple[Tensor, Tensor]:
    """-> edges [E], nodes [W], float32."""
    tensors = tensors_under(name, prefix)
    return edge_vector(graph, tensors).float(), node_vector(graph, tensors).float()


def gpt2_graph(tag: str) -> EdgeGraph:
    return EdgeGraph(3, 4, 4, ("tok_embeds", "pos_embeds") if tag == "emb" else ())


def llama_graph(tag: str) -> EdgeGraph:
    return EdgeGraph(3, 4, 2, ("embeds",) if tag == "emb" else ())


def write_network(family: str, folder: Path) -> Path:
    """The tiny network "gpt2" or "llama" as a folder of Hugging Face's form."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((FOLDER / f"{family}_tiny_config.json").read_text())
    names = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
    config |= {"model_type": family, "architectures": [names[family]], "tie_word_embeddings": family == "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(FOLDER / f"{family}_tiny_weights.safetensors"), folder / "model.safetensors")
    return folder
