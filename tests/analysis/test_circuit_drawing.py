"""Drawings of circuits: what is drawn, and files by dot and by matplotlib."""

import shutil
from itertools import pairwise

import pytest
import torch

from analysis import circuit_drawing
from analysis.circuit_drawing import NODE_WIDTH, as_figure, as_svg, dot_source, drawing_of, save_drawing
from groundswell import ConfigError
from models.edge_graph import EdgeGraph

EDGES = [
    ("tok_embeds", "a0.h0.k"),
    ("pos_embeds", "a0.h0.k"),
    ("a0.h0", "m0"),
    ("m0", "resid_post"),
    ("tok_embeds", "a1.h1.v"),  # of a head that nobody reads
    ("a0.h0", "a1.h1.q"),
]
MAGIC = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


def test_clean_up():
    drawing = drawing_of(EDGES)
    assert set(drawing.links) == {
        ("embeds", "a0.h0.k"), ("a0.h0.k", "a0.h0"), ("a0.h0", "m0"), ("m0", "resid_post"),
    }  # fmt: skip
    labels = {name: node.label for name, node in drawing.nodes.items()}
    assert labels == {
        "embeds": "Embeddings", "a0.h0.k": "Head 0.0.K", "a0.h0": "Head 0.0", "m0": "MLP 0", "resid_post": "Output",
    }  # fmt: skip


def test_without_clean_up_every_edge_is_there():
    links = drawing_of(EDGES, clean_up=False).links
    assert {("embeds", "a1.h1.v"), ("a0.h0", "a1.h1.q"), ("a0.h0.v", "a0.h0")} <= set(links)


def test_a_head_of_a_group_is_fed_by_the_groups_key():
    graph = EdgeGraph(1, 4, 2, ("embeds",))
    links = drawing_of([("embeds", "a0.h1.k"), ("a0.h2", "resid_post"), ("a0.h3", "resid_post")], graph).links
    assert {("a0.h1.k", "a0.h2"), ("a0.h1.k", "a0.h3")} <= set(links)


def test_nothing_is_left_of_an_empty_circuit():
    assert list(drawing_of([]).nodes) == ["resid_post"]
    assert as_svg([]).lstrip().startswith("<?xml")
    assert as_figure([])


def test_colours_of_the_source():
    text = dot_source(drawing_of(EDGES))
    assert '"Head 0.0.K"' in text and circuit_drawing.COLOURS["k"] in text
    line = next(line for line in text.splitlines() if "a0.h0.k" in line and "->" in line and "invis" not in line)
    assert circuit_drawing.LINES["embedding"] in line or circuit_drawing.LINES["k"] in line


@pytest.mark.parametrize("kind", MAGIC)
@pytest.mark.parametrize("by", ["dot", "matplotlib"])
def test_files(tmp_path, monkeypatch, by, kind):
    if by == "matplotlib":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif shutil.which("dot") is None:
        pytest.skip("graphviz is not installed")
    path = tmp_path / f"circuit.{kind}"
    assert save_drawing(path, EDGES) == by
    assert path.read_bytes().startswith(MAGIC[kind])


def test_a_dot_that_fails_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert save_drawing(tmp_path / "circuit.png", EDGES) == "matplotlib"


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot draw a '\.jpg' file; name it \.pdf, \.png, \.svg"):
        save_drawing(tmp_path / "circuit.jpg", EDGES)
    with pytest.raises(ConfigError, match="'layer3' is no part of a transformer"):
        save_drawing(tmp_path / "circuit.png", [("layer3", "resid_post")])


def test_layout_keeps_nodes_of_a_row_apart():
    graph = EdgeGraph(4, 6, 6, ("embeds",))
    mask = (torch.rand(graph.num_edges, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    drawing = drawing_of(graph.listed(mask), graph)
    places = circuit_drawing._layout(drawing)
    assert drawing.dense
    for row in drawing.rows:
        across = sorted(places[name][0] for name in row)
        assert all(b - a >= NODE_WIDTH[True] - 1e-6 for a, b in pairwise(across))
    assert all(places[writer][1] > places[reader][1] for writer, reader in drawing.links)
