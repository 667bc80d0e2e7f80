"""Compile RASP into the weights of a transformer, as Tracr does (Lindner et al. 2023, arXiv 2301.05062), in numpy.

The network has no norm and no causal mask, its MLPs are relu, its input starts with BOS; position 0 of the table is
BOS' own, all zero. Shapes: L layers, H heads, d width, k key size, h hidden units, V outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundswell.config import ConfigError
from models.rasp import Aggregate, Expression, Map, SelectorWidth, SequenceMap, Value, in_order, parts
from models.tracr_parts import BOS, BOS_SHARE, ONE, PAD, Direction, Head, Mlp, PartBuilder

MIN_EXACTNESS = 100.0  # attention logit of a selected key, before the division by sqrt(key size)
LEAK = 1e-4  # part of the attention that may go to keys which are not selected

Module = Aggregate | SelectorWidth | Map | SequenceMap  # what takes a place in a layer


@dataclass(frozen=True)
class CompiledProgram:
    """`weights`: tokens [vocabulary, d], positions [max_length + 1, d]; query, key, value [L, H, d, k], output
    [L, H, k, d]; first [L, d, h], second [L, h, d]; unembedding [d, V]; all float32. There are no biases."""

    vocabulary: tuple[Value, ...]  # by token id, BOS and padding among them
    max_length: int  # without BOS
    outputs: tuple[Value, ...] | None  # what the columns of the unembedding stand for; None: one column, a number
    labels: tuple[str, ...]  # of the residual stream's coordinates
    weights: dict[str, np.ndarray]


def compile_program(program: Expression, vocabulary: Sequence[Value], max_length: int) -> CompiledProgram:
    """A network that gives the program's value at each place of any sequence of up to `max_length` tokens.

    Equal to Tracr's up to length 5 or so; where longer sequences or larger vocabularies would blur its attention or its
    steps, these are sharper. Raises ConfigError for what has no such network.
    """
    _check(vocabulary, max_length)
    ids = in_order([*vocabulary, BOS, PAD])
    builder = PartBuilder(program, vocabulary, max_length)
    modules = [part for part in parts(program) if isinstance(part, Module)]
    outputs = builder.directions(program)
    layers = [_Layer(builder, members) for members in _allocate(modules)]
    written = [direction for layer in layers for direction in layer.outputs]
    places = [Direction("indices", place) for place in range(max_length)]
    directions = {ONE, *places, *written, *(Direction("tokens", value) for value in ids)}
    residual = sorted(directions, key=lambda direction: direction.place)
    index = {direction: place for place, direction in enumerate(residual)}
    weights = _assemble(layers, index, max_length)
    weights["tokens"], weights["positions"] = _embeddings(ids, index, max_length)
    weights["unembedding"] = np.eye(len(index))[:, [index[direction] for direction in outputs]]
    return CompiledProgram(
        vocabulary=ids,
        max_length=max_length,
        outputs=None if program.numerical else tuple(direction.value for direction in outputs),  # type: ignore[misc]
        labels=tuple(map(str, residual)),
        weights={name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()},
    )


def _check(vocabulary: Sequence[Value], max_length: int) -> None:
    if not vocabulary or len(set(vocabulary)) != len(vocabulary) or {BOS, PAD} & set(vocabulary):
        raise ConfigError(f"vocabulary: {list(vocabulary)} must be different tokens, none of them {BOS} or {PAD}")
    if max_length < 1:
        raise ConfigError(f"max_length: must be at least 1, not {max_length}")


class _Layer:
    """Heads, then MLPs that may read what the heads write."""

    def __init__(self, builder: PartBuilder, members: Sequence[Module]) -> None:
        self.heads: list[Head] = [builder.head(part) for part in members if isinstance(part, Aggregate | SelectorWidth)]
        self.mlps: list[Mlp] = [builder.mlp(part) for part in members if not isinstance(part, Aggregate)]

    @property
    def outputs(self) -> list[Direction]:
        parts = [part.outputs for part in self.heads] + [part.outputs for part in self.mlps]
        return [direction for outputs in parts for direction in outputs]

    @property
    def hidden_size(self) -> int:
        return sum(mlp.first.shape[1] for mlp in self.mlps)


def _allocate(modules: Sequence[Module]) -> list[list[Module]]:
    """Layers by longest path from the input; a level of attention alone and one of MLPs alone after it share a
    layer."""
    depths: dict[object, int] = {}

    def depth(part: object) -> int:
        if part not in depths:
            inner = max((depth(x) for x in part.inputs), default=0)  # type: ignore[attr-defined]
            depths[part] = inner + isinstance(part, Module)
        return depths[part]

    deepest = max(map(depth, modules), default=0)
    levels = [[part for part in modules if depth(part) == level] for level in range(1, deepest + 1)]
    layers: list[list[Module]] = []
    for members in levels:
        after_attention = layers and all(isinstance(part, Aggregate) for part in layers[-1])
        if after_attention and all(isinstance(part, Map | SequenceMap) for part in members):
            layers[-1] = layers[-1] + members
        else:
            layers.append(members)
    return layers


def _assemble(layers: Sequence[_Layer], index: dict[Direction, int], max_length: int) -> dict[str, np.ndarray]:
    """Every layer padded with zeros to the largest one's sizes."""
    heads = [head for layer in layers for head in layer.heads]
    count = max((len(layer.heads) for layer in layers), default=1) or 1
    key_size = max((head.key_size for head in heads), default=1)
    hidden = max((layer.hidden_size for layer in layers), default=1) or 1
    shape = (len(layers), count, len(index), key_size)
    query, key, value = (np.zeros(shape) for _ in range(3))
    output = np.zeros((*shape[:2], key_size, len(index)))
    first, second = np.zeros((len(layers), len(index), hidden)), np.zeros((len(layers), hidden, len(index)))
    exactness = _exactness(key_size, max_length)

    def rows(directions: Sequence[Direction]) -> list[int]:
        return [index[direction] for direction in directions]

    for number, layer in enumerate(layers):
        for place, head in enumerate(layer.heads):
            query[number, place, rows(head.queries), : len(head.keys)] = exactness * head.form
            key[number, place, rows(head.keys), range(len(head.keys))] = 1.0
            value[number, place, rows(head.values), range(len(head.values))] = 1.0
            output[number, place, range(len(head.values)), rows(head.outputs)] = 1.0
        start = 0
        for mlp in layer.mlps:
            units = slice(start, start + mlp.first.shape[1])
            # both arguments of a map may be the same expression, and then its rows add up
            np.add.at(first[number, :, units], rows(mlp.inputs), mlp.first)
            second[number, units, rows(mlp.outputs)] = mlp.second.T
            start = units.stop
    return {"query": query, "key": key, "value": value, "output": output, "first": first, "second": second}


def _exactness(key_size: int, max_length: int) -> float:
    """Large enough that `max_length` keys which are not selected get no more than LEAK of the attention, beside BOS
    alone or one selected key."""
    margin = min(BOS_SHARE, 1 - BOS_SHARE)
    return max(MIN_EXACTNESS, math.sqrt(key_size) / margin * math.log((max_length + 1) / LEAK))


def _embeddings(ids: Sequence[Value], index: dict[Direction, int], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    by_token = np.zeros((len(ids), len(index)))
    by_token[:, index[ONE]] = 1.0
    for number, value in enumerate(ids):
        by_token[number, index[Direction("tokens", value)]] = 1.0
    by_place = np.zeros((max_length + 1, len(index)))
    for place in range(max_length):
        by_place[place + 1, index[Direction("indices", place)]] = 1.0
    return by_token, by_place
