"""The progressive loss of depth-recurrent models (Bansal et al. 2022, arXiv 2202.05826), as McLeish et al. 2024
(arXiv 2405.17399) train with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, Model, Objective, Parameters, Split
from models.objectives import AnswerLoss, answer_losses
from models.recurrent import Recurrences


class ProgressiveLoss(AnswerLoss):
    """(1 - alpha) * loss of all recurrences + alpha * loss of a random number of them, answers only.

    With R recurrences and M = max_backprop, all recurrences means R - M without gradients, then M with; at random means
    n in 0..R-1 without and k in 1..min(R - n, M) with, uniform, of each run from its own generator. One recurrence is
    the ordinary loss. Metrics and evaluation are those of `AnswerLoss`; the metrics are of the pass with all
    recurrences, or the random one where that is the only one.

    `throttle` and `reduction=slots` are what the published code does. Its documentation says that the former divides
    the block's gradients by the recurrences, and the latter gives examples equal weight; neither is so. (The former
    would do nearly nothing: AdamW's update does not change when the gradients of a tensor are scaled.)
    """

    alpha: float = Field(1.0, ge=0, le=1, description="share of the loss of a random number of recurrences")
    max_backprop: int | None = Field(None, gt=0, description="recurrences with gradients; default half of all")
    throttle: bool = Field(False, description="multiply by (1 + min(R/4, M/2)) / M, R recurrences, M max_backprop")
    reduction: Literal["mean", "slots"] = Field(
        "mean", description="mean over the answer tokens; or their sum over all tokens of the batch, padding included"
    )

    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings: Any = getattr(model, "settings", model)  # a wrapped network carries the model's fields there
        total = getattr(settings, "num_recurrences", 1)
        most = self.most_backprop(total)
        passes = [(self.alpha, self.draw(total, most, generators, batch.tokens))] if self.alpha > 0 else []
        if self.alpha < 1:
            runs = len(batch.tokens)
            passes = [(1.0 - self.alpha, ([total - most] * runs, [most] * runs)), *passes]
        loss: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        for weight, recurrences in passes:
            part, found = self._pass(model, parameters, batch, answer, generators, recurrences)
            loss = weight * part if loss is None else loss + weight * part
            metrics = metrics or found
        assert loss is not None
        return loss * self.throttle_factor(total) if self.throttle else loss, metrics

    def most_backprop(self, total: int) -> int:
        return min(total, self.max_backprop or max(total // 2, 1))

    def throttle_factor(self, total: int) -> float:
        most = self.most_backprop(total)
        return (1.0 + min(total / 4.0, most / 2.0)) / most

    def draw(self, total: int, most: int, generators: Sequence[torch.Generator] | None, tokens: Tensor) -> Recurrences:
        """Recurrences of each run without and with gradients. Raises ConfigError where there is nothing to draw from.

        Workers that share a run agree on them, because a sharded block must run equally often everywhere.
        """
        if total == 1:
            return [0] * len(tokens), [1] * len(tokens)
        if generators is None:
            raise ConfigError("objective.alpha: a random number of recurrences needs a model that draws; set alpha=0")
        pairs = torch.stack([_draw_pair(total, most, generator, tokens.device) for generator in generators])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(pairs, 0)
        before, after = pairs.t().tolist()
        return before, after

    def _pass(
        self,
        model: Any,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
        recurrences: Recurrences,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.answer_logits(parameters, batch.tokens, batch.positions, generators, recurrences=recurrences)
        sums, metrics = answer_losses(logits, batch, answer)
        slots = batch.tokens.shape[1] * batch.tokens.shape[2]
        number = (batch.targets != IGNORE).sum((1, 2)).clamp(min=1) if self.reduction == "mean" else slots
        return sums / number, metrics

    def weight(self, batch: Split) -> Tensor:
        """Answer tokens [K], or rows where the loss is over all slots."""
        return super().weight(batch) if self.reduction == "mean" else Objective.weight(self, batch)


def _draw_pair(total: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(n, k) [2] on the device, without waiting for it."""
    before = torch.randint(total, (1,), generator=generator, device=device)
    share = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
    after = 1 + (share * (total - before).clamp(max=most)).long()
    return torch.cat([before, after])
