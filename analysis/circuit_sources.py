"""Where the circuits of a command come from, and the network and task that they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from analysis.circuit_evaluation import GradedTask
from groundswell.config import CLASS_KEY, ConfigError, import_path
from groundswell.probes import Opened, open_checkpoint
from groundswell.protocols import Dataset, Task
from groundswell.rundir import RunFolder
from groundswell.selection import find_run
from groundswell.training.pack import dataset_of
from models.edge_loading import load_edge_network
from models.edge_masked import EdgeMasked
from models.edge_masks import Circuit, binary_circuit, load_edges
from models.edge_network import EdgeNetwork

TASK = f"task.{CLASS_KEY}"


@dataclasses.dataclass
class Where:
    """Which network and task, where the circuit itself does not say."""

    run_id: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """pruning run to take network and task from"""
    network: str | None = None
    """folder of the network: a checkpoint of ours, GPT-2, Llama family, or Tracr"""
    mask_embeddings: bool = True
    """embeddings are writers with edges (with --network)"""
    ablation: Literal["corrupted", "zero"] = "corrupted"
    """what edges outside the circuit carry (with --network)"""
    device: str = "cpu"
    """cpu or cuda"""
    output: Path = Path("results")
    """folder of the sweeps"""


class Scene:
    """Network and task of a command."""

    def __init__(self, where: Where, fields: Mapping[str, Any], opened: Opened | None) -> None:
        self.where, self.fields, self.opened = where, fields, opened

    @property
    def model(self) -> EdgeMasked | None:
        model = self.opened.experiment.model if self.opened else None
        return model if isinstance(model, EdgeMasked) else None

    @cached_property
    def network(self) -> EdgeNetwork:
        where = self.where
        if where.network:
            return load_edge_network(where.network, where.mask_embeddings, where.device)
        if self.model is None:
            raise ConfigError("network: which one? give --network FOLDER, or --run with a pruning run")
        return self.model.frozen(where.device)

    @property
    def corrupted(self) -> bool:
        model = None if self.where.network else self.model
        return (model.ablation if model else self.where.ablation) == "corrupted"

    @cached_property
    def _task(self) -> Task:
        changed = {path.removeprefix("task."): value for path, value in self.fields.items()}
        if TASK in self.fields:
            return Task.from_dict(changed)
        if self.opened is None:
            raise ConfigError("task: which one? give --task.class tasks.ioi.Ioi (for instance), or --run")
        return self.opened.experiment.task.with_overrides(changed)

    @property
    def task(self) -> GradedTask:
        """Raises ConfigError for one that grades no circuits."""
        task = self._task
        if not isinstance(task, GradedTask):
            raise ConfigError(f"task {import_path(type(task))} grades no circuits; use another, as tasks.ioi.Ioi")
        return task

    @cached_property
    def dataset(self) -> Dataset:
        return dataset_of(self._task.canonical_json())


def open_circuits(names: Sequence[str], where: Where, fields: Mapping[str, Any]) -> tuple[Scene, list[Circuit]]:
    """Network and task are those of --network, --run, or of the first run named. Raises ConfigError for a run that has
    no edge masks, and for a list of another graph, naming the edge."""
    if where.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device: no CUDA device here; use cpu")
    opened = {name: _open(name, where) for name in names if not name.endswith(".json")}
    given = _open(where.run_id, where) if where.run_id else next(iter(opened.values()), None)
    scene = Scene(where, fields, given)
    circuits = []
    for name in names:
        if name.endswith(".json"):
            circuits.append(load_edges(name, scene.network.graph))
            continue
        model = opened[name].experiment.model
        assert isinstance(model, EdgeMasked)
        circuit = binary_circuit(model, opened[name].parameters)
        if circuit.graph != scene.network.graph:
            raise ConfigError(f"{name}: a circuit of another graph than the network's; leave out --network")
        circuits.append(circuit)
    return scene, circuits


def _open(name: str, where: Where) -> Opened:
    path = Path(name)
    step = None
    if path.is_dir() and path.parent.name == "checkpoints" and path.name.startswith("step-"):
        folder, step = RunFolder(path.resolve().parents[1]), int(path.name.removeprefix("step-"))
    elif path.is_dir() and (path / "checkpoints").is_dir():
        folder = RunFolder(path.resolve())
    else:
        folder = find_run(where.output, name)[1].folder
    opened = open_checkpoint(folder, step, where.device)
    if not isinstance(opened.experiment.model, EdgeMasked):
        kind = type(opened.experiment.model).__name__
        raise ConfigError(f"{name}: model {kind} has no edge masks; name a pruning run, or give an edges.json")
    return opened
