"""Stepwise internalisation: a model that writes its chain of thought is trained while the chain gets shorter, token by
token, until it answers at once (Deng et al. 2024, arXiv 2405.14838).

Shapes: K runs, B rows, T tokens, A answer columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from groundswell.protocols import IGNORE, Answer, Model, Objective, Parameters, Split
from models.objectives import answer_losses, answer_metrics

if TYPE_CHECKING:
    from groundswell.experiment import Experiment

LONGEST_OFFSET = 100  # where the published code cuts the smoothing's distribution off
ALL = 1_000_000  # tokens; more than any chain has
Side = Literal["left", "right"]


class StepwiseInternalization(Objective):
    """Cross-entropy on what is left of the chain and on the answer, for tasks with `form=explicit`.

    In update u, (u - pretrain_updates) / remove_every tokens of each chain are gone, and now and then some more (the
    paper's removal smoothing). Evaluation is without any chain: the model sees the question and must give the
    separator, the answer and the end. `train/removed` is the mean number of tokens that were taken from a row.
    """

    remove_every: int = Field(gt=0, description="updates between the removal of one more token of every chain")
    remove_all_from: int = Field(
        gt=0, description="when so many tokens are due, whole chains go; at most the longest chain's tokens"
    )
    pretrain_updates: int = Field(0, ge=0, description="updates with whole chains before the first removal")
    smoothing: float | None = Field(
        4.0, gt=0, description="lambda of P(o) ~ exp(-lambda o), o more tokens are removed from a row; none: never more"
    )
    side: Side = Field("left", description="where tokens are taken from; the paper finds right worse")
    keep_positions: bool = Field(
        False, description="what follows the gap stays at its places in the position table (learned tables only)"
    )
    reset_optimizer: bool = Field(True, description="forget Adam's moments whenever one more token goes")

    def check(self, experiment: Experiment) -> None:
        form = getattr(experiment.task, "form", None)
        if form != "explicit":
            raise ValueError(
                "objective StepwiseInternalization: the task must give whole chains; use a chain-of-thought task with "
                "task.form=explicit"
            )
        if self.keep_positions and getattr(experiment.model, "position_encoding", None) != "absolute":
            raise ValueError(
                "objective.keep_positions: needs a Decoder with a learned position table; set "
                "model.position_encoding=absolute, or leave it out"
            )
        if self.reset_optimizer and experiment.scaling.strategy == "deepspeed":
            raise ValueError(
                "objective.reset_optimizer: DeepSpeed keeps its moments; set objective.reset_optimizer=false, or use "
                "scaling.strategy=fsdp"
            )

    @property
    def stochastic(self) -> bool:
        return self.smoothing is not None

    # ---- the schedule ----

    def removed(self, update: int) -> int:
        """Tokens that are due in number `update`, from 0."""
        due = max(0, update - self.pretrain_updates) // self.remove_every
        return ALL if due >= self.remove_all_from else due

    def scheduled(self, update: int, total: int) -> dict[str, float]:
        return {"removed": float(self.removed(update))}

    def optimizer_start(self, update: int, total: int) -> int:
        if not self.reset_optimizer:
            return 0
        due = min(max(0, update - self.pretrain_updates) // self.remove_every, self.remove_all_from)
        return self.pretrain_updates + due * self.remove_every if due else 0

    # ---- losses ----

    def loss(
        self,
        model: Model,
        parameters: Parameters,
        batch: Split,
        answer: Answer,
        generators: Sequence[torch.Generator] | None,
        scheduled: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        removed = (scheduled or self._nothing(batch))["removed"].long()[:, None].expand(batch.tokens.shape[:2])
        if generators is not None and self.smoothing is not None:
            removed = removed + _offsets(removed.shape[1], self.smoothing, generators)
        shorter, gone, places = without_chain(batch, removed, self.side)
        source = generators if model.stochastic else None
        logits = model.answer_logits(parameters, shorter.tokens, shorter.positions, source, **self._options(places))
        sums, metrics = answer_losses(logits, shorter, answer)
        return sums / (shorter.targets != IGNORE).sum((1, 2)).clamp(min=1), metrics | {"removed": gone.float().mean(1)}

    def _options(self, places: Tensor) -> dict[str, Any]:
        return {"places": places} if self.keep_positions else {}

    def _nothing(self, batch: Split) -> dict[str, Tensor]:
        return {"removed": torch.zeros(len(batch.tokens), device=batch.tokens.device)}

    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        removed = torch.full(batch.tokens.shape[:2], ALL, device=batch.tokens.device)
        shorter, _, places = without_chain(batch, removed, self.side)
        logits = model.answer_logits(parameters, shorter.tokens, shorter.positions, **self._options(places))
        return answer_metrics(logits, shorter, answer)


def without_chain(batch: Split, removed: Tensor, side: Side) -> tuple[Split, Tensor, Tensor]:
    """Rows without `removed` [K, B] tokens of their chains, at most all of them; the second separator stays.

    Batch: the form `explicit` of a chain-of-thought task, whose answer columns come first and whose first position is
    the second separator. Returns rows [K, B, T'], no longer than needed on a CPU, how many tokens went [K, B], and
    where each token stood before [K, B, T'].
    """
    tokens, positions = batch.tokens, batch.positions
    second = positions[..., 0]  # [K, B]
    separator = tokens.gather(-1, second.unsqueeze(-1))
    first = (tokens == separator).int().argmax(-1)
    removed = removed.clamp(max=second - first - 1).clamp(min=0)
    start = first if side == "left" else second - 1 - removed  # the last place before the gap
    shortest = 0 if tokens.is_cuda else int(removed.min())  # reading it would make the host wait for the device
    length = tokens.shape[-1]
    places = torch.arange(length - shortest, device=tokens.device)
    source = places + torch.where(places > start.unsqueeze(-1), removed.unsqueeze(-1), 0)
    source = source.clamp(max=length - 1)
    shorter = tokens.gather(-1, source)
    # a target at p + 1 is predicted from p; it is gone where p + 1 lies in the gap
    gap_start, gap_end = start.unsqueeze(-1), (start + removed).unsqueeze(-1)
    in_gap = (positions >= gap_start) & (positions < gap_end)
    moved = torch.where(positions >= gap_end, positions - removed.unsqueeze(-1), positions)
    targets = torch.where(in_gap, IGNORE, batch.targets)
    return Split(shorter, torch.where(in_gap, 0, moved), targets), removed, source


def _offsets(count: int, rate: float, generators: Sequence[torch.Generator]) -> Tensor:
    """[K, count] of P(o) = (1 - exp(-rate)) exp(-rate o), by inversion."""
    drawn = torch.stack([torch.rand(count, generator=g, device=g.device, dtype=torch.float64) for g in generators])
    return (torch.log1p(-drawn) / -rate).floor().clamp(max=LONGEST_OFFSET).long()
