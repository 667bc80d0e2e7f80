"""What a network is trained to do: losses and training metrics, run by run of a pack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundswell.protocols import IGNORE, Answer, Model, Objective, Parameters, Split


class AnswerLoss(Objective):
    """Mean cross-entropy over the answer tokens, delimiters included (Wang et al. 2024, arXiv 2405.15071, section 3).

    Metrics: `answer_loss`, the mean over the answer proper, without delimiters; `accuracy`, the fraction of rows
    with every answer token right, that is, none scored higher (as greedy decoding would have it).
    """

    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.answer_logits(parameters, batch.tokens, batch.positions, generators)
        sums, metrics = answer_losses(logits, batch, answer)
        return sums / (batch.targets != IGNORE).sum((1, 2)).clamp(min=1), metrics

    def weight(self, batch: Split) -> Tensor:
        """Answer tokens [K]."""
        return (batch.targets != IGNORE).sum((1, 2)).float()

    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        logits = model.answer_logits(parameters, batch.tokens, batch.positions)
        return answer_metrics(logits, batch, answer)


class WordLoss(Objective):
    """Mean cross-entropy over all targets; metrics concern the answer as a word of one or more tokens (Reversal Curse
    analysis, arXiv 2405.04669).

    `word_nll` and `first_token_nll` are negative log-probabilities in nats. Evaluation adds `accuracy` (greedy), `rank`
    (1 is best: 1 + the tokens of the right token's kind that score higher; the worst of the word's tokens),
    `candidate_nll` (the softmax runs over tokens of the right token's kind only), and what uniform guesses have:
    `uniform_nll` over the whole vocabulary, `uniform_candidate_nll` over the candidates.
    """

    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.answer_logits(parameters, batch.tokens, batch.positions, generators)
        losses, _ = token_losses(logits, batch.targets)
        word = losses.detach()[:, :, answer.columns]
        metrics = {"word_nll": _word_nll(word).mean(-1), "first_token_nll": word[:, :, 0].mean(-1)}
        return losses.mean((1, 2)), metrics

    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        targets = batch.targets[:, :, answer.columns]
        logits = model.answer_logits(parameters, batch.tokens, batch.positions)[:, :, answer.columns]
        losses, right = token_losses(logits, targets)
        metrics = {"accuracy": right.all(-1), "word_nll": _word_nll(losses), "first_token_nll": losses[:, :, 0]}
        uniform = torch.full_like(losses[:, :, 0], targets.shape[-1] * math.log(logits.shape[-1]))
        if answer.token_kinds is None:
            return metrics | {"uniform_nll": uniform}
        kinds = answer.token_kinds.expand(len(targets), -1)
        own = kinds.gather(1, targets.flatten(1)).view_as(targets)
        other = kinds[:, None, None, :] != own.unsqueeze(-1)  # [K, B, A, V]
        among = logits.masked_fill(other, float("-inf"))
        rank = (among > logits.gather(-1, targets.unsqueeze(-1))).sum(-1).amax(-1) + 1
        candidates = (~other).sum(-1).to(losses.dtype).log().sum(-1)
        return metrics | {
            "candidate_nll": _word_nll(token_losses(among, targets)[0]),
            "rank": rank,
            "uniform_nll": uniform,
            "uniform_candidate_nll": candidates,
        }


def answer_losses(logits: Tensor, batch: Split, answer: Answer) -> tuple[Tensor, dict[str, Tensor]]:
    """logits [K, B, A, V] -> summed cross-entropy of all answer tokens [K], training metrics of `AnswerLoss`."""
    losses, right = token_losses(logits, batch.targets)
    counted, proper = batch.targets != IGNORE, answer.columns
    answers = losses.detach()[:, :, proper].sum((1, 2)) / counted[:, :, proper].sum((1, 2)).clamp(min=1)
    accuracy = (right | ~counted).all(-1).to(losses.dtype).mean(-1)
    return losses.sum((1, 2)), {"answer_loss": answers, "accuracy": accuracy}


def answer_metrics(logits: Tensor, batch: Split, answer: Answer) -> dict[str, Tensor]:
    """logits [K, B, A, V] -> evaluation metrics of `AnswerLoss` [K, B]."""
    right = (logits.argmax(-1) == batch.targets) | (batch.targets == IGNORE)
    losses, _ = token_losses(logits[:, :, answer.columns], batch.targets[:, :, answer.columns])
    counted = (batch.targets[:, :, answer.columns] != IGNORE).sum(-1).clamp(min=1)
    return {"accuracy": right.all(-1), "answer_loss": losses.sum(-1) / counted}


def _word_nll(losses: Tensor) -> Tensor:
    """[..., A] -> [...]: of the whole word, at most what the published code's ln(p + 1e-50) can give."""
    return losses.sum(-1).clamp(max=-math.log(1e-50))


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token, 0 where the target is IGNORE, and whether no other token scores higher.

    logits [..., V], targets [...] -> losses [...] (float32 or wider), right [...] (bool, undefined at IGNORE).
    Never waits for the device.
    """
    if not logits.is_cuda and not torch.compiler.is_compiling():
        return _TokenLosses.apply(logits, targets)
    vocab_size = logits.shape[-1]
    losses = F.cross_entropy(
        logits.reshape(-1, vocab_size).float(), targets.reshape(-1), reduction="none", ignore_index=IGNORE
    )
    detached = logits.detach()
    picked = detached.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return losses.view_as(targets), picked >= detached.amax(-1)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy that keeps the probabilities, so that its backward pass needs no exponential (CPU: 2x faster)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        index = targets.clamp(min=0).unsqueeze(-1)
        probabilities = logits.softmax(-1)
        best = logits.amax(-1)
        picked = logits.gather(-1, index).squeeze(-1)
        # log-sum-exp = best - log p(best): p(best) >= 1/V, so this is as stable as log_softmax
        losses = (best - picked).sub_(probabilities.amax(-1).log_()).masked_fill_(targets == IGNORE, 0.0)
        right = picked >= best
        ctx.mark_non_differentiable(right)
        ctx.save_for_backward(probabilities, targets)
        return losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        grad = grad.masked_fill(targets == IGNORE, 0.0).unsqueeze(-1)
        # in place: the largest tensor of a step; a second backward pass raises torch's version error
        result = probabilities.mul_(grad).scatter_add_(-1, targets.clamp(min=0).unsqueeze(-1), -grad)
        return result, None
