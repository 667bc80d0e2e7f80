"""The compiler gives Tracr's weights, and the networks its outputs, with and without masked edges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.edge_reference import masked_logits
from models.tracr_compiler import CompiledProgram, compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS

GOLDEN = Path(__file__).parents[1] / "golden" / "edge_pruning"
ATTENTION = {"query": "query", "key": "key", "value": "value", "output": "linear"}
CASES = ("all", "r90", "r70")


@pytest.fixture(params=["reverse", "xproportion"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compiled(name) -> CompiledProgram:
    program = PROGRAMS[name]
    return compile_program(program.expression, program.vocabulary, program.max_length)


def description(name: str, kind: str = "tracr") -> dict:
    return json.loads((GOLDEN / f"{kind}_{name}.json").read_text())


def arrays(name: str, kind: str = "tracr") -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{kind}_{name}.npz") as stored:
        return dict(stored)


def all_places(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1]).expand(len(tokens), -1)


def test_sizes_and_vocabulary(name, compiled):
    config = description(name)["config"]
    network = TracrNetwork(compiled)
    found = (network.graph.num_layers, network.graph.num_heads, network.key_size, compiled.weights["first"].shape[2])
    assert found == tuple(config[key] for key in ("num_layers", "num_heads", "key_size", "mlp_hidden_size"))
    assert {str(value): number for number, value in enumerate(compiled.vocabulary)} == config["encoding_map"]
    numbered = [label.split(":")[0] for label in config["residual_labels"]]
    assert len(compiled.labels) == len(numbered)
    if name == "reverse":  # the other was compiled after it there, and its numbers go on
        assert list(compiled.labels) == config["residual_labels"]


def test_weights(name, compiled):
    golden, ours = arrays(name), compiled.weights
    pairs = [("tokens", "token_embed_embeddings"), ("positions", "pos_embed_embeddings")]
    for key, theirs in pairs:
        np.testing.assert_array_equal(ours[key], golden[f"param/{theirs}"])
    np.testing.assert_array_equal(ours["unembedding"], golden["unembedding_mtx"])
    for layer in range(len(ours["query"])):
        start = f"param/transformer/layer_{layer}"
        for key, theirs in ATTENTION.items():
            np.testing.assert_allclose(ours[key][layer, 0], golden[f"{start}/attn/{theirs}_w"], atol=2e-6, rtol=0)
        for key, theirs in (("first", "linear_1"), ("second", "linear_2")):
            np.testing.assert_allclose(ours[key][layer], golden[f"{start}/mlp/{theirs}_w"], atol=2e-6, rtol=1e-7)
    biases = [value for key, value in golden.items() if key.startswith("param/") and key.endswith("_b")]
    assert biases and not any(value.any() for value in biases)  # the reason why there are none here


def test_all_inputs(name, compiled):
    golden, text = arrays(name), description(name)
    network = TracrNetwork(compiled)
    tokens = torch.from_numpy(golden["token_ids"])
    inputs = [[int(x) if x.isdigit() else x for x in row[1:]] for row in text["inputs"]]
    assert torch.equal(network.encode(inputs), tokens)
    run = network.run(tokens, all_places(tokens), keep_writers=True)
    np.testing.assert_allclose(run.residual[-1], golden["final_residual"], atol=2e-5)
    decoded = [row[1:] for row in text["decoded"]]
    if name == "reverse":
        assert network(inputs) == decoded
    else:
        np.testing.assert_allclose(network(inputs), np.array(decoded), atol=2e-5)


def outputs(logits: torch.Tensor, stored: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Ours, and the part of the original's that is ours: it puts out the whole residual of a numerical program."""
    return logits, stored[..., : logits.shape[-1]]


def test_the_whole_network_in_torch(name, compiled):
    golden = arrays(name, "erazr")
    network, tokens = TracrNetwork(compiled), torch.from_numpy(golden["token_ids"])
    run = network.run(tokens, all_places(tokens), keep_writers=True)
    np.testing.assert_allclose(*outputs(run.logits, golden["full_out"]), atol=2e-5)
    np.testing.assert_allclose(run.writers, golden["full_writer_states"], atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_masked_edges(name, compiled, case):
    golden, text = arrays(name, "erazr"), description(name, "erazr")
    network, tokens = TracrNetwork(compiled), torch.from_numpy(golden["token_ids"])
    graph = network.graph
    assert (graph.num_edges, graph.num_writers, graph.num_readers) == tuple(
        text[key] for key in ("n_edges", "n_writers", "n_readers")
    )
    expected = text["cases"][case]
    mask = graph.mask_of(expected["edges"])
    assert [list(edge) for edge in graph.listed(mask)] == expected["edges"]
    assert 1 - mask.mean().item() == pytest.approx(expected["model_edge_sparsity"], abs=1e-6)
    logits = masked_logits(network, mask[None], None, tokens[None], None, all_places(tokens)[None])
    np.testing.assert_allclose(*outputs(logits[0], golden[f"{case}/out"]), atol=2e-5)
