"""Compiled programs do what their text means, at any length and vocabulary."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from groundswell.config import ConfigError
from models.edge_loading import load_edge_network
from models.rasp import (
    Aggregate,
    Expression,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    Value,
    evaluate,
    indices,
    tokens,
)
from models.tracr_compiler import compile_program
from models.tracr_network import TracrNetwork
from models.tracr_programs import PROGRAMS, all_inputs, histogram, reverse, sort, xproportion

ALWAYS = Select(tokens, tokens, lambda key, query: True)
NEIGHBOURS = Select(indices, indices, lambda key, query: abs(key - query) == 1)
EXTRA: dict[str, Expression] = {
    "shift": Aggregate(Select(indices, indices, lambda key, query: key == query - 1), tokens),
    "two heads in a layer": SequenceMap(
        lambda left, right: f"{left}{right}",
        Aggregate(Select(indices, indices, lambda key, query: key == max(query - 1, 0)), tokens),
        Aggregate(Select(indices, indices, lambda key, query: key == query // 2), tokens),
    ),
    "attention beside a map": Aggregate(
        Select(Map(lambda token: token * 2, tokens), histogram(), lambda key, query: key >= query),
        Map(lambda token: -1.5 * token, tokens, to_numbers=True),
    ),
    "both arguments the same": SequenceMap(operator.add, tokens, tokens),
    "a map without a value": Map(lambda token: None if token == 2 else token, tokens),
    "width of few": SelectorWidth(NEIGHBOURS),
    "the input": tokens,
}


def network(program: Expression, vocabulary, max_length: int) -> TracrNetwork:
    return TracrNetwork(compile_program(program, vocabulary, max_length))


def check(program: Expression, compiled: TracrNetwork, sequences: list[tuple[Value, ...]]) -> None:
    expected = [evaluate(program, sequence) for sequence in sequences]
    found = compiled(sequences)
    if program.numerical:
        np.testing.assert_allclose(found, expected, atol=1e-3)
    else:
        assert found == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_on_all_inputs(name):
    program = PROGRAMS[name]
    compiled = network(program.expression, program.vocabulary, program.max_length)
    for length in range(1, program.max_length + 1):
        check(program.expression, compiled, list(all_inputs(program.vocabulary, length)))


@pytest.mark.parametrize("name", EXTRA)
def test_other_programs_on_all_inputs(name):
    compiled = network(EXTRA[name], (1, 2, 3), 4)
    for length in range(1, 5):
        check(EXTRA[name], compiled, list(all_inputs((1, 2, 3), length)))


@pytest.mark.parametrize(
    ("program", "vocabulary", "max_length"),
    [
        (reverse(), tuple(range(30)), 24),
        (xproportion(), ("x", *"abcdefgh"), 40),
        (histogram(), tuple("abcde"), 40),
        (sort(), tuple(range(6)), 12),
    ],
)
def test_long_sequences(program, vocabulary, max_length):
    compiled = network(program, vocabulary, max_length)
    generator = np.random.default_rng(0)
    for length in (1, max_length // 2, max_length):
        draws = generator.integers(len(vocabulary), size=(20, length))
        check(program, compiled, [tuple(vocabulary[number] for number in row) for row in draws])


def test_levels_share_a_layer():
    """Attention, then maps that read it: one layer. A width is both by itself."""
    assert network(Map(lambda token: token + 1, EXTRA["shift"]), (1, 2), 3).graph.num_layers == 1
    assert network(EXTRA["two heads in a layer"], (1, 2), 3).graph.num_layers == 1
    assert network(EXTRA["two heads in a layer"], (1, 2), 3).graph.num_heads == 2
    assert network(Map(lambda n: n + 1, histogram()), (1, 2), 3).graph.num_layers == 2
    assert network(tokens, (1, 2), 3).graph.num_layers == 0


def test_attention_stays_sharp():
    """As Tracr's at its own size; sharper only where that would blur."""
    assert compile_program(reverse(), (1, 2, 3), 5).weights["query"].max() == 100
    assert compile_program(reverse(), (1, 2, 3), 24).weights["query"].max() > 100


@pytest.mark.parametrize(
    ("program", "vocabulary", "max_length", "message"),
    [
        (reverse(), (), 5, "vocabulary"),
        (reverse(), (1, 1), 5, "different tokens"),
        (reverse(), ("a", "BOS"), 5, "none of them BOS"),
        (reverse(), (1, 2), 0, "max_length"),
        (Map(str, xproportion()), ("a", "x"), 3, "used as a category"),
        (Map(lambda token: None, tokens, to_numbers=True), (1, 2), 3, "a number for each value"),
    ],
)
def test_mistakes(program, vocabulary, max_length, message):
    with pytest.raises(ConfigError, match=message):
        compile_program(program, vocabulary, max_length)


def test_save_and_load(tmp_path):
    compiled = network(reverse(), ("a", "b"), 4)
    compiled.save(tmp_path / "reverse", "reverse")
    loaded = load_edge_network(tmp_path / "reverse")
    assert isinstance(loaded, TracrNetwork)
    assert loaded([tuple("abb")]) == [list("bba")]
    assert loaded.program.labels == compiled.program.labels
    assert all(torch.equal(loaded.weights[name], value) for name, value in compiled.weights.items())
    with pytest.raises(ConfigError, match="choose another folder"):
        compiled.save(tmp_path / "reverse")


def test_numbers_survive_the_disk(tmp_path):
    compiled = network(xproportion(), ("a", "x"), 3)
    compiled.save(tmp_path / "x")
    assert TracrNetwork.load(tmp_path / "x", dtype=torch.float64)([tuple("xa")])[0] == pytest.approx([1, 0.5], abs=1e-4)


@pytest.mark.parametrize("damage", ["no folder", "config", "weights", "shape", "missing"])
def test_damaged_folders(tmp_path, damage):
    folder = tmp_path / "reverse"
    if damage != "no folder":
        network(reverse(), ("a", "b"), 4).save(folder)
    weights = folder / "model.safetensors"
    match damage:
        case "config":
            (folder / "config.json").write_text("{")
        case "weights":
            weights.write_text("{")
        case "shape":
            save_file(load_file(weights) | {"first": np.zeros((1, 2, 3), np.float32)}, weights)
        case "missing":
            save_file({name: value for name, value in load_file(weights).items() if name != "second"}, weights)
    with pytest.raises(ConfigError, match=f"{folder}: no compiled program"):
        TracrNetwork.load(folder)


@pytest.mark.parametrize("sequences", [[(1, 2), (1,)], [()], [(1, 2, 3, 4)], [(1, "z")]])
def test_foreign_sequences(sequences):
    with pytest.raises(ConfigError, match="sequences"):
        network(reverse(), (1, 2), 3)(sequences)


def test_too_many_tokens():
    compiled = network(reverse(), (1, 2), 3)
    with pytest.raises(ConfigError, match="4 are more than the 3"):
        compiled.embeddings(torch.zeros(1, 5, dtype=torch.long))
