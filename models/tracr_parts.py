"""The heads and MLPs of a compiled RASP program, each as a map between directions of the residual stream
(Lindner et al. 2023, arXiv 2301.05062, section 3 and appendix).

A categorical expression has one direction for each value, which is 1 where the expression has it; a numerical one has
a single direction. Two more help: "one" is 1 everywhere, and tokens:BOS only at the first place, where no expression
has a value. Shapes: q, k, v directions that queries, keys and values are read from, o those written to, h hidden units.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundswell.config import ConfigError
from models.rasp import (
    Aggregate,
    Expression,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    Tokens,
    Value,
    parts,
    possible_values,
)

BOS, PAD = "BOS", "compiler_pad"
BOS_SHARE = 0.5  # of the logit of a selected key: a query attends to BOS when it selects nothing
MIN_SLOPE = 100.0  # of the steps that turn a number into a category


@dataclass(frozen=True)
class Direction:
    """One coordinate of the residual stream."""

    name: str
    value: Value | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value}"

    @property
    def place(self) -> tuple[str, bool, bool, Value]:
        """What coordinates are sorted by."""
        return self.name, self.value is not None, isinstance(self.value, str), 0 if self.value is None else self.value


ONE, FIRST = Direction("one"), Direction("tokens", BOS)


@dataclass(frozen=True)
class Head:
    """Keys are projected, queries go through the bilinear form, each value goes to the output of the same number."""

    queries: Sequence[Direction]
    keys: Sequence[Direction]
    form: np.ndarray  # [q, k]: attention logits, 1 for a selected key
    values: Sequence[Direction]
    outputs: Sequence[Direction]

    @property
    def key_size(self) -> int:
        """Tracr counts BOS among the queries too, though no query reads it."""
        return max(len(self.queries) + 1, len(self.keys), len(self.values))


@dataclass(frozen=True)
class Mlp:
    """relu(x @ first) @ second."""

    inputs: Sequence[Direction]
    first: np.ndarray  # [inputs, h]
    second: np.ndarray  # [h, o]
    outputs: Sequence[Direction]


class PartBuilder:
    """Names the expressions of a program and builds their heads and MLPs."""

    def __init__(self, program: Expression, vocabulary: Sequence[Value], max_length: int) -> None:
        self.vocabulary, self.max_length = vocabulary, max_length
        named = [part for part in parts(program) if part.inputs]
        self._names = {part: _name(part, number) for number, part in enumerate(named, start=1)}

    def directions(self, expression: Expression) -> list[Direction]:
        """Where its value stands."""
        default = "tokens" if isinstance(expression, Tokens) else "indices"
        name = self._names.get(expression, default)
        if expression.numerical:
            return [Direction(name)]
        values = possible_values(expression, self.vocabulary, self.max_length)
        return [Direction(name, value) for value in values]

    def head(self, expression: Aggregate | SelectorWidth) -> Head:
        if isinstance(expression, Aggregate):
            values, outputs = self.directions(expression.values), self.directions(expression)
            return self._attention(expression.selector, values, outputs, BOS_SHARE)
        # attends to BOS and to what is selected, so that BOS gets the share 1 / (1 + number of selected places)
        return self._attention(expression.selector, [FIRST], [self.share(expression)], 1.0)

    def mlp(self, expression: Map | SequenceMap | SelectorWidth) -> Mlp:
        match expression:
            case Map(to_numbers=True):
                return self._numbers(expression)
            case Map():
                return self._lookup(expression)
            case SequenceMap():
                return self._pair_lookup(expression)
        return self._width(expression)

    def share(self, expression: SelectorWidth) -> Direction:
        """Where a selector's width stands before it is a category: as 1 / (1 + width)."""
        return Direction(f"{self._names[expression]}_selector_width_attn_output")

    def _attention(
        self, selector: Select, values: Sequence[Direction], outputs: Sequence[Direction], bos: float
    ) -> Head:
        keys, queries = self.directions(selector.keys), self.directions(selector.queries)
        form = np.zeros((len(queries) + 1, len(keys) + 1))
        for (row, query), (column, key) in itertools.product(enumerate(queries), enumerate(keys)):
            form[row, column] = bool(selector.predicate(key.value, query.value))
        form[-1, -1] = bos
        return Head([*queries, ONE], [*keys, FIRST], form, values, outputs)

    def _lookup(self, expression: Map) -> Mlp:
        """One hidden unit for each result."""
        inputs, outputs = self.directions(expression.inner), self.directions(expression)
        place = {direction.value: unit for unit, direction in enumerate(outputs)}
        first = np.zeros((len(inputs), len(outputs)))
        for row, direction in enumerate(inputs):
            result = expression.function(direction.value)
            if result is not None:
                first[row, place[result]] = 1.0
        return Mlp(inputs, first, np.eye(len(outputs)), outputs)

    def _numbers(self, expression: Map) -> Mlp:
        """The function's value as a number; a second unit where some are negative, which relu would cut off."""
        inputs = self.directions(expression.inner)
        values = [expression.function(direction.value) for direction in inputs]
        if not all(isinstance(value, int | float) for value in values):
            raise ConfigError(f"program: a map to numbers gives {values}; give a number for each value")
        numbers = np.array(values, dtype=np.float64)[:, None]
        signs = np.array([[1.0, -1.0]]) if (numbers < 0).any() else np.ones((1, 1))
        return Mlp(inputs, numbers * signs, signs.T, self.directions(expression))

    def _pair_lookup(self, expression: SequenceMap) -> Mlp:
        """One hidden unit relu(x_i + y_j - one) for each pair of values: 1 where both are there."""
        xs, ys, outputs = (self.directions(x) for x in (expression.first, expression.second, expression))
        place = {direction.value: unit for unit, direction in enumerate(outputs)}
        pairs = list(itertools.product(range(len(xs)), range(len(ys))))
        first, second = np.zeros((len(xs) + len(ys) + 1, len(pairs))), np.zeros((len(pairs), len(outputs)))
        for unit, (i, j) in enumerate(pairs):
            first[[i, len(xs) + j, -1], unit] = 1.0, 1.0, -1.0
            result = expression.function(xs[i].value, ys[j].value)
            if result is not None:
                second[unit, place[result]] = 1.0
        return Mlp([*xs, *ys, ONE], first, second, outputs)

    def _width(self, expression: SelectorWidth) -> Mlp:
        """1 / (1 + width) -> width, as a sum of steps half-way between its possible values: a step is the difference
        of relu(slope (x - t) + 1) and relu(slope (x - t)), and changes the category by one. The first hidden unit takes
        back what is written at BOS, which has share 1; the last one is constant, the largest width."""
        widths, share, length = self.directions(expression), self.share(expression), self.max_length
        shares = [1 / (1 + width) for width in range(length, -1, -1)]
        slope = max(MIN_SLOPE, 3.0 * length * (length + 1))  # a step is narrower than the narrowest gap
        first, second = np.zeros((3, 2 * length + 2)), np.zeros((2 * length + 2, length + 2))
        first[2, 0], second[0, [0, -1]] = 1.0, -1.0
        for step, (low, high) in enumerate(itertools.pairwise(shares)):
            units, width = [1 + 2 * step, 2 + 2 * step], length - step
            threshold = (low + high) / 2
            first[0, units] = slope
            first[1, units] = 1 - slope * threshold, -slope * threshold
            second[units, width - 1] = 1.0, -1.0
            second[units, width] = -1.0, 1.0
        first[1, -1], second[-1, length] = 1.0, 1.0
        return Mlp([share, ONE, FIRST], first, second, [*widths, share])


def _name(part: Expression | Select, number: int) -> str:
    """Tracr's names: coordinates are sorted by them, so they decide the order of the weights."""
    match part:
        case Aggregate(name=str(name)):
            return f"{name}_{number}"
        case SelectorWidth():
            return f"selector_width_{number}"
        case SequenceMap():
            return f"sequence_map_{number}"
    return f"{type(part).__name__.lower()}_{number}"
