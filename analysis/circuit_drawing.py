"""Drawings of circuits as PDF, PNG and SVG: by graphviz's `dot`, or by matplotlib where that is missing.

Both draw the same nodes, cleaned up as in Edge Pruning (Bhaskar et al. 2024, arXiv 2406.16778, published code): each
head has a node for what it writes, fed by nodes of its q, k and v; what leads nowhere is left out. One row is one stage
of a layer, from the embeddings at the top to the output at the bottom.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import graphviz
import numpy as np

from groundswell.config import ConfigError
from groundswell.files import atomic_write
from models.edge_graph import LAST_READER, Edge, EdgeGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "png", "svg")
EMBEDDINGS = "embeds"
COLOURS = {  # of kinds of nodes: the published colours, X11 names
    "embedding": "#bebebe", "mlp": "#8ee5ee", "q": "#ffbbff", "k": "#ffb6c1", "v": "#fff68f", "head": "#79cdcd",
    "output": "#f0ffff",
}  # fmt: skip
LINES = {  # an edge has its source's colour, darker, because boxes are filled and lines are thin
    "embedding": "#8c8c8c", "mlp": "#3aa0b0", "q": "#c060c0", "k": "#d0607a", "v": "#b8a520", "head": "#2f7f7f",
}  # fmt: skip
STAGES = {"q": 0, "k": 0, "v": 0, "head": 1, "mlp": 2}  # rows of a layer
DOT_SECONDS = 120  # more edges than `dot` can lay out in this time are drawn by matplotlib
DENSE = 200  # edges from which lines are thin and pale
SWEEPS = 24  # of the barycentre heuristic, which orders the nodes of a row (Sugiyama et al. 1981, section 4)
NODE_WIDTH = {False: 0.95, True: 0.56}  # inches from one node of a row to the next; dense drawings have short labels
ROW_HEIGHT = {False: 0.6, True: 1.0}  # inches


@dataclass(frozen=True)
class Node:
    name: str
    kind: str
    layer: int
    label: str

    @property
    def row(self) -> int:
        if self.kind == "embedding":
            return -1
        return 10**9 if self.kind == "output" else 3 * self.layer + STAGES[self.kind]


@dataclass(frozen=True)
class Drawing:
    """Nodes by name, and links between them; those from q, k and v to their own heads are no edges of the circuit."""

    nodes: Mapping[str, Node]
    links: Sequence[tuple[str, str]]

    @property
    def dense(self) -> bool:
        return len(self.links) > DENSE

    def label(self, name: str) -> str:
        label = self.nodes[name].label
        return label.removeprefix("Head ") if self.dense else label

    @property
    def rows(self) -> list[list[str]]:
        by_row: dict[int, list[str]] = {}
        for node in self.nodes.values():
            by_row.setdefault(node.row, []).append(node.name)
        return [sorted(by_row[row], key=_natural) for row in sorted(by_row)]


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ---- what is drawn ----


def drawing_of(edges: Iterable[Edge], graph: EdgeGraph | None = None, clean_up: bool = True) -> Drawing:
    """`graph` is needed for grouped heads only, where several heads read one k and v.

    Raises ConfigError for a name that is no writer or reader.
    """
    links = list(dict.fromkeys((_merged(writer), reader) for writer, reader in edges))
    group = graph.num_heads // graph.num_kv_heads if graph else 1
    heads = dict.fromkeys(source for source, _ in links if source.startswith("a"))
    inner = [(part, head) for head in heads for part in _parts(head, group)]
    links = inner + links
    while clean_up:
        sources, targets = {source for source, _ in links}, {target for _, target in links}
        kept = [
            (source, target)
            for source, target in links
            if (target in sources or target == LAST_READER) and (not _is_part(source) or source in targets)
        ]
        if len(kept) == len(links):
            break
        links = kept
    names = dict.fromkeys(name for link in links for name in link) | {LAST_READER: None}
    return Drawing({name: _node(name) for name in names}, links)


def _merged(writer: str) -> str:
    return EMBEDDINGS if writer.endswith("embeds") else writer


def _parts(head: str, group: int) -> list[str]:
    layer, number = head.split(".h")
    shared = int(number) // group
    return [f"{head}.q", f"{layer}.h{shared}.k", f"{layer}.h{shared}.v"]


def _is_part(name: str) -> bool:
    return name.endswith((".q", ".k", ".v"))


def _node(name: str) -> Node:
    if name == EMBEDDINGS:
        return Node(name, "embedding", -1, "Embeddings")
    if name == LAST_READER:
        return Node(name, "output", -1, "Output")
    found = re.fullmatch(r"m(\d+)|a(\d+)\.h(\d+)(?:\.([qkv]))?", name)
    if not found:
        raise ConfigError(f"edges: '{name}' is no part of a transformer; names are a0.h1, a0.h1.q, m0, {LAST_READER}")
    if found[1]:
        return Node(name, "mlp", int(found[1]), f"MLP {found[1]}")
    part = f".{found[4].upper()}" if found[4] else ""
    return Node(name, found[4] or "head", int(found[2]), f"Head {found[2]}.{found[3]}{part}")


# ---- files ----


def save_drawing(path: str | Path, edges: Iterable[Edge], graph: EdgeGraph | None = None, clean_up: bool = True) -> str:
    """Draw into a .pdf, .png or .svg file. Returns who drew it, dot or matplotlib. Raises ConfigError for another
    ending."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"{path}: cannot draw a '{path.suffix}' file; name it .{', .'.join(FORMATS)}")
    drawing = drawing_of(edges, graph, clean_up)
    drawn = _dot(drawing, kind)
    atomic_write(path, _matplotlib(drawing, kind) if drawn is None else drawn)
    return "matplotlib" if drawn is None else "dot"


def as_svg(edges: Iterable[Edge], graph: EdgeGraph | None = None) -> str:
    drawing = drawing_of(edges, graph)
    return (_dot(drawing, "svg") or _matplotlib(drawing, "svg")).decode()


def as_figure(edges: Iterable[Edge], graph: EdgeGraph | None = None) -> Figure:
    """By matplotlib, whatever is there."""
    return _figure(drawing_of(edges, graph))


def _matplotlib(drawing: Drawing, kind: str) -> bytes:
    buffer = io.BytesIO()
    _figure(drawing).savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


# ---- graphviz ----


def _dot(drawing: Drawing, kind: str) -> bytes | None:
    """None where `dot` is not there, fails, or takes too long."""
    if shutil.which("dot") is None:
        return None
    command = ["dot", f"-T{kind}"]
    try:
        done = subprocess.run(
            command, input=dot_source(drawing).encode(), capture_output=True, timeout=DOT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def dot_source(drawing: Drawing) -> str:
    """The drawing in graphviz's language."""
    dense = drawing.dense
    source = graphviz.Digraph(
        graph_attr={"nodesep": "0.02" if dense else "0.1", "ranksep": "1.0" if dense else "0.3", "dpi": "110"},
        node_attr={
            "shape": "box", "style": "filled,rounded", "fontname": "Helvetica", "fontsize": "11", "height": "0.25",
            "width": "0.3", "margin": "0.05,0.03", "penwidth": "0.6",
        },
        edge_attr={"arrowsize": "0.4", "penwidth": "0.5" if dense else "1.0"},
    )  # fmt: skip
    for row in drawing.rows:
        with source.subgraph(graph_attr={"rank": "same"}) as same:
            for name in row:
                node = drawing.nodes[name]
                same.node(name, drawing.label(name), fillcolor=COLOURS[node.kind])
    for first, second in zip(drawing.rows, drawing.rows[1:], strict=False):
        source.edge(first[0], second[0], style="invis")  # rows stay one below the other where nothing joins them
    for writer, reader in drawing.links:
        colour = LINES[drawing.nodes[writer].kind] + ("a0" if dense else "ff")
        source.edge(writer, reader, color=colour)
    return source.source


# ---- matplotlib ----


def _figure(drawing: Drawing) -> Figure:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    places, dense = _layout(drawing), drawing.dense
    xs, ys = np.array(list(places.values())).T
    left, right, bottom, top = xs.min() - 0.6, xs.max() + 0.6, ys.min() - 0.3, ys.max() + 0.3
    figure = Figure(figsize=(right - left, top - bottom))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_axis_off()
    curves = [_curve(places[writer], places[reader]) for writer, reader in drawing.links]
    colours = [LINES[drawing.nodes[writer].kind] for writer, _ in drawing.links]
    width, alpha = (0.5, 0.55) if dense else (1.1, 0.9)
    ax.add_collection(LineCollection(curves, colors=colours, linewidths=width, alpha=alpha))
    for name, (x, y) in places.items():
        colour = COLOURS[drawing.nodes[name].kind]
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "black", "linewidth": 0.5}
        ax.text(x, y, drawing.label(name), ha="center", va="center", fontsize=7.5, bbox=box)
    return figure


def _curve(start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """A line [points, 2] that leaves downwards and arrives from above."""
    t = np.linspace(0.0, 1.0, 24)[:, None]
    (x0, y0), (x1, y1) = start, end
    bend = 0.5 * (y0 - y1)
    points = np.array([[x0, y0], [x0, y0 - bend], [x1, y1 + bend], [x1, y1]])
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return weights @ points


def _layout(drawing: Drawing) -> dict[str, tuple[float, float]]:
    """Place of each node in inches. Each near the mean of its neighbours, no nearer to the next of its row than its
    width; q, k and v near their head."""
    neighbours: dict[str, list[str]] = {name: [] for name in drawing.nodes}
    for writer, reader in drawing.links:
        if {writer, reader}.isdisjoint((EMBEDDINGS, LAST_READER)):  # nearly all hang on these: no help for an order
            neighbours[writer].append(reader)
            neighbours[reader].append(writer)
    for writer, reader in drawing.links:
        if _is_part(writer):
            count = len(neighbours[writer])
            neighbours[writer] += [reader] * count  # a part is drawn to its head as much as to all others together
    rows, step = drawing.rows, NODE_WIDTH[drawing.dense]
    x = {name: step * (place - (len(row) - 1) / 2) for row in rows for place, name in enumerate(row)}
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {
                name: math.fsum(x[other] for other in near) / len(near) if (near := neighbours[name]) else x[name]
                for name in row
            }
            x |= _spread(sorted(row, key=lambda name: wanted[name]), wanted, step)
    middle = (min(x.values()) + max(x.values())) / 2
    x |= {name: middle for name in (EMBEDDINGS, LAST_READER) if name in x}
    return {name: (x[name], -y * ROW_HEIGHT[drawing.dense]) for y, row in enumerate(rows) for name in row}


def _spread(row: Sequence[str], wanted: Mapping[str, float], step: float) -> dict[str, float]:
    """Places at least one `step` apart, as near as may be to those wanted (pool adjacent violators: least squares)."""
    blocks: list[tuple[float, int]] = []  # sum and count of nodes that lie one step apart
    for place, name in enumerate(row):
        blocks.append((wanted[name] - place * step, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + count)
    levels = [total / count for total, count in blocks for _ in range(count)]
    return {name: level + place * step for place, (name, level) in enumerate(zip(row, levels, strict=True))}
