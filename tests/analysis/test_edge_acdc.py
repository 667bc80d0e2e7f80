"""ACDC with packed guesses takes the decisions of the sequential algorithm, one pass an edge."""

import pytest
import torch
from circuit_networks import GradedPairs, decoder_network, llama_network

from analysis.circuit_evaluation import evaluate_masks
from analysis.circuit_paths import inputs_of, structure
from analysis.edge_acdc import acdc, divergence_of
from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph

TASK = GradedPairs()
SPLIT = TASK.build().train


def sequential(graph: EdgeGraph, divergence, threshold: float) -> torch.Tensor:
    """Algorithm 1 of Conmy et al. 2023 in plain words."""
    mask = torch.ones(graph.num_edges)
    current = float(divergence(mask[None])[0])
    for reader in reversed(graph.readers):
        for writer in reversed(graph.writers):
            if (writer, reader) not in graph.index:
                continue
            tried = mask.clone()
            tried[graph.index[writer, reader]] = 0.0
            value = float(divergence(tried[None])[0])
            if value - current < threshold:
                mask, current = tried, value
    return mask


def counted(divergence):
    def count(masks):
        count.passes += 1
        return divergence(masks)

    count.passes = 0
    return count


@pytest.mark.parametrize("threshold", [1e-4, 1e-3, 1e-2])
def test_decisions_are_sequential(threshold):
    network = decoder_network()
    divergence = counted(divergence_of(network, TASK, SPLIT))
    found = acdc(network.graph, divergence, threshold)
    passes, divergence.passes = divergence.passes, 0
    assert torch.equal(found, sequential(network.graph, divergence, threshold))
    assert passes < divergence.passes
    assert 0 < found.sum() < network.graph.num_edges


@pytest.mark.slow
def test_grouped_heads_and_no_embedding_writers(tmp_path):
    network = llama_network(tmp_path, mask_embeddings=False)
    divergence = divergence_of(network, TASK, SPLIT)
    assert torch.equal(acdc(network.graph, divergence, 1e-2), sequential(network.graph, divergence, 1e-2))


def test_any_divergence_and_any_number_of_guesses():
    """A sum of weights with interactions, where a removal makes another edge matter."""
    graph = EdgeGraph(2, 2, 2, ("embeds",))
    source = torch.Generator().manual_seed(0)
    weight = torch.rand(graph.num_edges, generator=source, dtype=torch.float64) ** 3
    pairs = torch.rand(graph.num_edges, graph.num_edges, generator=source, dtype=torch.float64) ** 8
    # only edges into writers that are read count, as in a network
    reads = structure(graph).reader

    def divergence(masks):
        rows = []
        for mask in masks.double():
            live = torch.zeros(graph.num_readers, dtype=torch.bool)
            live[-1] = True
            for writer in reversed(range(graph.num_writers)):
                if (mask[(graph.writer_index == writer) & live[reads]] > 0).any():
                    for name in inputs_of(graph, graph.writers[writer]):
                        live[graph.readers.index(name)] = True
            gone = (1 - mask) * live[reads]
            rows.append(gone @ weight + gone @ pairs @ gone)
        return torch.stack(rows)

    found = {guesses: acdc(graph, divergence, 0.3, guesses) for guesses in (1, 3, 32)}
    assert 0 < found[1].sum() < graph.num_edges
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[1], found[32])


def test_divergence_is_the_kl_of_the_evaluation():
    network = decoder_network()
    masks = (torch.rand(3, network.graph.num_edges, generator=torch.Generator().manual_seed(2)) < 0.7).float()
    by_batch = divergence_of(network, TASK, SPLIT, batch_size=4)(masks)
    whole = evaluate_masks(network, masks, None, TASK, SPLIT)
    assert by_batch.tolist() == pytest.approx([values["kl"].mean() for values in whole], rel=1e-4)


def test_compiled_program_keeps_the_edges_that_it_needs():
    """The reversal of three tokens as compiled by Tracr, under ablation by zero, has a circuit of 11 edges."""
    from models.tracr_compiler import compile_program
    from models.tracr_network import TracrNetwork
    from models.tracr_programs import reverse
    from tasks.tracr_tasks import TracrReverse

    network = TracrNetwork(compile_program(reverse(), ("1", "2", "3"), 5))
    task = TracrReverse(size=3)
    split = task.build().evaluation["test"]
    mask = acdc(network.graph, divergence_of(network, task, split, corrupted=False), 0.01)
    assert (len(split), network.graph.num_edges, int(mask.sum())) == (27, 94, 11)
    values = evaluate_masks(network, mask[None], None, task, split, corrupted=False)[0]
    assert values["accuracy"].mean() == 1.0


def test_negative_threshold():
    with pytest.raises(ConfigError, match="threshold -1"):
        acdc(EdgeGraph(1, 1, 1), lambda masks: masks.sum(1), -1.0)
