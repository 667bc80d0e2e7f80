"""Circuits in the JSON that EAP-IG and MIB read."""

import pytest
import torch

from analysis.circuit_files import eap_ig_json, read_edges
from groundswell import ConfigError
from models.edge_graph import EdgeGraph
from models.edge_masks import Circuit

GPT2 = EdgeGraph(2, 2, 2, ("tok_embeds", "pos_embeds"))


def expected_names(num_layers: int, num_heads: int) -> set[str]:
    """As `Graph.from_model` of EAP-IG builds them."""
    sources, names = ["input"], set()
    for layer in range(num_layers):
        heads = [f"a{layer}.h{head}" for head in range(num_heads)]
        names |= {f"{source}->{head}<{part}>" for source in sources for head in heads for part in "qkv"}
        sources += heads
        names |= {f"{source}->m{layer}" for source in sources}
        sources.append(f"m{layer}")
    return names | {f"{source}->logits" for source in sources}


@pytest.mark.parametrize(
    "graph", [GPT2, EdgeGraph(2, 4, 2, ("embeds",)), EdgeGraph(2, 2, 1)], ids=["gpt2", "grouped", "no embeddings"]
)
def test_all_edges_have_their_names(graph):
    circuit = Circuit(graph, torch.zeros(graph.num_edges), torch.ones(graph.num_writers))
    found = eap_ig_json(circuit, 16)
    assert set(found["edges"]) == expected_names(graph.num_layers, graph.num_heads)
    assert set(found["nodes"]) == {name.split("->")[0] for name in found["edges"]} | {"logits"}
    assert not any(edge["in_graph"] for name, edge in found["edges"].items() if graph.embeddings or name[:5] != "input")


def test_embeddings_are_joined():
    edges = [("pos_embeds", "a0.h1.k"), ("tok_embeds", "m0"), ("a0.h1", "resid_post")]
    found = eap_ig_json(Circuit.of_edges(GPT2, edges), 16)
    kept = {name for name, edge in found["edges"].items() if edge["in_graph"]}
    assert kept == {"input->a0.h1<k>", "input->m0", "a0.h1->logits"}
    assert {name for name, edge in found["edges"].items() if edge["score"] == 1.0} == kept
    assert {name for name, node in found["nodes"].items() if node["in_graph"]} == {"input", "a0.h1", "logits"}


def test_a_shared_key_is_one_of_each_head():
    graph = EdgeGraph(1, 4, 2, ("embeds",))
    found = eap_ig_json(Circuit.of_edges(graph, [("embeds", "a0.h1.k")]), 16)
    assert {name for name, edge in found["edges"].items() if edge["in_graph"]} == {
        "input->a0.h2<k>", "input->a0.h3<k>"
    }  # fmt: skip


def test_scores_rank_all_edges():
    scores = torch.linspace(-1, 1, GPT2.num_edges)
    circuit = Circuit(GPT2, (scores > 0).float(), torch.ones(GPT2.num_writers))
    edges = eap_ig_json(circuit, 16, scores)["edges"]
    assert edges["a0.h0->m1"]["score"] == pytest.approx(float(scores[GPT2.index["a0.h0", "m1"]]))
    assert edges["input->m0"]["score"] == pytest.approx(float(scores[GPT2.index["pos_embeds", "m0"]]))


def test_edge_lists_that_are_none(tmp_path):
    path = tmp_path / "edges.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_edges(path)
    for text in ("{", "[1, 2]", '["abc"]'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not an edge list"):
            read_edges(path)
