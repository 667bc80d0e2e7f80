"""RASP programs with known circuits: their text is their explanation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.rasp import Aggregate, Expression, Map, Select, SelectorWidth, SequenceMap, Value, indices, tokens


@dataclass(frozen=True)
class Program:
    """With the vocabulary and the length that it is compiled for unless others are asked for."""

    expression: Expression
    vocabulary: tuple[Value, ...]
    max_length: int = 5


def reverse() -> Expression:
    """The tokens from the last to the first: place i selects place length - i - 1."""
    length = SelectorWidth(Select(tokens, tokens, lambda key, query: True))
    opposite = Map(lambda place: place - 1, SequenceMap(operator.sub, length, indices))
    return Aggregate(Select(indices, opposite, operator.eq), tokens)


def xproportion() -> Expression:
    """Which part of the tokens so far is "x"."""
    is_x = Map(lambda token: token == "x", tokens, to_numbers=True)
    return Aggregate(Select(indices, indices, operator.le), is_x, name="frac_prevs")


def histogram() -> Expression:
    """How often each token stands in the sequence."""
    return SelectorWidth(Select(tokens, tokens, operator.eq))


def sort() -> Expression:
    """The tokens, numbers, in ascending order: each goes to the place that is the count of smaller ones, where equal
    ones follow their places (Weiss et al. 2021, section 3)."""
    ranked = SequenceMap(lambda token, place: token + place / 1000, tokens, indices)
    smaller = SelectorWidth(Select(ranked, ranked, operator.lt))
    return Aggregate(Select(smaller, indices, operator.eq), tokens)


PROGRAMS = {
    "reverse": Program(reverse(), (1, 2, 3)),
    "xproportion": Program(xproportion(), ("a", "b", "c", "x")),
    "histogram": Program(histogram(), ("a", "b", "c")),
    "sort": Program(sort(), (1, 2, 3)),
}


def all_inputs(vocabulary: Sequence[Value], length: int) -> Iterator[tuple[Value, ...]]:
    """Every sequence of exactly `length` tokens."""
    return itertools.product(vocabulary, repeat=length)
