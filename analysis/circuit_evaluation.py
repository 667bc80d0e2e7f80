"""Evaluation of circuits: what a network still does when only a circuit's edges carry the clean input (Bhaskar et al.
2024, arXiv 2406.16778, section 4).

Shapes: K circuits, E edges, W writers, N examples, B rows of a batch, T tokens, A answer positions, V outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from analysis.circuit_drawing import as_figure, as_svg
from analysis.circuit_files import eap_ig_json
from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.probes import Findings, Opened, Probe
from groundswell.protocols import Dataset, Split
from groundswell.training.pack import build_dataset
from models.edge_fast import masked_logits
from models.edge_masked import EdgeMasked
from models.edge_masks import Circuit, binary_circuit
from models.edge_network import EdgeNetwork


@runtime_checkable
class GradedTask(Protocol):
    """A task of pairs of clean and corrupted inputs, which says how good an answer is."""

    pairs: bool

    def grade(self, logits: Tensor, reference: Tensor, split: Split) -> dict[str, Tensor]:
        """Logits of the circuit and of the whole network [N, A, V] -> each measure of each example [N]."""
        ...


class CircuitEvaluation(Probe):
    """The circuit of a pruning run: thresholds are searched, masks made 0 or 1, and the task's measures taken.

    Scalars: `circuit/<measure>` (means over the split), `circuit/edge_sparsity`, `circuit/num_edges`. Texts: edges.json
    (as the original writes it), graph.json (as EAP-IG and MIB read it), circuit.svg.
    """

    headlines: ClassVar[tuple[str, ...]] = (
        "circuit/num_edges", "circuit/edge_sparsity", "circuit/kl", "circuit/exact_match", "circuit/accuracy",
    )  # fmt: skip

    split: str = Field("test", description="evaluation split")
    max_examples: int | None = Field(None, gt=0, description="the first so many of the split; none: all")
    batch_size: int = Field(64, gt=0, description="examples in one masked pass")
    edge_sparsity: float | None = Field(None, ge=0, lt=1, description="of the circuit; none: that of the soft masks")
    node_sparsity: float | None = Field(None, ge=0, lt=1, description="of the writers; none: that of the soft masks")

    def objection(self, experiment: Experiment) -> str | None:
        if not isinstance(experiment.model, EdgeMasked):
            name = type(experiment.model).__name__
            return f"model {name} has no edge masks; prune it with models.edge_masked.EdgeMasked"
        if not isinstance(experiment.task, GradedTask):
            return f"task {type(experiment.task).__name__} has no pairs of clean and corrupted inputs"
        return None

    def run(self, opened: Opened) -> Findings:
        """Raises ConfigError for a split that the task does not have."""
        experiment, model = opened.experiment, opened.experiment.model
        assert isinstance(model, EdgeMasked) and isinstance(experiment.task, GradedTask)
        circuit = binary_circuit(model, opened.parameters, 0, self.edge_sparsity, self.node_sparsity)
        split = choose_split(build_dataset(experiment), self.split, self.max_examples)
        network = model.frozen(opened.device)
        corrupted = model.ablation == "corrupted"
        found = evaluate(network, circuit, experiment.task, split, corrupted, self.batch_size)
        soft, _ = model.deterministic(opened.parameters)
        means = summary(circuit, found)
        return Findings(
            {f"circuit/{name}": value for name, value in means.items()},
            {"mask": (circuit.mask > 0).numpy()},
            {"circuit": pd.DataFrame([{"split": self.split, "n": len(split), **means}])},
            {"circuit": as_figure(circuit.edges, circuit.graph)},
            {
                "edges.json": json.dumps([list(edge) for edge in circuit.edges]) + "\n",
                "graph.json": json.dumps(eap_ig_json(circuit, network.width, soft[0].detach().cpu())) + "\n",
                "circuit.svg": as_svg(circuit.edges, circuit.graph),
            },
        )


def choose_split(dataset: Dataset, name: str, max_examples: int | None = None) -> Split:
    """An evaluation split, or "train". Raises ConfigError for one that the task does not have, or an empty one."""
    known = {"train": dataset.train, **dataset.evaluation}
    if name not in known:
        raise ConfigError(f"split: the task has no split '{name}'; it has {', '.join(known)}")
    split = dataset.train_split if name == "train" else dataset.evaluation[name]
    if not len(split):
        raise ConfigError(f"split: '{name}' is empty; choose another of {', '.join(known)}")
    return split.select(slice(0, max_examples))


def inputs(task: GradedTask, tokens: Tensor, corrupted: bool) -> tuple[Tensor, Tensor | None]:
    """A split's tokens -> clean and corrupted ones [N, T] each; None for ablation by zero. Raises ConfigError where
    corrupted ones are asked for and the task has none."""
    if not task.pairs:
        if corrupted:
            raise ConfigError("task.pairs: corrupted inputs are needed; set task.pairs=true or ablate by zero")
        return tokens, None
    clean, other = tokens.chunk(2, dim=1)
    return clean, other if corrupted else None


@torch.no_grad()
def evaluate_masks(
    network: EdgeNetwork,
    edges: Tensor,
    nodes: Tensor | None,
    task: GradedTask,
    split: Split,
    corrupted: bool = True,
    batch_size: int = 64,
) -> list[dict[str, np.ndarray]]:
    """Masks of 0 and 1, edges [K, E] and nodes [K, W] (None: all on) -> for each circuit the task's measures of each
    example [N], float64. `corrupted` False: ablation by zero. The whole network runs once for all circuits."""
    parts: list[dict[str, Tensor]] = []
    edges, nodes = edges.to(network.device), None if nodes is None else nodes.to(network.device)
    for start in range(0, len(split), batch_size):
        batch = split.select(slice(start, start + batch_size)).to(network.device)
        clean, other = inputs(task, batch.tokens, corrupted)
        reference = network.run(clean, batch.positions).logits
        logits = masked_logits(
            network, edges, nodes, clean[None], None if other is None else other[None], batch.positions[None]
        )
        parts.append(grades(task, logits, reference, batch))
    found = {name: torch.cat([part[name] for part in parts], 1).double().cpu().numpy() for name in parts[0]}
    return [{name: values[run] for name, values in found.items()} for run in range(len(edges))]


def grades(task: GradedTask, logits: Tensor, reference: Tensor, batch: Split) -> dict[str, Tensor]:
    """Logits of circuits [K, B, A, V] and of the whole network [B, A, V] -> the task's measures [K, B]."""
    count = len(logits)
    rows = Split(*(x.repeat(count, 1) for x in (batch.tokens, batch.positions, batch.targets)))
    found = task.grade(logits.flatten(0, 1), reference.repeat(count, 1, 1), rows)
    return {name: values.unflatten(0, (count, -1)) for name, values in found.items()}


def evaluate(
    network: EdgeNetwork,
    circuit: Circuit,
    task: GradedTask,
    split: Split,
    corrupted: bool = True,
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """One circuit's measures of each example [N]. Raises ConfigError where the circuit is of another graph."""
    if circuit.graph != network.graph:
        raise ConfigError(f"circuit of {circuit.graph}, network of {network.graph}; give the network that was pruned")
    return evaluate_masks(network, circuit.mask[None], circuit.nodes[None], task, split, corrupted, batch_size)[0]


def summary(circuit: Circuit, measures: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of the measures (NaN counts for nothing), edges, edge sparsity."""
    means = {name: float(np.nanmean(values)) for name, values in measures.items()}
    return {**means, "num_edges": circuit.num_edges, "edge_sparsity": circuit.edge_sparsity}
