"""Greedy removal finds the known circuits of compiled programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from analysis.edge_greedy import greedy_circuit, same_answers
from models.edge_reference import masked_logits
from models.rasp import evaluate
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS, all_inputs

GOLDEN = Path(__file__).parents[1] / "golden" / "edge_pruning"


def network_of(name: str) -> TracrNetwork:
    program = PROGRAMS[name]
    return TracrNetwork(compile_program(program.expression, program.vocabulary, program.max_length))


@pytest.mark.parametrize(("name", "length", "first", "count"), [("reverse", 3, 1, 11), ("xproportion", 4, 0, 7)])
def test_known_circuits(name, length, first, count):
    """The running fraction at BOS, 0, is an answer; what reverse gives there is none."""
    network = network_of(name)
    sequences = list(all_inputs(PROGRAMS[name].vocabulary, length))
    tokens = network.encode(sequences)
    positions = torch.arange(first, length + 1).expand(len(tokens), -1)
    circuit = greedy_circuit(network, tokens, positions)
    stored = json.loads((GOLDEN / f"erazr_{name}.json").read_text())["greedy_minimal_edges_zero_ablation"]
    assert [list(edge) for edge in circuit.edges] == stored
    assert circuit.num_edges == count
    logits = masked_logits(network, circuit.mask[None], None, tokens[None], None, positions[None])[0]
    expected = [evaluate(PROGRAMS[name].expression, sequence) for sequence in sequences]
    if name == "reverse":
        assert network.decode(logits) == expected
    else:
        torch.testing.assert_close(logits[:, 1:, 0], torch.tensor(expected), atol=0.05, rtol=0)


def test_corrupted_inputs_take_the_place_of_removed_edges():
    """With a corrupted run the constant parts need no edge: fewer are left than under zero ablation."""
    network = network_of("xproportion")
    sequences = list(all_inputs("abx", 3))
    tokens, corrupted = network.encode(sequences), network.encode([[*s[1:], s[0]] for s in sequences])
    positions = torch.arange(4).expand(len(tokens), -1)
    zero = greedy_circuit(network, tokens, positions)
    interpolated = greedy_circuit(network, tokens, positions, corrupted)
    assert set(interpolated.edges) == {("token_embeds", "m0"), ("m0", "a1.h0.v"), ("a1.h0", "resid_post")}
    assert zero.num_edges == 7


def test_same_answers():
    expected = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert same_answers(expected * 0.1, expected).tolist() == [True]
    assert same_answers(expected.roll(1, 1), expected).tolist() == [False]
    numbers = torch.tensor([[[0.5], [0.25]], [[0.5], [0.25]]])
    assert same_answers(numbers + torch.tensor([0.04, 0.06])[:, None, None], numbers).tolist() == [True, False]
