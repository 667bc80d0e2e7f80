"""The edge graph: counts, names and order of the published code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph
from tests.models.edge_golden import notes

EMBEDDINGS = ("tok_embeds", "pos_embeds")
CASES = notes("gpt2_tiny_cases")


def tiny(tag: str) -> EdgeGraph:
    return EdgeGraph(3, 4, 4, EMBEDDINGS if tag == "emb" else ())


@pytest.mark.parametrize("tag", ["emb", "noemb"])
def test_names_are_those_of_the_published_code(tag):
    graph, recorded = tiny(tag), CASES[tag]
    assert list(graph.writers) == recorded["writers"]
    assert list(graph.readers) == recorded["readers"]
    assert (graph.num_edges, graph.num_readers, graph.num_writers) == (
        recorded["n_edges"],
        recorded["n_readers"],
        recorded["n_writers"],
    )


@pytest.mark.parametrize("tag", ["emb", "noemb"])
def test_edge_lists_keep_their_order(tag):
    graph = tiny(tag)
    for case in CASES[tag]["cases"].values():
        assert [list(edge) for edge in graph.listed(graph.mask_of(case["edges"]))] == case["edges"]


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "embeddings", "edges", "readers"),
    [
        (12, 12, 12, EMBEDDINGS, 32_936, 445),
        (12, 12, 12, (), 32_046, 445),
        (24, 16, 16, EMBEDDINGS, 233_054, 1_177),
        (36, 20, 20, EMBEDDINGS, 812_900, 2_197),
        (48, 25, 25, EMBEDDINGS, 2_238_674, 3_649),
        (32, 32, 32, ("embeds",), 1_592_881, 3_105),
        (40, 40, 40, (), 3_872_820, 4_841),
        (4, 1, 1, ("token_embeds", "pos_embeds"), 94, 17),
        (2, 1, 1, ("token_embeds", "pos_embeds"), 32, 9),
    ],
)
def test_sizes_of_published_graphs(layers, heads, kv_heads, embeddings, edges, readers):
    graph = EdgeGraph(layers, heads, kv_heads, embeddings)
    assert (graph.num_edges, graph.num_readers) == (edges, readers)


def test_grouped_key_value_heads_have_fewer_readers():
    graph = EdgeGraph(2, 4, 2)
    assert graph.readers_per_layer == 4 + 2 * 2 + 1
    # layer 0 sees no writers but the MLP its 4 heads; layer 1: 5 before; the last reader all 10
    assert graph.num_edges == 4 + (4 + 2 * 2) * 5 + (5 + 4) + 10


sizes = st.tuples(st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(0, 2))


@given(sizes)
def test_every_edge_has_one_place(size):
    layers, (heads, kv_heads), count = size
    graph = EdgeGraph(layers, heads, kv_heads, EMBEDDINGS[:count])
    assert len(set(graph.edges)) == len(graph.edges) == graph.num_edges
    places = torch.arange(graph.num_edges)
    both = [(graph.reads(places, layer), graph.own_heads(places, layer)) for layer in range(layers)]
    parts = [part.flatten() for pair in both for part in pair]
    assert torch.equal(torch.cat([*parts, graph.last(places)]), places)
    for layer in range(layers):
        block = graph.reads(places, layer)
        for row, reader in enumerate(graph.layer_readers(layer)):
            found = [graph.edges[place] for place in block[row].tolist()]
            assert found == [(writer, reader) for writer in graph.writers[: block.shape[1]]]


def test_a_masked_writer_takes_its_edges_along():
    graph = tiny("emb")
    nodes = torch.ones(graph.num_writers)
    nodes[graph.writers.index("a1.h2")] = 0
    found = graph.listed(torch.ones(graph.num_edges), nodes)
    assert len(found) == graph.num_edges - sum(writer == "a1.h2" for writer, _ in graph.edges)
    assert not any(writer == "a1.h2" for writer, _ in found)


@pytest.mark.parametrize("edge", [("a2.h0", "a1.h0.q"), ("m0", "a0.h1.k"), ("a0.h0",), ("a0.h9", "m1")])
def test_an_edge_of_another_graph_is_named(edge):
    with pytest.raises(ConfigError, match=" -> ".join(edge)):
        tiny("emb").mask_of([edge])
