"""Faithfulness against the number of edges, for all methods on one network and task (Bhaskar et al. 2024, arXiv
2406.16778, figure 3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from analysis.circuit_evaluation import GradedTask, evaluate_masks, summary
from analysis.circuit_paths import connected, greedy, highest, leading_to_output
from analysis.edge_acdc import acdc, divergence_of
from analysis.edge_scores import EAP_IG_STEPS, edge_scores
from groundswell.config import ConfigError
from groundswell.protocols import Split
from models.edge_masks import Circuit
from models.edge_network import EdgeNetwork

Method = Literal["eap", "eap_ig", "acdc", "random"]
Selection = Literal["greedy", "highest"]
METHODS: tuple[Method, ...] = get_args(Method)
LABELS = {"edge_pruning": "Edge Pruning", "eap": "EAP", "eap_ig": "EAP-IG", "acdc": "ACDC", "random": "random edges"}
COLOURS = {
    "edge_pruning": "tab:red", "eap": "tab:blue", "eap_ig": "tab:purple", "acdc": "tab:green", "random": "0.55",
}  # fmt: skip
SHARES = (0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.5)  # of the graph's edges, where no counts are asked
# of the divergence in nats, as Conmy et al. 2023 (arXiv 2304.14997, figure 3) sweep it, in fewer steps
THRESHOLDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
RANDOM_SEEDS = 3
PACKED = 16  # circuits evaluated in one masked pass
PANELS = {  # measures of a figure: label, is the axis logarithmic
    "kl": ("KL from the whole network (nats)", True),
    "exact_match": ("exact match with the whole network", False),
    "logit_difference": ("logit difference", False),
    "probability_difference": ("probability difference", False),
}
MAX_PANELS = 3
FLOOR = 1e-5  # of a logarithmic axis: what is less is drawn here, down to the zero of the whole network


@dataclass(frozen=True)
class Ground:
    """What circuits are found and judged on."""

    network: EdgeNetwork
    task: GradedTask
    found_on: Split
    judged_on: Split
    corrupted: bool = True
    batch_size: int = 64
    measure: str | None = None  # of EAP and EAP-IG; none: the best suited

    @property
    def default_counts(self) -> list[int]:
        return sorted({max(1, round(share * self.network.graph.num_edges)) for share in SHARES})


@dataclass(frozen=True)
class Found:
    """A circuit and what it cost."""

    method: str
    setting: str  # count asked for, threshold, seed
    circuit: Circuit
    seconds: float = float("nan")  # of all circuits that came of the same scores


def find(
    ground: Ground,
    methods: Sequence[Method] = METHODS,
    counts: Sequence[int] = (),
    thresholds: Sequence[float] = THRESHOLDS,
    selection: Selection = "greedy",
    steps: int = EAP_IG_STEPS,
    told: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """Circuits of each method, without edges that carry nothing: those that do not lead to the output and, but for
    ablation by zero, where such writers still put out their biases, those that do not start at an embedding.

    Raises ConfigError for a number of edges that the graph does not have.
    """
    graph = ground.network.graph
    counts = list(counts) or ground.default_counts
    if min(counts) < 1 or max(counts) > graph.num_edges:
        raise ConfigError(f"edges: {min(counts)} to {max(counts)}; this graph has 1 to {graph.num_edges}")
    clean_up = connected if ground.corrupted else leading_to_output
    found: list[Found] = []
    for method in methods:
        start = time.monotonic()
        if method == "acdc":
            found += _by_threshold(ground, thresholds, told)
            continue
        for name, scores in _scored(ground, method, steps):
            seconds = time.monotonic() - start
            masks = (
                greedy(graph, scores, counts) if selection == "greedy" else [highest(graph, scores, n) for n in counts]
            )
            for count, mask in zip(counts, masks, strict=True):
                setting = f"{count} edges" + (f", {name}" if name else "")
                found.append(Found(method, setting, _circuit(ground, clean_up(graph, mask)), seconds))
        told(f"{LABELS[method]}: {time.monotonic() - start:.1f} s")
    return found


def _scored(ground: Ground, method: Method, steps: int) -> Iterator[tuple[str, Tensor]]:
    if method == "random":
        for seed in range(RANDOM_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            yield f"seed {seed}", torch.rand(ground.network.graph.num_edges, generator=generator)
        return
    yield (
        "",
        edge_scores(
            ground.network,
            ground.task,
            ground.found_on,
            ground.measure,
            steps if method == "eap_ig" else 1,
            ground.corrupted,
        ),
    )


def _by_threshold(ground: Ground, thresholds: Sequence[float], told: Callable[[str], None]) -> list[Found]:
    divergence = divergence_of(ground.network, ground.task, ground.found_on, ground.corrupted, ground.batch_size)
    found = []
    for threshold in thresholds:
        start = time.monotonic()
        circuit = _circuit(ground, acdc(ground.network.graph, divergence, threshold))
        found.append(Found("acdc", f"threshold {threshold:g}", circuit, time.monotonic() - start))
        told(f"ACDC, threshold {threshold:g}: {circuit.num_edges} edges, {found[-1].seconds:.1f} s")
    return found


def _circuit(ground: Ground, mask: Tensor) -> Circuit:
    graph = ground.network.graph
    return Circuit(graph, mask, torch.ones(graph.num_writers))


def judge(ground: Ground, found: Sequence[Found]) -> pd.DataFrame:
    """One row a circuit: method, setting, num_edges, edge_sparsity, seconds, means of the task's measures."""
    rows = []
    for start in range(0, len(found), PACKED):
        part = found[start : start + PACKED]
        masks, nodes = (torch.stack(x) for x in zip(*((f.circuit.mask, f.circuit.nodes) for f in part), strict=True))
        batch = max(1, ground.batch_size // len(part))
        measured = evaluate_masks(ground.network, masks, nodes, ground.task, ground.judged_on, ground.corrupted, batch)
        rows += [
            {"method": f.method, "setting": f.setting, **summary(f.circuit, values), "seconds": f.seconds}
            for f, values in zip(part, measured, strict=True)
        ]
    return pd.DataFrame(rows)


# ---- the figure ----


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One row of panels for each table of `judge`, under its title: each measure over the number of edges."""
    first = next(iter(tables.values()))
    measures = [name for name in PANELS if name in first][:MAX_PANELS]
    figure = Figure(figsize=(4.4 * len(measures) + 1.6, 3.6 * len(tables)), layout="constrained")
    grid = figure.subplots(len(tables), len(measures), squeeze=False)
    for axes, (title, table) in zip(grid, tables.items(), strict=True):
        for ax, measure in zip(axes, measures, strict=True):
            _draw_measure(ax, table, measure)
        axes[0].set_title(title, loc="left", fontsize=9)
    handles: dict[str, Artist] = {}
    for ax in grid.flat:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), list(handles), loc="outside right center", frameon=False)
    return figure


def _draw_measure(ax: Axes, table: pd.DataFrame, measure: str) -> None:
    label, logarithmic = PANELS[measure]
    if measure not in table:
        ax.set_axis_off()
        return
    for method, rows in table[table["num_edges"] > 0].groupby("method", sort=False):
        rows = rows.sort_values("num_edges")
        mine = method == "edge_pruning"
        ax.plot(
            rows["num_edges"],
            rows[measure].clip(lower=FLOOR) if logarithmic else rows[measure],
            color=COLOURS.get(str(method), "black"),
            marker="o",
            markersize=3.5,
            linewidth=1.8 if mine else 1.1,
            zorder=3 if mine else 2,
            label=LABELS.get(str(method), str(method)),
        )
    ax.set(xscale="log", xlabel="edges", ylabel=label)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=8)
    if logarithmic:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
