"""Masks by the names of the published Edge Pruning code (Bhaskar et al. 2024, arXiv 2406.16778), and its checkpoints.

There each layer has a matrix `q_read_log_alphas` [writers, heads], `k_...` and `v_...` [writers, key/value heads], a
vector `mlp_read_log_alphas` [writers], all with rows for later writers too, which are no edges; node masks are
`attn_write_log_alphas` [heads], `mlp_write_log_alphas` [1], and one for each embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph

_LAYER = re.compile(r"(?:.*\.)?(?:h|layers)\.(\d+)\.(\w+)")
_OURS = re.compile(r"_log_alphas?$|sparsity_lambda")
_EMBEDDINGS = {"tok_embeds": "token_write_log_alpha", "token_embeds": "token_write_log_alpha",
               "embeds": "token_write_log_alpha", "pos_embeds": "pos_write_log_alpha"}  # fmt: skip


def short_name(name: str) -> str:
    """`transformer.h.0.q_read_log_alphas` or `model.layers.0...` -> `0.q_read_log_alphas`; else the last part."""
    found = _LAYER.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else name.rsplit(".", 1)[-1]


def edge_vector(graph: EdgeGraph, tensors: Mapping[str, Tensor]) -> Tensor:
    """Values of edges, by published names (`short_name`) -> [E]."""
    parts = []
    for layer in range(graph.num_layers):
        before = graph.writers_before(layer)
        reads = [tensors[f"{layer}.{part}_read_log_alphas"][:before].T for part in "qkv"]
        mlp = tensors[f"{layer}.mlp_read_log_alphas"]
        parts += [torch.cat([*reads, mlp[None, :before]]).flatten(), mlp[before : before + graph.num_heads]]
    return torch.cat([*parts, tensors["final_read_log_alphas"]])


def node_vector(graph: EdgeGraph, tensors: Mapping[str, Tensor]) -> Tensor:
    """Values of writers, by published names -> [W]."""
    parts = [tensors[_EMBEDDINGS[name]] for name in graph.embeddings]
    for layer in range(graph.num_layers):
        parts += [tensors[f"{layer}.attn_write_log_alphas"], tensors[f"{layer}.mlp_write_log_alphas"]]
    return torch.cat([part.flatten() for part in parts])


def multiplier_pair(tensors: Mapping[str, Tensor], kind: str) -> Tensor:
    """l1 and l2 [2] of "edges" or "nodes"."""
    return torch.cat([tensors[f"sparsity_lambda_{kind}_{power}"].flatten() for power in (1, 2)])


def load_original(folder: str | Path, graph: EdgeGraph) -> dict[str, Tensor]:
    """Log alphas and multipliers of a checkpoint folder of the published code, as parameters of `EdgeMasked`, float32.

    Raises ConfigError where a mask is missing or the folder belongs to another network.
    """
    tensors = _read(Path(folder))
    try:
        edges, nodes = edge_vector(graph, tensors), node_vector(graph, tensors)
        pairs = {kind: multiplier_pair(tensors, kind) for kind in ("edges", "nodes")}
    except KeyError as error:
        raise ConfigError(
            f"{folder}: has no {error.args[0]}; give a checkpoint of the published Edge Pruning"
        ) from None
    if len(edges) != graph.num_edges or len(nodes) != graph.num_writers:
        raise ConfigError(
            f"{folder}: masks for {len(edges)} edges and {len(nodes)} writers, the network has {graph.num_edges} and "
            f"{graph.num_writers}; give the folder of the network that was pruned"
        )
    return {
        "masks.edges": edges,
        "masks.nodes": nodes,
        "multipliers.edges": pairs["edges"],
        "multipliers.nodes": pairs["nodes"],
    }


def _read(folder: Path) -> dict[str, Tensor]:
    """Masks and multipliers in all safetensors files of the folder; the network's own tensors are not read."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if _OURS.search(name)]  # noqa: SIM118 (no dict)
                found |= {short_name(name): file.get_tensor(name).float() for name in names}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); the file is damaged, copy it again") from None
    return found
