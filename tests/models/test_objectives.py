"""Losses and metrics against their definitions in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from groundswell.protocols import IGNORE, Answer, Split
from models.decoder import Decoder
from models.objectives import AnswerLoss, WordLoss, token_losses

ANSWER = Answer(slice(0, 1))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_losses_equal_cross_entropy(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(2, 5, 3, 11, generator=generator)).to(dtype).requires_grad_(True)
    targets = torch.randint(11, (2, 5, 3), generator=generator)
    targets[0, 1, 2] = targets[1, 3, 0] = IGNORE
    losses, right = token_losses(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=IGNORE).view(
        2, 5, 3
    )
    torch.testing.assert_close(losses, expected)
    counted = targets != IGNORE
    assert torch.equal(right[counted], (logits.argmax(-1) == targets)[counted])

    weights = torch.randn(2, 5, 3, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    (reference,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(gradient, reference)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    loss = token_losses(logits, torch.tensor([0, 1, 2, 3]))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Given(Decoder):
    """A model whose logits are a parameter."""

    def answer_logits(self, parameters, tokens, positions, generators=None):  # type: ignore[no-untyped-def]
        return parameters["logits"]


def test_answer_loss_and_metrics_of_each_run() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 2, 6, generator=generator, requires_grad=True)
    targets = logits.argmax(-1).clone()
    targets[0, 0, 0] = (
        targets[0, 0, 0] + 1
    ) % 6  # run 0: one answer wrong, one delimiter wrong, one row without delimiter
    targets[0, 1, 1] = (targets[0, 1, 1] + 1) % 6
    targets[0, 2, 1] = IGNORE
    targets[1, 0, 0] = IGNORE
    tokens = torch.zeros(2, 4, 3, dtype=torch.long)
    batch = Split(tokens, torch.zeros_like(targets), targets)
    loss, metrics = AnswerLoss().loss(Given(), {"logits": logits}, batch, ANSWER, None)
    for run in range(2):
        mean = F.cross_entropy(logits[run].flatten(0, 1), targets[run].flatten(), ignore_index=IGNORE)
        answer = F.cross_entropy(logits[run, :, 0], targets[run, :, 0], ignore_index=IGNORE)
        torch.testing.assert_close(loss[run], mean)
        torch.testing.assert_close(metrics["answer_loss"][run], answer.detach())
    assert metrics["accuracy"].tolist() == [0.5, 1.0]
    assert set(metrics) == {"answer_loss", "accuracy"}
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_a_batch_without_targets_has_loss_zero() -> None:
    targets = torch.full((1, 2, 1), IGNORE)
    batch = Split(torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros_like(targets), targets)
    logits = torch.randn(1, 2, 1, 5, requires_grad=True)
    loss, metrics = AnswerLoss().loss(Given(), {"logits": logits}, batch, ANSWER, None)
    loss.sum().backward()
    assert loss.item() == 0.0 and metrics["answer_loss"].item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_word_loss_and_metrics() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 6, generator=generator)  # four targets, the last two are the word
    targets = torch.randint(6, (2, 3, 4), generator=generator)
    answer = Answer(slice(-2, None), torch.tensor([-1, 0, 0, 0, 1, 1]))
    targets[:, :, 2], targets[:, :, 3] = 2, 5
    batch = Split(torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros_like(targets), targets)
    loss, metrics = WordLoss().loss(Given(), {"logits": logits}, batch, answer, None)
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, losses.mean((1, 2)))
    torch.testing.assert_close(metrics["word_nll"], losses[:, :, 2:].sum(-1).mean(-1))
    torch.testing.assert_close(metrics["first_token_nll"], losses[:, :, 2].mean(-1))

    found = WordLoss().evaluate(Given(), {"logits": logits}, batch, answer)
    assert {value.shape for value in found.values()} == {(2, 3)}
    torch.testing.assert_close(found["word_nll"], losses[:, :, 2:].sum(-1))
    assert torch.equal(found["accuracy"], (logits.argmax(-1) == targets)[:, :, 2:].all(-1))
    first = -logits[:, :, 2, 1:4].log_softmax(-1)[..., 1]
    second = -logits[:, :, 3, 4:].log_softmax(-1)[..., 1]
    torch.testing.assert_close(found["candidate_nll"], first + second)
    ranks = [(logits[:, :, 2, 1:4] > logits[:, :, 2, 2:3]).sum(-1) + 1, (logits[:, :, 3, 4] > logits[:, :, 3, 5]) + 1]
    assert torch.equal(found["rank"], torch.maximum(*ranks))
    assert found["uniform_nll"][0, 0].item() == pytest.approx(2 * math.log(6))
    assert found["uniform_candidate_nll"][0, 0].item() == pytest.approx(math.log(3) + math.log(2))
    plain = WordLoss().evaluate(Given(), {"logits": logits}, batch, Answer(slice(-2, None)))
    assert set(plain) == {"accuracy", "word_nll", "first_token_nll", "uniform_nll"}


def test_the_word_nll_has_the_floor_of_the_original() -> None:
    logits = torch.tensor([0.0, 400.0]).view(1, 1, 1, 2)
    targets = torch.zeros(1, 1, 1, dtype=torch.long)
    batch = Split(targets, targets, targets)
    found = WordLoss().evaluate(Given(), {"logits": logits}, batch, Answer(slice(0, 1)))
    assert found["word_nll"].item() == pytest.approx(115.13, abs=0.01)
    assert found["first_token_nll"].item() == pytest.approx(400.0)
