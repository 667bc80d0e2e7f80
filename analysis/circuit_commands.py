"""`groundswell circuit`: evaluate, intersect, compare, draw and export circuits of runs, checkpoints and edge lists.

A circuit is named by a pruning run (its id, first characters, or name), a checkpoint folder of one
(runs/<id>/checkpoints/step-N), or an edges.json. For an edge list --network and --task.class say what it is of
(--task.<field> VALUE sets the task's fields), or --run takes both from a pruning run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro
from rich.console import Console

from analysis.circuit_drawing import save_drawing
from analysis.circuit_evaluation import choose_split, evaluate, summary
from analysis.circuit_files import eap_ig_json, read_edges
from analysis.circuit_paths import shared_edges
from analysis.circuit_sources import Where, open_circuits
from analysis.edge_comparison import METHODS, THRESHOLDS, Found, Ground, Method, Selection, draw, find, judge
from analysis.edge_scores import EAP_IG_STEPS
from groundswell.cli import PLAIN_WIDTH, split_dotted
from groundswell.config import ConfigError
from groundswell.files import atomic_write, ensure_writable
from groundswell.report import Report, print_table
from models.edge_masks import save_edges

Circuits = Annotated[tuple[str, ...], tyro.conf.Positional]
One = Annotated[str, tyro.conf.Positional]
Fields = Mapping[str, Any]  # of the task, by dotted path


@dataclasses.dataclass
class Examples:
    """On what."""

    split: str = "test"
    """evaluation split to judge on"""
    max_examples: int | None = None
    """the first so many of the split; none: all"""
    batch_size: int = 64
    """examples in one masked pass"""


@dataclasses.dataclass
class Evaluate(Examples, Where):
    """Evaluate circuits on a task's split: its measures, KL and exact match with the whole network, edge sparsity."""

    circuits: Circuits = ()
    """runs, checkpoint folders or edges.json files"""

    def run(self, fields: Fields) -> None:
        if not self.circuits:
            raise ConfigError("circuit evaluate: name runs, checkpoint folders or edges.json files")
        scene, found = open_circuits(self.circuits, self, fields)
        split = choose_split(scene.dataset, self.split, self.max_examples)
        rows = []
        for name, circuit in zip(self.circuits, found, strict=True):
            values = evaluate(scene.network, circuit, scene.task, split, scene.corrupted, self.batch_size)
            rows.append({"circuit": name, **summary(circuit, values)})
        title = f"{self.split}: {len(split)} examples, graph of {scene.network.graph.num_edges:,} edges"
        print_table(Report(title, pd.DataFrame(rows)), _console())


@dataclasses.dataclass
class Intersect(Where):
    """Edges that circuits have in common: how many, and what share of each."""

    circuits: Circuits = ()
    """two or more runs, checkpoint folders or edges.json files"""
    save: Path | None = None
    """edges.json to write"""

    def run(self, fields: Fields) -> None:
        if len(self.circuits) < 2:
            raise ConfigError("circuit intersect: name two or more circuits")
        if all(name.endswith(".json") for name in self.circuits) and not (self.network or self.run_id):
            found = [read_edges(name) for name in self.circuits]
        else:
            found = [circuit.edges for circuit in open_circuits(self.circuits, self, fields)[1]]
        common = shared_edges(found)
        rows = [
            {"circuit": name, "edges": len(edges), "shared": len(common), "share": len(common) / max(1, len(edges))}
            for name, edges in zip(self.circuits, found, strict=True)
        ]
        print_table(Report(f"{len(common)} edges in all {len(found)} circuits", pd.DataFrame(rows)), _console())
        if self.save:
            save_edges(self.save, common)
            _console().print(f"saved {self.save}", soft_wrap=True, highlight=False)


@dataclasses.dataclass
class Compare(Examples, Where):
    """Draw faithfulness over the number of edges: the circuits named, and those of ACDC, EAP, EAP-IG, random edges."""

    circuits: Circuits = ()
    """runs, checkpoint folders or edges.json files; none: the other methods alone"""
    methods: tuple[Method, ...] = METHODS
    """the other methods"""
    edges: tuple[int, ...] = ()
    """numbers of edges (EAP, EAP-IG, random); none: ten, from 0.3 to 50 percent of the graph"""
    thresholds: tuple[float, ...] = THRESHOLDS
    """of ACDC: an edge goes where the KL grows by less"""
    num_examples: int = 64
    """training examples that the other methods use"""
    measure: str | None = None
    """of the task, whose gradient EAP and EAP-IG take; none: the best suited"""
    steps: int = EAP_IG_STEPS
    """inputs between corrupted and clean (EAP-IG)"""
    selection: Selection = "greedy"
    """greedy: from the output up; highest: whatever scores highest"""
    folder: Path = Path("comparison")
    """where table, figure and edge lists go"""

    def run(self, fields: Fields) -> None:
        console, folder = _console(), ensure_writable(self.folder, "folder")
        scene, mine = open_circuits(self.circuits, self, fields)
        ground = Ground(
            scene.network,
            scene.task,
            choose_split(scene.dataset, "train", self.num_examples),
            choose_split(scene.dataset, self.split, self.max_examples),
            scene.corrupted,
            self.batch_size,
            self.measure,
        )
        found = [Found("edge_pruning", name, circuit) for name, circuit in zip(self.circuits, mine, strict=True)]
        found += find(
            ground, self.methods, self.edges, self.thresholds, self.selection, self.steps,
            lambda text: console.print(text, highlight=False),
        )  # fmt: skip
        table = judge(ground, found)
        print_table(Report(f"{self.split}: {len(ground.judged_on)} examples", table), console)
        atomic_write(folder / "comparison.csv", table.to_csv(index=False))
        figure = draw({type(scene.task).__name__: table})
        for kind in ("png", "pdf"):
            figure.savefig(folder / f"comparison.{kind}", dpi=150)
        for number, each in enumerate(found):
            save_edges(folder / "circuits" / f"{number:03d}-{each.method}.json", each.circuit.edges)
        console.print(f"saved {folder}/comparison.csv, comparison.png and circuits/", soft_wrap=True, highlight=False)


@dataclasses.dataclass
class Draw(Where):
    """Draw a circuit as PDF, PNG or SVG. An edge list needs --network only where heads share keys and values."""

    circuit: One = dataclasses.field(default_factory=str)
    """run, checkpoint folder or edges.json"""
    save: Path = Path("edges.pdf")
    """file to write: .pdf, .png or .svg"""
    clean_up: bool = True
    """leave out what leads nowhere"""

    def run(self, fields: Fields) -> None:
        if self.circuit.endswith(".json") and not (self.network or self.run_id):
            edges, graph = read_edges(self.circuit), None
        else:
            scene, found = open_circuits((self.circuit,), self, fields)
            edges, graph = found[0].edges, scene.network.graph
        by = save_drawing(self.save, edges, graph, self.clean_up)
        _console().print(f"{len(edges)} edges: saved {self.save} (drawn by {by})", soft_wrap=True, highlight=False)


@dataclasses.dataclass
class Export(Where):
    """Write a circuit as edges.json, or in the JSON of EAP-IG and MIB."""

    circuit: One = dataclasses.field(default_factory=str)
    """run, checkpoint folder or edges.json"""
    save: Path = Path("graph.json")
    """file to write"""
    form: Literal["graph", "edges"] = "graph"
    """graph: as EAP-IG and MIB read it; edges: a list of [writer, reader]"""

    def run(self, fields: Fields) -> None:
        scene, found = open_circuits((self.circuit,), self, fields)
        if self.form == "edges":
            save_edges(self.save, found[0].edges)
        else:
            atomic_write(self.save, json.dumps(eap_ig_json(found[0], scene.network.width)) + "\n")
        _console().print(f"{found[0].num_edges} edges: saved {self.save}", soft_wrap=True, highlight=False)


COMMANDS: dict[str, Callable[..., Any]] = {
    "evaluate": Evaluate,
    "intersect": Intersect,
    "compare": Compare,
    "draw": Draw,
    "export": Export,
}


def main(arguments: Sequence[str]) -> int:
    """`groundswell circuit ...`. Raises ConfigError for a user's mistake."""
    fields, rest = split_dotted(arguments)
    for path in fields:
        if not path.startswith("task."):
            raise ConfigError(f"--{path}: no such option; fields of the task are --task.<field>")
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="groundswell circuit",
        description=__doc__,
        args=rest,
    )
    command.run(fields)
    return 0


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
