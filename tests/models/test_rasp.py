"""What RASP programs mean."""

from __future__ import annotations

import operator

import pytest

from groundswell.config import ConfigError
from models.rasp import (
    Aggregate,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    evaluate,
    in_order,
    indices,
    possible_values,
    tokens,
)
from models.tracr_programs import histogram, reverse, sort, xproportion

SHIFT = Aggregate(Select(indices, indices, lambda key, query: key == query - 1), tokens)


def test_reverse():
    assert evaluate(reverse(), "abcd") == list("dcba")


def test_xproportion():
    assert evaluate(xproportion(), "xaxx") == [1, 0.5, 2 / 3, 0.75]


def test_histogram():
    assert evaluate(histogram(), "abaa") == [3, 1, 3, 3]


def test_sort_keeps_equal_ones():
    assert evaluate(sort(), [3, 1, 2, 1]) == [1, 1, 2, 3]


def test_nothing_selected():
    assert evaluate(SHIFT, "abc") == [None, "a", "b"]
    none_selected = Select(tokens, tokens, lambda key, query: False)
    assert evaluate(Aggregate(none_selected, Map(int, tokens, to_numbers=True)), "12") == [0.0, 0.0]
    assert evaluate(SelectorWidth(none_selected), "12") == [0, 0]


def test_no_value_is_passed_on_and_never_selected():
    upper = Map(str.upper, SHIFT)
    assert evaluate(upper, "abc") == [None, "A", "B"]
    assert evaluate(SequenceMap(operator.add, upper, tokens), "abc") == [None, "Ab", "Bc"]
    assert evaluate(SelectorWidth(Select(upper, tokens, lambda key, query: True)), "abc") == [2, 2, 2]
    assert evaluate(SelectorWidth(Select(tokens, upper, lambda key, query: True)), "abc") == [0, 3, 3]


def test_several_values_selected():
    whole = Select(tokens, tokens, lambda key, query: True)
    assert evaluate(Aggregate(whole, tokens), "aa") == ["a", "a"]
    with pytest.raises(ConfigError, match="different values"):
        evaluate(Aggregate(whole, tokens), "ab")


def test_possible_values():
    assert possible_values(tokens, ["b", 2, "a", 1], 3) == (1, 2, "a", "b")
    assert possible_values(indices, "ab", 3) == (0, 1, 2)
    assert possible_values(histogram(), "ab", 3) == (0, 1, 2, 3)
    assert possible_values(SequenceMap(operator.sub, histogram(), indices), "ab", 2) == (-1, 0, 1, 2)
    assert possible_values(Map(lambda x: None if x else "zero", indices), "ab", 3) == ("zero",)
    with pytest.raises(ConfigError, match="number"):
        possible_values(Map(str, xproportion()), "ax", 2)


def test_in_order():
    assert in_order([10, "x", 2, "BOS", 10]) == (2, 10, "BOS", "x")
