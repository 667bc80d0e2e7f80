"""The report of a sweep that prunes the checkpoints of one composition run: how many edges each needs, and whether its
circuit passes through the bridge entity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.circuit_evaluation import CircuitEvaluation
from analysis.circuits import draw_heat_map
from analysis.grokked_circuit import NETWORKS, BridgeInCircuit
from analysis.tables import settings_of, short, spread
from groundswell.probes import probe_folder
from groundswell.report import Report
from groundswell.results import Results
from groundswell.sweep import format_value
from models.edge_masked import EdgeMasked

FAITHFUL = 0.9  # exact match with the whole network that a circuit must have to be chosen
CHECKPOINT = "checkpoint"  # the sweep's axis


@dataclass(frozen=True)
class CircuitFound:
    """One pruning run's circuit, judged."""

    checkpoint: str
    step: int  # of the network that was pruned
    scalars: dict[str, float]  # of BridgeInCircuit
    held_out: float  # exact match with the whole network on held-out questions
    tables: Path  # folder of BridgeInCircuit's answer

    @classmethod
    def of(cls, results: Results, run_id: str, checkpoint: str) -> CircuitFound | None:
        assert results.folder is not None
        folder = results.folder.run(run_id)
        scalars, _ = results.answer(run_id, BridgeInCircuit.name())
        if not scalars:
            return None
        model = folder.experiment().model
        assert isinstance(model, EdgeMasked)
        held_out = results.answer(run_id, CircuitEvaluation.name())[0].get("circuit/exact_match", float("nan"))
        step = int(Path(model.path).name.removeprefix("step-"))
        answer = probe_folder(folder, max(results.answers(run_id, BridgeInCircuit.name())), BridgeInCircuit.name())
        return cls(checkpoint, step, scalars, held_out, answer)

    @property
    def edges(self) -> float:
        return self.scalars["bridge/circuit/num_edges"]

    @property
    def exact_match(self) -> float:
        return self.scalars["bridge/circuit/all/exact_match"]

    @property
    def depth(self) -> int:
        """Layers of the network."""
        return max(int(name.rsplit("_", 1)[1]) for name in self.scalars if "/mrr/layer_" in name)

    def layers(self, network: str, measure: str) -> np.ndarray:
        """[L + 1] by layer from 0; NaN where there is no value."""
        names = (f"bridge/{network}/{measure}/layer_{layer}" for layer in range(self.depth + 1))
        return np.array([self.scalars.get(name, np.nan) for name in names])

    def roles(self) -> list[str]:
        parts = (name.split("/") for name in self.scalars)
        return list(dict.fromkeys(part[3] for part in parts if len(part) == 5 and part[2] == "strength"))


def grokked_circuit_report(results: Results) -> Report:
    """Table: one row a setting. Figure: one row a checkpoint, of the smallest circuit that answers as the whole network
    does for at least 90 % of the questions, or of the one that does best where none reaches that."""
    rows, found = [], []
    for key, runs in settings_of(results):
        axes = dict(zip(results.setting_axes, key, strict=True))
        opened = [CircuitFound.of(results, run_id, str(axes.get(CHECKPOINT, ""))) for run_id in runs["run_id"]]
        mine = [circuit for circuit in opened if circuit is not None]
        if mine:
            rows.append({short(path): format_value(value) for path, value in axes.items()} | _row(mine))
            found += mine
    chosen = choose(found)
    remarks = (
        "edges that are masked out carry another question's values. Exact match: with the whole network, on questions "
        "that the masks were not trained on; held-out: on those that the network was not trained on either; bridge: "
        "other edges carry a question with the same r2 behind another bridge entity",
        "of the state at r1 after the middle layer, whole network / circuit. MRR: of the bridge entity; strength: "
        "causal, on the answer; moved: answers that follow when the state is another bridge entity's; kept: answers "
        "that stay when it is the same one's, reached from another h and r1",
        *(
            f"{circuit.checkpoint} (step {circuit.step}): {circuit.edges:.0f} edges, exact match "
            f"{circuit.exact_match:.3f}" + ("" if circuit.exact_match >= FAITHFUL else f"; none reaches {FAITHFUL:g}")
            for circuit in chosen
        ),
        f"values are mean (lowest-highest) over {results.replicate_axis}",
    )
    figures = {"grokked_circuit": draw(chosen, found)} if found else {}
    return Report("Circuits of two-hop composition, and the bridge entity", pd.DataFrame(rows), figures, remarks)


def choose(found: Sequence[CircuitFound]) -> list[CircuitFound]:
    """One circuit of each checkpoint, in the order of their steps."""
    chosen = []
    for step in sorted({circuit.step for circuit in found}):
        mine = [circuit for circuit in found if circuit.step == step]
        faithful = [circuit for circuit in mine if circuit.exact_match >= FAITHFUL]
        best = max(mine, key=lambda circuit: circuit.exact_match)
        chosen.append(min(faithful, key=lambda circuit: circuit.edges) if faithful else best)
    return chosen


def _row(circuits: Sequence[CircuitFound]) -> dict[str, str]:
    def values(read: Callable[[CircuitFound], float]) -> pd.Series:
        return pd.Series([read(circuit) for circuit in circuits], dtype=float)

    def both(measure: str) -> str:
        layer = circuits[0].depth // 2
        series = (pd.Series([circuit.layers(name, measure)[layer] for circuit in circuits]) for name in NETWORKS)
        return " / ".join(spread(found, "{:.2f}") for found in series)

    return {
        "step": str(circuits[0].step),
        "edges": spread(values(lambda c: c.edges), "{:.0f}"),
        "KL": spread(values(lambda c: c.scalars["bridge/circuit/all/kl"]), "{:.2f}"),
        "exact match": spread(values(lambda c: c.exact_match), "{:.2f}"),
        "held-out": spread(values(lambda c: c.held_out), "{:.2f}"),
        "bridge": spread(values(lambda c: c.scalars["bridge/circuit/bridge/exact_match"]), "{:.2f}"),
        "MRR": both("mrr"),
        "strength of r1": both("strength/r1"),
        "moved": both("moved"),
        "kept": both("kept"),
    }


# ---- the figure ----


def draw(chosen: Sequence[CircuitFound], found: Sequence[CircuitFound]) -> Figure:
    """A row for each checkpoint: faithfulness against edges, which stages the circuit's edges join, causal strengths
    of the whole network and of the circuit, the bridge entity at r1."""
    figure = Figure(figsize=(16.5, 3.1 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 5, squeeze=False, width_ratios=(1, 1.15, 0.8, 0.8, 1.1))
    for axes, circuit in zip(grid, chosen, strict=True):
        _draw_frontier(axes[0], circuit, found)
        _draw_stages(axes[1], circuit)
        for ax, name in zip(axes[2:4], NETWORKS, strict=True):
            roles = circuit.roles()
            strength = np.array([circuit.layers(name, f"strength/{role}")[1:-1] for role in roles]).T
            draw_heat_map(ax, strength, roles, f"causal strength, {name}")
            ax.set_ylabel("layer")
        _draw_bridge(axes[4], circuit)
    grid[0, 0].legend(fontsize=7, frameon=False)
    grid[0, 4].legend(fontsize=7, frameon=False)
    return figure


def _draw_frontier(ax: Axes, circuit: CircuitFound, found: Sequence[CircuitFound]) -> None:
    mine = sorted((other for other in found if other.step == circuit.step), key=lambda other: other.edges)
    edges = [other.edges for other in mine]
    ax.plot(edges, [other.exact_match for other in mine], "o-", ms=4, label="exact match")
    ax.plot(edges, [other.held_out for other in mine], "s--", ms=3, label="exact match, held-out")
    ax.plot(circuit.edges, circuit.exact_match, "o", ms=11, mfc="none", color="tab:red", label="chosen")
    ax.axhline(FAITHFUL, color="grey", lw=0.7, ls=":")
    ax.set(title=f"{circuit.checkpoint} (step {circuit.step})", xlabel="edges", ylim=(-0.03, 1.03))
    ax.set_ylabel("as the whole network")


def _draw_stages(ax: Axes, circuit: CircuitFound) -> None:
    density = pd.read_csv(circuit.tables / "stages.csv", index_col=0)
    image = ax.imshow(density.to_numpy(), cmap="viridis", vmin=0, vmax=1)
    names = list(density.columns)
    ax.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(title=f"share of edges kept ({circuit.edges:.0f})", xlabel="reads", ylabel="writes")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)


def _draw_bridge(ax: Axes, circuit: CircuitFound) -> None:
    layers = np.arange(circuit.depth + 1)
    for measure, colour, label in (
        ("mrr", "tab:blue", "MRR"), ("moved", "tab:red", "moved"), ("kept", "tab:green", "kept"),
    ):  # fmt: skip
        for name, style in zip(NETWORKS, ("-", "--"), strict=True):
            ax.plot(layers, circuit.layers(name, measure), style, color=colour, marker=".", label=f"{label}, {name}")
    ax.set(title="bridge entity at r1", xlabel="layer", ylim=(-0.03, 1.03), xticks=layers)
