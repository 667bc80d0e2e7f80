"""The progressive loss: what it draws, what it weighs, and that one recurrence is the ordinary loss."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from recurrent_variants import SMALL, generators, rows, weights

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, Split
from models.objectives import AnswerLoss
from models.recurrent_objective import ProgressiveLoss

ANSWER = Answer(slice(None))


def batch(num_runs: int = 1) -> Split:
    tokens, positions = rows(num_runs=num_runs)
    targets = tokens.gather(2, positions).clone()
    targets[:, 0, 2:] = IGNORE
    return Split(tokens, positions, targets)


def test_draws_are_uniform() -> None:
    """n in 0..R-1; then k in 1..min(R - n, M)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(1, 1, 1, dtype=torch.long)
    pairs = Counter[tuple[int, int]]()
    for _ in range(3_000):
        (before,), (after,) = ProgressiveLoss().draw(4, 2, [generator], tokens)
        pairs[before, after] += 1
    expected = {(0, 1): 1 / 8, (0, 2): 1 / 8, (1, 1): 1 / 8, (1, 2): 1 / 8, (2, 1): 1 / 8, (2, 2): 1 / 8, (3, 1): 1 / 4}
    assert pairs.keys() == expected.keys()
    for pair, share in expected.items():
        assert pairs[pair] / 3_000 == pytest.approx(share, abs=0.03)


def test_runs_draw_from_their_own_generators() -> None:
    tokens = torch.zeros(3, 1, 1, dtype=torch.long)
    together = ProgressiveLoss().draw(16, 8, generators(3), tokens)
    alone = [ProgressiveLoss().draw(16, 8, [generator], tokens[:1]) for generator in generators(3)]
    assert together == ([n for (n,), _ in alone], [k for _, (k,) in alone])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_recurrence_is_the_ordinary_loss(alpha: float) -> None:
    model = SMALL.with_overrides({"num_recurrences": 1, "initial_state": "zero", "abacus_max_offset": 0})
    parameters = weights(model)
    ours, metrics = ProgressiveLoss(alpha=alpha).loss(model, parameters, batch(), ANSWER, None)
    theirs, expected = AnswerLoss().loss(model, parameters, batch(), ANSWER, None)
    torch.testing.assert_close(ours, theirs)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value)


def test_both_passes_are_weighed() -> None:
    """The random pass follows the full one in the stream of random numbers; alone they give the parts."""
    model = SMALL.with_overrides(
        {"norm_scheme": "pre", "initial_state": "zero", "abacus_max_offset": 0, "num_recurrences": 8}
    )
    parameters = weights(model)

    def loss(alpha: float) -> torch.Tensor:
        return ProgressiveLoss(alpha=alpha).loss(model, parameters, batch(), ANSWER, generators())[0]

    torch.testing.assert_close(loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0))
    assert not torch.allclose(loss(0.0), loss(1.0))


@pytest.mark.parametrize(
    ("total", "max_backprop", "factor"),
    [(16, None, 0.625), (8, None, 0.75), (4, None, 1.0), (2, None, 1.5), (1, None, 1.25)],
)
def test_throttle(total: int, max_backprop: int | None, factor: float) -> None:
    """(1 + min(R/4, M/2)) / M of the published code."""
    assert ProgressiveLoss(max_backprop=max_backprop).throttle_factor(total) == factor


def test_throttled_loss() -> None:
    model, parameters = SMALL, weights(SMALL)
    plain = ProgressiveLoss().loss(model, parameters, batch(), ANSWER, generators())[0]
    throttled = ProgressiveLoss(throttle=True).loss(model, parameters, batch(), ANSWER, generators())[0]
    torch.testing.assert_close(throttled, 1.5 * plain)


def test_slots() -> None:
    """The sum over answer tokens, over all tokens of the batch."""
    parameters, data = weights(SMALL), batch()
    mean = ProgressiveLoss().loss(SMALL, parameters, data, ANSWER, generators())[0]
    slots = ProgressiveLoss(reduction="slots").loss(SMALL, parameters, data, ANSWER, generators())[0]
    counted = (data.targets != IGNORE).sum()
    torch.testing.assert_close(slots, mean * counted / data.tokens.numel())
    assert ProgressiveLoss().weight(data).tolist() == [float(counted)]
    assert ProgressiveLoss(reduction="slots").weight(data).tolist() == [4.0]


def test_packs_equal_runs_alone() -> None:
    parameters, data = weights(SMALL, num_runs=3), batch(3)
    objective = ProgressiveLoss(alpha=0.5)
    losses, metrics = objective.loss(SMALL, parameters, data, ANSWER, generators(3))
    for run in range(3):
        own = {name: value[run : run + 1] for name, value in parameters.items()}
        part = data.select(slice(run, run + 1))
        loss, found = objective.loss(SMALL, own, part, ANSWER, generators(3)[run : run + 1])
        torch.testing.assert_close(losses[run : run + 1], loss)
        for name, value in found.items():
            torch.testing.assert_close(metrics[name][run : run + 1], value)


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ConfigError, match=r"objective.alpha: .* set alpha=0"):
        ProgressiveLoss().loss(SMALL, weights(SMALL), batch(), ANSWER, None)


def test_metrics_of_evaluation() -> None:
    model, parameters, data = SMALL, weights(SMALL), batch()
    found = ProgressiveLoss().evaluate(model, parameters, data, ANSWER)
    expected = AnswerLoss().evaluate(model, parameters, data, ANSWER)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
