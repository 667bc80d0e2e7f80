"""Metrics of circuits against other ways to compute them."""

import math
from itertools import combinations

import pytest
import torch

from groundswell.protocols import IGNORE
from tasks.circuit_grading import answer_mean, difference, exact_match, kendall_tau, kl, probability_difference


def naive_tau(first: list[float], second: list[float]) -> float:
    """tau-b, pair by pair."""
    agree = untied_first = untied_second = 0
    for i, j in combinations(range(len(first)), 2):
        signs = [(a > b) - (a < b) for a, b in ((first[i], first[j]), (second[i], second[j]))]
        agree += signs[0] * signs[1]
        untied_first += signs[0] != 0
        untied_second += signs[1] != 0
    return agree / math.sqrt(untied_first * untied_second)


@pytest.mark.parametrize("levels", [5, 1_000_000])  # with ties, without
def test_kendall_tau(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(levels, (300, 12), generator=generator).float() for _ in range(2))
    expected = [naive_tau(*rows) for rows in zip(first.tolist(), second.tolist(), strict=True)]
    assert torch.allclose(kendall_tau(first, second), torch.tensor(expected), atol=1e-6)


def test_kendall_tau_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.randn(5, 100).round(decimals=1), torch.randn(5, 100).round(decimals=1)
    expected = [stats.kendalltau(*rows).statistic for rows in zip(first.numpy(), second.numpy(), strict=True)]
    assert torch.allclose(kendall_tau(first, second), torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_kl_is_that_of_torch() -> None:
    logits, reference = torch.randn(7, 3, 11), torch.randn(7, 3, 11)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(kl(logits, reference), expected, atol=1e-6)


def test_kl_passes_over_what_the_whole_model_excludes() -> None:
    reference = torch.tensor([0.0, 0.0, float("-inf")])
    assert torch.allclose(kl(torch.tensor([0.0, 0.0, 1.0]), reference), torch.tensor((2 + math.e) / 2).log())


def test_means_and_matches_leave_padding_out() -> None:
    targets = torch.tensor([[3, IGNORE], [3, 4]])
    assert answer_mean(torch.tensor([[2.0, 100.0], [2.0, 4.0]]), targets).tolist() == [2.0, 3.0]
    logits, reference = torch.zeros(2, 2, 5), torch.zeros(2, 2, 5)
    reference[:, 1, 4] = 1.0
    assert exact_match(logits, reference, targets).tolist() == [1.0, 0.0]


def test_differences() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0]])
    assert difference(logits, torch.tensor([1]), torch.tensor([2])).tolist() == [2.0]
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.4]])
    assert probability_difference(probabilities, torch.tensor([1])).item() == pytest.approx(0.7 - 0.1)
    assert probability_difference(probabilities, torch.tensor([1]), 2).item() == pytest.approx(0.3 - 0.1)
