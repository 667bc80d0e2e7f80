"""Circuits in the JSON of EAP-IG's `Graph.from_json`, which the Mechanistic Interpretability Benchmark reads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from groundswell.config import ConfigError
from models.edge_graph import LAST_READER, Edge, EdgeGraph
from models.edge_masks import Circuit

INPUT, OUTPUT = "input", "logits"


def eap_ig_json(circuit: Circuit, width: int, scores: Tensor | None = None) -> dict[str, Any]:
    """Configuration, nodes and edges. `scores` [E] rank the edges; without them a kept edge has 1, another 0.

    There all embeddings are one node and every head has its own key and value: our embedding writers are joined (an
    edge is kept where one of theirs is, its score is the highest), grouped edges are repeated for each head of the
    group. Where embeddings are no writers, edges from them are always kept.
    """
    graph = circuit.graph
    kept = set(circuit.edges)
    values = (circuit.mask if scores is None else scores).tolist()
    edges: dict[str, dict[str, Any]] = {}
    for place, (writer, reader) in enumerate(graph.edges):
        for target in _targets(graph, reader):
            name = f"{INPUT if writer in graph.embeddings else writer}->{target}"
            known = edges.get(name, {"score": values[place], "in_graph": False})
            edges[name] = {
                "score": max(known["score"], values[place]),
                "in_graph": known["in_graph"] or (writer, reader) in kept,
            }
    if not graph.embeddings:
        for reader in graph.readers:
            edges |= {f"{INPUT}->{target}": {"score": 1.0, "in_graph": True} for target in _targets(graph, reader)}
    sources = {name.split("->")[0] for name, edge in edges.items() if edge["in_graph"]}
    names = [INPUT, *(writer for writer in graph.writers if writer not in graph.embeddings)]
    nodes = {name: {"in_graph": name in sources} for name in names} | {OUTPUT: {"in_graph": True}}
    settings = {
        "n_layers": graph.num_layers, "n_heads": graph.num_heads, "parallel_attn_mlp": False, "d_model": width,
    }  # fmt: skip
    return {"cfg": settings, "nodes": nodes, "edges": edges}


def _targets(graph: EdgeGraph, reader: str) -> list[str]:
    """A reader as EAP-IG calls it: a3.h1.q -> a3.h1<q>; a key of a group of heads is one of each."""
    if reader == LAST_READER:
        return [OUTPUT]
    if reader.startswith("m"):
        return [reader]
    layer, head, part = reader.split(".")
    share = 1 if part == "q" else graph.num_heads // graph.num_kv_heads
    first = int(head[1:]) * share
    return [f"{layer}.h{number}<{part}>" for number in range(first, first + share)]


def read_edges(path: str | Path) -> list[Edge]:
    """An edges.json of whatever graph. Raises ConfigError, which names the file, where it is none."""
    try:
        edges = json.loads(Path(path).read_text(encoding="utf-8"))
        return [(str(writer), str(reader)) for writer, reader in edges]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give an edges.json") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: not an edge list; give a JSON list of [writer, reader]") from None
