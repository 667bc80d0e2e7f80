"""The verdicts that the original does not have; and that greedy decoding and teacher forcing agree."""

import torch

from groundswell.protocols import IGNORE
from tasks.arithmetic_grading import (
    cut_at_end,
    digit_accuracy,
    exact,
    exact_without_end,
    sorted_exact,
    sorted_exact_with_end,
)
from tasks.arithmetic_vocabulary import EOS, PAD

GOLD = torch.tensor([[5, 6, EOS, IGNORE]])


def generated(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def verdicts(function, *rows: list[int]) -> list:
    return function(generated(*rows), GOLD.expand(len(rows), -1)).tolist()


ROWS = [
    [5, 6, EOS, 9],
    [5, 6, EOS, PAD],
    [5, 6, 7, EOS],
    [5, 6, 7, 8],
    [5, 7, EOS, 0],
    [5, EOS, EOS, 0],
    [EOS, 6, 5, 0],
]


def test_exact_and_without_end() -> None:
    assert verdicts(exact, *ROWS) == [True, True, False, False, False, False, False]
    assert verdicts(exact_without_end, *ROWS) == [True, True, True, True, False, False, False]
    assert verdicts(sorted_exact_with_end, *ROWS) == verdicts(exact, *ROWS)
    assert verdicts(sorted_exact, *ROWS) == verdicts(exact_without_end, *ROWS)


def test_digit_accuracy_counts_digits_before_the_end() -> None:
    assert verdicts(digit_accuracy, *ROWS) == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0]
    negative = torch.tensor([[5, 6, 15, EOS]])  # the sign is no digit
    assert digit_accuracy(generated([5, 6, EOS, EOS]), negative).tolist() == [1.0]


def test_without_an_end_one_token_is_left() -> None:
    assert cut_at_end(generated([5, 6, 7, 8], [5, 6, EOS, 8])).tolist() == [[5, 0, 0, 0], [5, 6, EOS, 0]]


def test_the_verdict_equals_that_of_teacher_forcing() -> None:
    """A row is right if and only if every token through EOS is the greedy one after the right tokens before it."""
    torch.manual_seed(0)
    answers = torch.randint(4, 6, (500, 3))
    ends = torch.randint(1, 4, (500, 1))
    places = torch.arange(4)
    gold = torch.cat([answers, torch.full((500, 1), EOS)], 1).where(places < ends, EOS).where(places <= ends, IGNORE)
    tokens = torch.randint(3, 6, (500, 4))
    forced = ((tokens == gold) | (gold == IGNORE)).all(-1)
    assert torch.equal(exact(tokens, gold), forced) and 5 < forced.sum() < 400
