"""Tracing inside a circuit: of the whole network it is causal tracing; of a circuit, the masked pass of the oracle."""

import dataclasses

import numpy as np
import pytest
import torch

from analysis import causal_tracing
from analysis.circuit_tracing import CircuitRunner, Patch, interchange, strengths
from analysis.grokked_circuit import inside, stage_matrix
from analysis.grokked_circuit_report import CircuitFound, choose
from analysis.logit_lens import lens_ranks
from models import edge_reference
from models.decoder import Decoder
from models.edge_gpt2 import from_tensors
from models.edge_masks import Circuit
from tasks.composition import Composition
from tasks.composition_pairs import PROMPT, CompositionPairs

BASE = Composition(
    num_entities=12, num_relations=6, out_degree=6, phi=3, ood_fraction=0.1, iid_fraction=0.2, predict_stop=False
)
TASK = CompositionPairs(base=BASE)
EXAMPLES = BASE.tracing_examples(BASE.build(), "train_inferred", 20, 0)
OTHERS = torch.from_numpy(TASK.counterparts(EXAMPLES.prompts.numpy())[0][:, :PROMPT])
DECODER = Decoder(num_layers=3, num_heads=2, width=8)


@pytest.fixture(scope="module")
def tensors():
    """Weights large enough that every part matters, and a network that is sometimes right."""
    source = torch.Generator().manual_seed(3)
    return {
        spec.name: torch.randn(spec.shape, generator=source) * (0.4 if spec.init_std else 0.0) + spec.init_value
        for spec in DECODER.parameters(BASE.vocab_size, BASE.max_length)
    }


def whole(graph):
    return Circuit(graph, torch.ones(graph.num_edges), torch.ones(graph.num_writers))


def random_circuit(graph, share=0.7):
    source = torch.Generator().manual_seed(1)
    masks = (torch.rand(graph.num_edges + graph.num_writers, generator=source) < share).float()
    return Circuit(graph, *masks.split([graph.num_edges, graph.num_writers]))


def test_in_the_whole_network_it_is_causal_tracing_and_logit_lens(tensors):
    network = from_tensors(DECODER, tensors, mask_embeddings=True)
    runner = CircuitRunner(network, whole(network.graph), OTHERS)
    answers = runner.run(EXAMPLES.prompts).best  # what an untrained network says is right by definition
    examples = dataclasses.replace(EXAMPLES, answers=answers)
    parameters = {name: tensor[None] for name, tensor in tensors.items()}
    table = causal_tracing.summarise(causal_tracing.trace(DECODER, parameters, examples), examples)
    for role, found in strengths(runner, examples).items():
        expected = table[table["role"] == role].sort_values("layer")["strength"].to_numpy()
        np.testing.assert_allclose(found, expected[: len(found)])
        assert found.max() > 0
    ranks = lens_ranks(DECODER, parameters, examples)[0, :, 1]  # of the bridge entity, at r1
    found = runner.lens(runner.run(EXAMPLES.prompts), 1, EXAMPLES.readings["b"].tokens)
    np.testing.assert_array_equal(found, ranks)


@pytest.mark.parametrize("mask_embeddings", [True, False])
def test_a_circuit_runs_as_the_oracle_says(tensors, mask_embeddings):
    network = from_tensors(DECODER, tensors, mask_embeddings)
    circuit = random_circuit(network.graph)
    found = CircuitRunner(network, circuit, OTHERS).run(EXAMPLES.prompts)
    last = torch.full((1, len(EXAMPLES), 1), PROMPT - 1)
    edges, nodes = circuit.mask[None], circuit.nodes[None]
    expected = edge_reference.masked_logits(network, edges, nodes, EXAMPLES.prompts[None], OTHERS[None], last)
    torch.testing.assert_close(found.logits, expected[0, :, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask_embeddings", [True, False])
def test_patches_in_a_circuit(tensors, mask_embeddings):
    network = from_tensors(DECODER, tensors, mask_embeddings)
    circuit = random_circuit(network.graph)
    circuit.nodes[: len(network.graph.embeddings)] = 1  # without tokens no prompt would matter
    runner = CircuitRunner(network, circuit, OTHERS)
    normal, other = runner.run(EXAMPLES.prompts), runner.run(OTHERS)
    for layer in (1, 2):
        itself = runner.run(EXAMPLES.prompts, Patch(layer, 1, 2, normal))
        torch.testing.assert_close(itself.logits, normal.logits)
        everything = runner.run(EXAMPLES.prompts, Patch(layer, 0, PROMPT, other))
        torch.testing.assert_close(everything.logits, other.logits, atol=1e-5, rtol=1e-4)
        first = runner.run(EXAMPLES.prompts, Patch(layer, 0, 2, other))
        assert not torch.allclose(first.logits, normal.logits, atol=1e-3)


def test_interchange_counts_answers_that_follow(tensors):
    runner = CircuitRunner(network := from_tensors(DECODER, tensors, True), whole(network.graph), OTHERS)
    says, other_says = runner.run(EXAMPLES.prompts).best, runner.run(OTHERS).best
    stays = interchange(runner, EXAMPLES.prompts, EXAMPLES.prompts, 1, says, says)
    np.testing.assert_array_equal(stays, [1, 1])
    # the last position holds all that the answer is read from
    follows = interchange(runner, EXAMPLES.prompts, OTHERS, 2, says, other_says)
    assert 0 < follows[0] <= 1 and follows[1] <= 1
    nobody = interchange(runner, EXAMPLES.prompts, OTHERS, 1, (says + 1) % 12, other_says)
    assert np.isnan(nobody).all()


def test_measures_by_layer(tensors):
    network = from_tensors(DECODER, tensors, True)
    table = inside(network, whole(network.graph), TASK, EXAMPLES)
    layers = table.groupby("measure")["layer"].apply(list).to_dict()
    assert layers == {
        "mrr": [0, 1, 2, 3],
        **{name: [1, 2] for name in ("kept", "moved", "strength/h", "strength/r1", "strength/r2")},
    }


def test_stages(tensors):
    graph = from_tensors(DECODER, tensors, True).graph
    shares, names = stage_matrix(whole(graph))
    assert names == ["emb", "A1", "M1", "A2", "M2", "A3", "M3", "out"]
    assert (shares[np.triu_indices(8, 1)] == 1).all()
    assert np.isnan(shares[np.tril_indices(8)]).all()
    one = Circuit.of_edges(graph, [("a0.h1", "m0"), ("m0", "resid_post")])
    shares, _ = stage_matrix(one)
    assert shares[names.index("A1"), names.index("M1")] == 0.5
    assert shares[names.index("M1"), names.index("out")] == 1
    assert np.nansum(shares) == 1.5


def test_choice_of_circuits():
    def found(step, edges, match):
        scalars = {"bridge/circuit/num_edges": edges, "bridge/circuit/all/exact_match": match}
        return CircuitFound("name", step, scalars, 0.5, None)

    circuits = [found(9, 300, 0.99), found(9, 200, 0.9), found(9, 100, 0.5), found(2, 300, 0.8), found(2, 100, 0.6)]
    assert [(x.step, x.edges) for x in choose(circuits)] == [(2, 300), (9, 200)]
