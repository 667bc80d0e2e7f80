"""Edges that lead somewhere, and selections by score: against plain searches over names."""

import pytest
import torch

from analysis.circuit_paths import connected, greedy, highest, inputs_of, leading_to_output, shared_edges, structure
from models.edge_graph import LAST_READER, EdgeGraph

GRAPHS = {
    "gpt2": EdgeGraph(3, 2, 2, ("tok_embeds", "pos_embeds")),
    "no embeddings": EdgeGraph(3, 2, 2),
    "grouped": EdgeGraph(3, 4, 2, ("embeds",)),
}


def random_mask(graph: EdgeGraph, seed: int, share: float = 0.12) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return (torch.rand(graph.num_edges, generator=source) < share).float()


def plain_leading(graph: EdgeGraph, edges: set) -> set:
    while True:
        writing = {writer for writer, _ in edges}
        read = {reader for writer in writing for reader in inputs_of(graph, writer)} | {LAST_READER}
        kept = {edge for edge in edges if edge[1] in read}
        if kept == edges:
            return kept
        edges = kept


def plain_connected(graph: EdgeGraph, edges: set) -> set:
    while True:
        kept = plain_leading(graph, edges)
        read = {reader for _, reader in kept}
        kept = {
            (writer, reader)
            for writer, reader in kept
            if not graph.embeddings or writer in graph.embeddings or read & set(inputs_of(graph, writer))
        }
        if kept == edges:
            return kept
        edges = kept


@pytest.mark.parametrize("name", GRAPHS)
def test_structure_agrees_with_names(name):
    graph = GRAPHS[name]
    parts = structure(graph)
    named = [(graph.writers[w], graph.readers[r]) for w, r in zip(parts.writer, parts.reader, strict=True)]
    assert named == list(graph.edges)


def test_heads_of_a_group_share_key_and_value():
    assert inputs_of(GRAPHS["grouped"], "a1.h3") == ["a1.h3.q", "a1.h1.k", "a1.h1.v"]
    assert inputs_of(GRAPHS["grouped"], "m2") == ["m2"]
    assert inputs_of(GRAPHS["gpt2"], "pos_embeds") == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", GRAPHS)
def test_dead_ends_against_plain_search(name, seed):
    graph = GRAPHS[name]
    mask = random_mask(graph, seed)
    edges = set(graph.listed(mask))
    assert set(graph.listed(leading_to_output(graph, mask))) == plain_leading(graph, edges)
    assert set(graph.listed(connected(graph, mask))) == plain_connected(graph, edges)


@pytest.mark.parametrize("name", GRAPHS)
def test_greedy_takes_the_best_edge_that_leads_to_what_is_there(name):
    graph = GRAPHS[name]
    scores = torch.randn(graph.num_edges, generator=torch.Generator().manual_seed(1))
    taken: list = []
    read = {LAST_READER}
    for _ in range(12):
        open_edges = [edge for edge in graph.edges if edge[1] in read and edge not in taken]
        best = max(open_edges, key=lambda edge: abs(scores[graph.index[edge]]))
        taken.append(best)
        read |= set(inputs_of(graph, best[0]))
    few, many = greedy(graph, scores, [5, 12])
    assert set(graph.listed(few)) == set(taken[:5])
    assert set(graph.listed(many)) == set(taken)
    assert torch.equal(leading_to_output(graph, many), many)


def test_highest_goes_by_magnitude():
    graph = GRAPHS["gpt2"]
    scores = torch.zeros(graph.num_edges)
    scores[7], scores[9], scores[11] = -3.0, 2.0, 1.0
    assert highest(graph, scores, 2).nonzero().flatten().tolist() == [7, 9]
    assert highest(graph, scores, 10**6).sum() == graph.num_edges


def test_shared_edges_keep_the_order_of_the_first():
    first = [("m0", "m1"), ("a0.h0", "m0"), ("m1", LAST_READER)]
    assert shared_edges([first, [first[2], first[0]]]) == [first[0], first[2]]
