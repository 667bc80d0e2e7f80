"""Circuits are judged one like many, and as a probe of pruning runs."""

import json

import numpy as np
import pytest
import torch
from circuit_networks import GradedPairs, decoder_network, pruning_experiment, write_decoder

from analysis.circuit_evaluation import CircuitEvaluation, choose_split, evaluate, evaluate_masks, inputs, summary
from groundswell import ConfigError
from groundswell.probes import Opened, run_probes, scalars
from groundswell.training.trainer import PackTrainer
from models import edge_reference
from models.edge_graph import EdgeGraph
from models.edge_masks import Circuit, load_edges

TASK = GradedPairs()
DATASET = TASK.build()
SPLIT = DATASET.evaluation["test"]


def masks(graph: EdgeGraph, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    draw = torch.rand(count, graph.num_edges + graph.num_writers, generator=source)
    edges, nodes = (draw < 0.6).float().split([graph.num_edges, graph.num_writers], 1)
    return edges, nodes


@pytest.mark.parametrize("corrupted", [True, False])
def test_many_circuits_at_once_are_one_after_the_other(corrupted):
    network = decoder_network()
    edges, nodes = masks(network.graph, 3)
    together = evaluate_masks(network, edges, nodes, TASK, SPLIT, corrupted, batch_size=4)
    clean, other = inputs(TASK, SPLIT.tokens, corrupted)
    reference = network.run(clean, SPLIT.positions).logits
    for found, edge, node in zip(together, edges, nodes, strict=True):
        ablated = None if other is None else other[None]
        logits = edge_reference.masked_logits(
            network, edge[None], node[None], clean[None], ablated, SPLIT.positions[None]
        )
        for name, expected in TASK.grade(logits[0], reference, SPLIT).items():
            np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-3, atol=1e-5)
        alone = evaluate(network, Circuit(network.graph, edge, node), TASK, SPLIT, corrupted)
        np.testing.assert_allclose(alone["kl"], found["kl"], rtol=1e-4, atol=1e-6)


def test_whole_network_and_nothing():
    network = decoder_network()
    graph = network.graph
    whole = Circuit(graph, torch.ones(graph.num_edges), torch.ones(graph.num_writers))
    values = summary(whole, evaluate(network, whole, TASK, SPLIT))
    assert values["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (values["exact_match"], values["edge_sparsity"], values["num_edges"]) == (1.0, 0.0, graph.num_edges)
    none = Circuit(graph, torch.zeros(graph.num_edges), torch.ones(graph.num_writers))
    assert summary(none, evaluate(network, none, TASK, SPLIT))["kl"] > 0.05


def test_mistakes():
    network = decoder_network()
    other = EdgeGraph(1, 1, 1)
    with pytest.raises(ConfigError, match="give the network that was pruned"):
        evaluate(network, Circuit(other, torch.ones(other.num_edges), torch.ones(2)), TASK, SPLIT)
    with pytest.raises(ConfigError, match="no split 'valid'; it has train, test"):
        choose_split(DATASET, "valid")
    assert len(choose_split(DATASET, "train", 3)) == 3


@pytest.fixture
def pruned(tmp_path, make_run):
    folder = make_run(pruning_experiment(write_decoder(tmp_path / "network")))
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    return folder


def test_probe_of_a_pruning_run(pruned):
    (path,) = run_probes(pruned, [CircuitEvaluation(max_examples=6)])
    found = scalars(path)
    model = pruned.experiment().model
    network = model.frozen("cpu")
    circuit = load_edges(path / "edges.json", network.graph)
    assert found["circuit/num_edges"] == circuit.num_edges
    assert found["circuit/edge_sparsity"] == pytest.approx(circuit.edge_sparsity)
    again = summary(circuit, evaluate(network, circuit, TASK, SPLIT.select(slice(0, 6))))
    for name in ("kl", "exact_match", "logit_difference"):
        assert found[f"circuit/{name}"] == pytest.approx(again[name], rel=1e-4, abs=1e-6)
    graph = json.loads((path / "graph.json").read_text())
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert (path / "circuit.svg").read_text().lstrip().startswith("<?xml")
    assert (path / "circuit.png").stat().st_size > 1000


@pytest.mark.parametrize("wanted", [None, 0.5, 0.75])
def test_probe_with_another_sparsity(tmp_path, wanted):
    experiment = pruning_experiment(write_decoder(tmp_path / "network"))
    specs = experiment.model.parameters(TASK.vocab_size, TASK.max_length)
    parameters = {spec.name: torch.full((1, *spec.shape), 8.0) for spec in specs}
    edges = parameters["masks.edges"]
    edges[0] = torch.linspace(-4, 4, edges.shape[1])
    found = CircuitEvaluation(edge_sparsity=wanted).run(Opened(experiment, 0, parameters)).scalars
    soft, _ = experiment.model.deterministic(parameters)
    target = 1 - float(soft.mean()) if wanted is None else wanted
    assert found["circuit/edge_sparsity"] == pytest.approx(target, abs=0.02)


def test_probe_says_what_it_cannot_ask(tiny, pruned):
    assert "Decoder has no edge masks" in CircuitEvaluation().objection(tiny)
    assert CircuitEvaluation().objection(pruned.experiment()) is None
    with pytest.raises(ConfigError, match="no split 'valid'"):
        run_probes(pruned, [CircuitEvaluation(split="valid")])
