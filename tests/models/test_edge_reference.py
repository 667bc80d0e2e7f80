"""The masked pass as it is defined, against recorded passes of the published code."""

import pytest
import torch

from models.edge_loading import load_edge_network
from models.edge_reference import masked_logits, masked_stream
from tests.models.edge_golden import arrays, notes, vectors, write_network

CASES = [
    (family, tag, case)
    for family in ("gpt2", "llama")
    for tag in ("emb", "noemb")
    for case in notes(f"{family}_tiny_cases")[tag]["cases"]
]
BINARY = [case for case in CASES if not case[2].startswith("soft")]
SOFT = [case for case in CASES if case[2].startswith("soft")]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return {
        (family, tag): load_edge_network(
            write_network(family, tmp_path_factory.mktemp(family)), mask_embeddings=tag == "emb"
        )
        for family in ("gpt2", "llama")
        for tag in ("emb", "noemb")
    }


def inputs(family):
    """clean, corrupted [1, B, T], all positions [1, B, T]."""
    recorded = arrays(f"{family}_tiny_cases")
    clean, corrupted = recorded["input_ids"][None], recorded["corr_input_ids"][None]
    return clean, corrupted, torch.arange(clean.shape[-1]).expand_as(clean)


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(("family", "tag", "case"), BINARY)
def test_logits_of_binary_masks_are_the_published_ones(networks, family, tag, case):
    network, recorded = networks[family, tag], arrays(f"{family}_tiny_cases")
    clean, corrupted, positions = inputs(family)
    edges, nodes = vectors(f"{family}_tiny_cases", f"{tag}/{case}/mask/", network.graph)
    found = masked_logits(network, edges[None], nodes[None], clean, corrupted, positions)
    close(found[0], recorded[f"{tag}/{case}/logits"])
    exact = recorded[f"{tag}/exact_full/corr_writer_states"]
    if f"{tag}/{case}/writer_states" in recorded:
        states = masked_stream(network, edges[None], nodes[None], clean, exact)[1]
        close(states, recorded[f"{tag}/{case}/writer_states"])
    found = masked_logits(network, edges[None], nodes[None], clean, None, positions, corrupted_writers=exact)
    close(found[0], recorded[f"{tag}/{case}/logits"])
    if f"{tag}/{case}/logits_zero_ablation" in recorded:
        found = masked_logits(network, edges[None], nodes[None], clean, None, positions)
        close(found[0], recorded[f"{tag}/{case}/logits_zero_ablation"])


@pytest.mark.parametrize(("family", "tag", "case"), SOFT)
def test_logits_of_soft_masks_are_the_published_ones(networks, family, tag, case):
    """The published corrupted states come from masks of 0.9999938, ours from the network itself."""
    network, recorded = networks[family, tag], arrays(f"{family}_tiny_cases")
    clean, corrupted, positions = inputs(family)
    edges, nodes = vectors(f"{family}_tiny_cases", f"{tag}/{case}/det_mask/", network.graph)
    soft = recorded[f"{tag}/soft_full/corr_writer_states"]
    found = masked_logits(network, edges[None], nodes[None], clean, None, positions, corrupted_writers=soft)
    close(found[0], recorded[f"{tag}/{case}/logits_soft"])
    found = masked_logits(network, edges[None], nodes[None], clean, corrupted, positions)
    close(found[0], recorded[f"{tag}/{case}/logits_soft"], atol=5e-5)
    thresholds = notes(f"{family}_tiny_cases")[tag]["cases"][case]
    binary = (edges > thresholds["edge_threshold"]).float(), (nodes > thresholds["node_threshold"]).float()
    found = masked_logits(network, binary[0][None], binary[1][None], clean, None, positions, corrupted_writers=soft)
    close(found[0], recorded[f"{tag}/{case}/logits_thresholded"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tag", ["emb", "noemb"])
def test_with_all_masks_on_it_is_the_network(networks, family, tag):
    network = networks[family, tag]
    clean, corrupted, positions = inputs(family)
    ones = torch.ones(1, network.graph.num_edges)
    for other in (corrupted, None):
        found = masked_logits(network, ones, None, clean, other, positions)
        close(found[0], arrays(f"{family}_tiny_cases")["hf_clean_logits"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_runs_equal_one_by_one(networks, family):
    network = networks[family, "emb"]
    clean, corrupted, positions = inputs(family)
    source = torch.Generator().manual_seed(0)
    edges = torch.rand(3, network.graph.num_edges, generator=source).requires_grad_()
    nodes = torch.rand(3, network.graph.num_writers, generator=source).requires_grad_()
    shared = masked_logits(network, edges, nodes, clean, corrupted, positions)
    grads = torch.autograd.grad(shared.square().sum(), (edges, nodes))
    own = [x.expand(3, -1, -1) for x in (clean, corrupted, positions)]
    close(masked_logits(network, edges, nodes, *own), shared, atol=1e-6)
    for run in range(3):
        one = [x[run : run + 1].detach().requires_grad_() for x in (edges, nodes)]
        logits = masked_logits(network, *one, clean, corrupted, positions)
        close(logits[0], shared[run].detach(), atol=1e-6)
        for mine, packed in zip(torch.autograd.grad(logits.square().sum(), one), grads, strict=True):
            close(mine[0], packed[run], atol=2e-4)


def test_a_row_ends_with_its_last_answer(networks):
    network = networks["gpt2", "emb"]
    clean, corrupted, _ = inputs("gpt2")
    positions = torch.tensor([[[4], [6], [2]]])
    edges = torch.rand(1, network.graph.num_edges, generator=torch.Generator().manual_seed(0))
    found = masked_logits(network, edges, None, clean, corrupted, positions)
    padded = [x.masked_fill(torch.arange(x.shape[-1]) > positions, 0) for x in (clean, corrupted)]
    close(masked_logits(network, edges, None, *padded, positions), found, atol=1e-6)


def test_position_embeddings_cannot_matter_beside_a_corrupted_run(networks):
    network = networks["gpt2", "emb"]
    clean, corrupted, positions = inputs("gpt2")
    graph = network.graph
    edges = torch.rand(1, graph.num_edges, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masked_logits(network, edges, None, clean, corrupted, positions).square().sum().backward()
    from_positions = graph.writer_index == graph.writers.index("pos_embeds")
    assert edges.grad[0, from_positions].abs().max() < 1e-5
    assert edges.grad[0, ~from_positions].abs().max() > 1e-3
