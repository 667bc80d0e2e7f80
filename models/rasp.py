"""RASP: programs that transformers can run (Weiss et al. 2021, arXiv 2106.06981), and what they mean.

A program is an expression over a sequence of tokens; it has one value at each place. Categorical values come from a
finite set; numerical ones are added and averaged. None stands for no value: the function of a map may give it, and an
aggregate has it where nothing is selected.

    length = SelectorWidth(Select(tokens, tokens, lambda key, query: True))
    last = Map(lambda n: n - 1, length)
    program = Aggregate(Select(indices, last, operator.eq), tokens)  # the last token, at every place
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from groundswell.config import ConfigError

Value = int | float | str
Predicate = Callable[[Any, Any], bool]  # (key, query)


@dataclass(frozen=True, eq=False)
class Expression:
    """One value at each place."""

    @property
    def numerical(self) -> bool:
        return False

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Tokens(Expression):
    """The input itself."""


@dataclass(frozen=True, eq=False)
class Indices(Expression):
    """Places, from 0."""


@dataclass(frozen=True, eq=False)
class Map(Expression):
    """function(value) at each place. `to_numbers`: numerical, so the function must give a number everywhere."""

    function: Callable[[Any], Value | None]
    inner: Expression
    to_numbers: bool = False

    @property
    def numerical(self) -> bool:
        return self.to_numbers

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return (self.inner,)


@dataclass(frozen=True, eq=False)
class SequenceMap(Expression):
    """function(first, second) at each place."""

    function: Callable[[Any, Any], Value | None]
    first: Expression
    second: Expression

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return self.first, self.second


@dataclass(frozen=True, eq=False)
class Select:
    """A selector: the query's place selects the key's where predicate(key, query) holds; None is never selected."""

    keys: Expression
    queries: Expression
    predicate: Predicate

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return self.keys, self.queries


@dataclass(frozen=True, eq=False)
class Aggregate(Expression):
    """Numerical: the mean of the selected values, 0 where none is selected. Categorical: the selected value, which must
    be the same at all selected places; None where none is selected."""

    selector: Select
    values: Expression
    name: str | None = None

    @property
    def numerical(self) -> bool:
        return self.values.numerical

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return self.selector, self.values


@dataclass(frozen=True, eq=False)
class SelectorWidth(Expression):
    """How many places are selected."""

    selector: Select

    @property
    def inputs(self) -> tuple[Expression | Select, ...]:
        return (self.selector,)


tokens, indices = Tokens(), Indices()


def in_order(values: Iterable[Value]) -> tuple[Value, ...]:
    """Without repetitions; numbers first, then words."""
    return tuple(sorted(set(values), key=lambda value: (isinstance(value, str), value)))


def parts(program: Expression) -> list[Expression | Select]:
    """The program and all that it is made of, each once, from the outside in."""
    found: dict[Expression | Select, None] = {}

    def visit(part: Expression | Select) -> None:
        if part not in found:
            found[part] = None
            for inner in part.inputs:
                visit(inner)

    visit(program)
    return list(found)


# ---- meaning ----


def evaluate(program: Expression, sequence: Sequence[Value]) -> list[Value | None]:
    """The program's value at each place. Raises ConfigError where several different values are selected."""
    match program:
        case Tokens():
            return list(sequence)
        case Indices():
            return list(range(len(sequence)))
        case Map(function, inner):
            return [None if x is None else function(x) for x in evaluate(inner, sequence)]
        case SequenceMap(function, first, second):
            pairs = zip(evaluate(first, sequence), evaluate(second, sequence), strict=True)
            return [None if x is None or y is None else function(x, y) for x, y in pairs]
        case SelectorWidth(selector):
            return [len(places) for places in _selected(selector, sequence)]
        case Aggregate(selector, values):
            found = evaluate(values, sequence)
            combine = _mean if program.numerical else _only
            return [combine([found[place] for place in places]) for places in _selected(selector, sequence)]
    raise TypeError(f"{type(program).__name__} is no RASP expression")


def _selected(selector: Select, sequence: Sequence[Value]) -> Iterator[list[int]]:
    """The selected places of each place."""
    keys = evaluate(selector.keys, sequence)
    for query in evaluate(selector.queries, sequence):
        known = [place for place, key in enumerate(keys) if key is not None and query is not None]
        yield [place for place in known if selector.predicate(keys[place], query)]


def _mean(values: Sequence[Any]) -> Value:
    return sum(values) / len(values) if values else 0.0


def _only(values: Sequence[Value | None]) -> Value | None:
    if len(set(values)) > 1:
        raise ConfigError(f"program: an aggregate selects different values {values}; select one place, or use numbers")
    return values[0] if values else None


# ---- which values there can be ----


def possible_values(expression: Expression, vocabulary: Sequence[Value], max_length: int) -> tuple[Value, ...]:
    """All that a categorical expression can be on sequences of up to `max_length` tokens of `vocabulary`.

    Raises ConfigError for a numerical expression.
    """
    if expression.numerical:
        raise ConfigError("program: a number is used as a category; only Aggregate takes numerical values")

    def inner(part: Expression) -> tuple[Value, ...]:
        return possible_values(part, vocabulary, max_length)

    match expression:
        case Tokens():
            return in_order(vocabulary)
        case Indices():
            return tuple(range(max_length))
        case SelectorWidth():
            return tuple(range(max_length + 1))
        case Aggregate(_, values):
            return inner(values)
        case Map(function, argument):
            return _without_none(function(x) for x in inner(argument))
        case SequenceMap(function, first, second):
            return _without_none(function(x, y) for x, y in itertools.product(inner(first), inner(second)))
    raise TypeError(f"{type(expression).__name__} is no RASP expression")


def _without_none(values: Iterable[Value | None]) -> tuple[Value, ...]:
    return in_order(value for value in values if value is not None)
