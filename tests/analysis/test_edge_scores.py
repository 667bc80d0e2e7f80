"""Scores of edges: against the masked pass's own derivative, and finite differences."""

import pytest
import torch
from circuit_networks import VOCAB, GradedPairs, decoder_network, llama_network

from analysis.circuit_evaluation import grades, inputs
from analysis.edge_scores import LOG_PROBABILITY, edge_scores
from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph
from models.edge_network import EdgeNetwork, WholeRun
from models.edge_reference import masked_logits

TASK = GradedPairs()
SPLIT = TASK.build().train


def masked_gradient(network, measure: str, corrupted: bool = True) -> torch.Tensor:
    """Of the measure's mean with respect to all edge masks, at 1."""
    edges = torch.ones(1, network.graph.num_edges, requires_grad=True)
    clean, other = inputs(TASK, SPLIT.tokens, corrupted)
    logits = masked_logits(
        network, edges, None, clean[None], None if other is None else other[None], SPLIT.positions[None]
    )
    reference = network.run(clean, SPLIT.positions).logits
    grades(TASK, logits, reference, SPLIT)[measure].mean().backward()
    return edges.grad[0]


@pytest.mark.parametrize("corrupted", [True, False])
@pytest.mark.parametrize("mask_embeddings", [True, False])
def test_eap_is_the_gradient_with_respect_to_edge_masks(mask_embeddings, corrupted):
    network = decoder_network(mask_embeddings)
    scores = edge_scores(network, TASK, SPLIT, corrupted=corrupted, batch_size=4)
    expected = masked_gradient(network, "logit_difference", corrupted)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)


def test_eap_of_grouped_heads(tmp_path):
    network = llama_network(tmp_path)
    torch.testing.assert_close(
        edge_scores(network, TASK, SPLIT), masked_gradient(network, "logit_difference"), rtol=1e-3, atol=1e-5
    )


class NoLayers(EdgeNetwork):
    """Embeddings straight to logits that are no linear function of them."""

    width, num_outputs, device, dtype = 3, VOCAB, torch.device("cpu"), torch.float32
    graph = EdgeGraph(0, 1, 1, ("embeds",))

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, 3, generator=source)
        self.head = torch.randn(3, VOCAB, generator=source)

    def embeddings(self, tokens):
        return self.table[tokens][None]

    def attend(self, *arguments):
        raise AssertionError("there is no layer")

    mlp = attend

    def logits(self, x):
        return (x @ self.head).tanh()

    def run(self, tokens, positions, keep_writers=False):
        writers = self.embeddings(tokens)
        states = writers[0].gather(1, positions.unsqueeze(-1).expand(-1, -1, self.width))
        return WholeRun(self.logits(states), writers)


def test_integrated_gradients_add_up_to_the_change_of_the_measure():
    """Completeness (Sundararajan et al. 2017, proposition 1), where the only edge is that from the embeddings."""
    network = NoLayers()
    clean, other = (network.run(tokens, SPLIT.positions).logits for tokens in inputs(TASK, SPLIT.tokens, True))
    change = (TASK.grade(x, clean, SPLIT)["logit_difference"].mean() for x in (clean, other))
    found = edge_scores(network, TASK, SPLIT, steps=300)
    assert found.tolist() == pytest.approx([float(next(change) - next(change))], rel=1e-2)
    assert edge_scores(network, TASK, SPLIT).tolist() != pytest.approx(found.tolist(), rel=0.1)


def test_scores_of_integrated_gradients_have_a_gradient_where_the_clean_input_has_none():
    network = decoder_network()
    assert edge_scores(network, TASK, SPLIT, "kl").abs().max() < 1e-5
    assert edge_scores(network, TASK, SPLIT, "kl", steps=5).abs().max() > 1e-2


def test_batches_do_not_matter():
    network = decoder_network()
    first, second = (edge_scores(network, TASK, SPLIT, LOG_PROBABILITY, 3, batch_size=size) for size in (3, 10))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_measures_that_cannot_be_used():
    network = decoder_network()
    with pytest.raises(ConfigError, match="'accuracy' has no gradient"):
        edge_scores(network, TASK, SPLIT, "accuracy")
    with pytest.raises(ConfigError, match="no 'kendall_tau'; it has kl"):
        edge_scores(network, TASK, SPLIT, "kendall_tau")


def test_corrupted_inputs_are_needed():
    task = GradedPairs(pairs=False)
    with pytest.raises(ConfigError, match=r"task\.pairs"):
        edge_scores(decoder_network(), task, task.build().train)
    assert task.vocab_size == VOCAB
