import json
from itertools import product

import pytest
import torch

from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph
from models.edge_masks import (
    Circuit,
    binary,
    effective_sparsity,
    find_threshold,
    load_edges,
    save_edges,
    sparsity,
    threshold_search,
)
from tests.models.edge_golden import gpt2_graph, llama_graph, notes, vectors

CASES = [
    (family, tag, case)
    for family, graph in (("gpt2", gpt2_graph), ("llama", llama_graph))
    for tag in ("emb", "noemb")
    for case in notes(f"{family}_tiny_cases")[tag]["cases"]
]
BINARY = [case for case in CASES if not case[2].startswith("soft")]
SOFT = [case for case in CASES if case[2].startswith("soft")]
GRAPHS = {"gpt2": gpt2_graph, "llama": llama_graph}


def case_of(family, tag, case):
    return GRAPHS[family](tag), notes(f"{family}_tiny_cases")[tag]["cases"][case]


def rows(masks):
    """A mask with a leading axis of two equal runs."""
    return masks.expand(2, -1)


@pytest.mark.parametrize(("family", "tag", "case"), BINARY)
def test_binary_masks_have_the_published_sparsities_and_edges(family, tag, case):
    graph, expected = case_of(family, tag, case)
    edges, nodes = vectors(f"{family}_tiny_cases", f"{tag}/{case}/mask/", graph)
    circuit = Circuit(graph, edges, nodes)
    assert sparsity(rows(edges)).tolist() == pytest.approx([expected["forward_model_edge_sparsity"]] * 2, abs=1e-6)
    assert sparsity(nodes) == pytest.approx(expected["forward_model_node_sparsity"], abs=1e-6)
    effective = expected["effective_edge_sparsity"]
    assert effective_sparsity(graph, rows(edges), rows(nodes)).tolist() == pytest.approx([effective] * 2, abs=1e-6)
    assert circuit.edges == [tuple(edge) for edge in expected["edges"]]
    assert circuit.num_edges == len(expected["edges"])
    assert circuit.edge_sparsity == pytest.approx(effective, abs=1e-6)


@pytest.mark.parametrize(("family", "tag", "case"), SOFT)
def test_the_threshold_search_takes_the_published_steps(family, tag, case):
    graph, expected = case_of(family, tag, case)
    edges, nodes = vectors(f"{family}_tiny_cases", f"{tag}/{case}/det_mask/", graph)
    assert sparsity(edges) == pytest.approx(expected["target_edge_sparsity"], abs=1e-6)
    # there the position node is left out of the nodes' sparsity
    counted = torch.tensor([name != "pos_embeds" for name in graph.writers])
    assert sparsity(nodes[counted]) == pytest.approx(expected["target_node_sparsity"], abs=1e-6)
    for kind, masks in (("edge", edges), ("node", nodes[counted])):
        trace = list(threshold_search(masks, expected[f"target_{kind}_sparsity"]))
        assert len(trace) == 17
        assert [threshold for threshold, _ in trace] == [threshold for threshold, _ in expected[f"{kind}_trace"]]
        found = [s for _, s in expected[f"{kind}_trace"]]
        assert [s for _, s in trace] == pytest.approx(found, abs=1e-6)
        assert find_threshold(masks) == expected[f"{kind}_threshold"]
    kept = Circuit(graph, binary(edges), (nodes > expected["node_threshold"]).float())
    assert kept.edges == [tuple(edge) for edge in expected["edges"]]
    assert kept.edge_sparsity == pytest.approx(expected["effective_edge_sparsity"], abs=1e-6)


def test_the_search_can_be_given_a_sparsity():
    masks = torch.linspace(0.01, 0.99, 200)
    for target in (0.0, 0.25, 0.9):
        assert sparsity(binary(masks, target)) == pytest.approx(target, abs=0.006)


def test_sparsity_is_exact_where_bfloat16_is_not():
    masks = torch.zeros(3_872_820, dtype=torch.bfloat16)
    masks[:1041] = 1
    assert float(sparsity(masks)) == pytest.approx(1 - 1041 / 3_872_820, abs=1e-7)
    assert float(sparsity(masks)) < 1


def test_an_edge_list_comes_back_exactly(tmp_path):
    graph = EdgeGraph(12, 12, 12, ("tok_embeds", "pos_embeds"))
    kept = [graph.edges[place] for place in torch.randperm(graph.num_edges)[:15].tolist()]
    save_edges(tmp_path / "edges.json", kept)
    circuit = load_edges(tmp_path / "edges.json", graph)
    assert set(circuit.edges) == set(kept)
    assert circuit.num_edges == 15
    save_edges(tmp_path / "again.json", circuit.edges)
    assert json.loads((tmp_path / "again.json").read_text()) == [list(edge) for edge in circuit.edges]


def test_an_edge_of_another_graph_is_named(tmp_path):
    save_edges(tmp_path / "edges.json", [("m0", "resid_post"), ("a7.h3", "m9")])
    with pytest.raises(ConfigError, match=r"edges\.json: edge a7\.h3 -> m9 is not in the graph of 3 layers"):
        load_edges(tmp_path / "edges.json", gpt2_graph("emb"))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not JSON"), ('{"a": 1}', "not an edge list"), ("[[1, 2]]", "not an edge list")]
)
def test_what_is_no_edge_list_is_refused(tmp_path, text, reason):
    (tmp_path / "edges.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_edges(tmp_path / "edges.json", gpt2_graph("emb"))
    with pytest.raises(ConfigError, match="No such file"):
        load_edges(tmp_path / "none.json", gpt2_graph("emb"))


def test_an_edge_whose_writer_is_off_is_not_listed():
    graph = EdgeGraph(1, 2, 2, ())
    for on, off in product(range(3), repeat=2):
        nodes = torch.ones(graph.num_writers)
        nodes[off] = 0
        mask = graph.mask_of([(graph.writers[on], "resid_post")])
        assert Circuit(graph, mask, nodes).num_edges == int(on != off)
