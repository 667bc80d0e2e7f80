"""What edge masks are trained to do: answer as the whole network does, with a given sparsity (Edge Pruning, Bhaskar et
al. 2024, arXiv 2406.16778, section 3).

Shapes: K runs, B batch rows, A answer positions, V outputs, E edges, W writers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.protocols import IGNORE, Answer, Model, Objective, Parameters, Split
from models.edge_masked import EDGE_MULTIPLIERS, NODE_MULTIPLIERS, EdgeMasked
from models.edge_masks import sparsity

NEAR = 0.05  # outputs that are numbers, not logits, agree when they are so near (the published test of xproportion)


class EdgePruning(Objective):
    """KL from the whole network to the masked one at the answer, plus l1 (s - t) + l2 (s - t)^2 for the edges' sparsity
    s with its target t, and as much for the nodes'.

    l1 and l2 are parameters that climb: the optimizer needs a group with match=multipliers and ascent=true. Targets
    above 1 are never reached and keep pushing. Metrics: `kl`, `edge_sparsity`, `node_sparsity` (of the sampled masks),
    `target`, `lambda_1`, `lambda_2`, `edge_loss`; with `node_loss` the same of the nodes. Evaluation uses masks without
    noise: `kl`, `accuracy`, `exact_match` (every answer token is the one that the whole network finds best),
    `edge_sparsity`.
    """

    packable: ClassVar[frozenset[str]] = frozenset({"target", "node_target", "start", "node_start", "warmup_steps"})

    target: float = Field(1.02, ge=0, le=2, description="sparsity of edges; above 1 keeps pushing")
    start: float = Field(0.0, ge=0, lt=1, description="target of edges at the first update")
    node_target: float = Field(0.72, ge=0, le=2, description="sparsity of nodes, with node_loss")
    node_start: float = Field(0.0, ge=0, lt=1, description="target of nodes at the first update")
    node_loss: bool = Field(False, description="constrain the nodes too; without, their masks follow the KL alone")
    warmup_steps: int = Field(2_500, ge=0, description="updates until the targets are reached")
    schedule: Literal["linear", "logarithmic"] = Field(
        "linear", description="of the targets; logarithmic: the part that is kept shrinks by equal factors"
    )
    use_l1: bool = Field(True, description="False leaves the linear term out")
    answer_space: Literal["vocabulary", "candidates", "positions"] = Field(
        "vocabulary",
        description="the distributions compared: over all outputs; over the task's candidate answers; over the answer "
        "positions, of a network with one output",
    )
    token_reduction: Literal["mean", "sum"] = Field("mean", description="of the KL over an example's answer tokens")

    @model_validator(mode="after")
    def _check(self) -> EdgePruning:
        if self.schedule == "logarithmic":
            used = {"target": self.target} | ({"node_target": self.node_target} if self.node_loss else {})
            for name, value in used.items():
                if value >= 1:
                    raise ValueError(f"{name} {value:g} does not go with schedule logarithmic; use linear")
        return self

    def check(self, experiment: Experiment) -> None:
        _edge_masked(experiment.model)
        optimizer = experiment.optimizer
        for name in (EDGE_MULTIPLIERS, NODE_MULTIPLIERS)[: 2 if self.node_loss else 1]:
            if not optimizer.group_settings()[optimizer.group_of(name)].ascent:
                raise ValueError(
                    f"optimizer.groups: {name} must climb; add a group with match=multipliers, ascent=true"
                )

    # ---- targets ----

    def scheduled(self, update: int, total: int) -> Mapping[str, float]:
        values = {"target": self._target(update, self.start, self.target)}
        if self.node_loss:
            values["node_target"] = self._target(update, self.node_start, self.node_target)
        return values

    def _target(self, update: int, start: float, end: float) -> float:
        if update >= self.warmup_steps:
            return end
        done = update / self.warmup_steps
        if self.schedule == "linear":
            return start + (end - start) * done
        kept = (1 - done) * math.log(1 - start) + done * math.log(1 - end)
        return 1 - math.exp(kept)

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
        """`scheduled`: the targets [K]; None: those after the warm-up."""
        masked = _edge_masked(model)
        edges, nodes = masked.deterministic(parameters) if generators is None else masked.sample(parameters, generators)
        targets = scheduled or {name: edges.new_tensor(t) for name, t in self.scheduled(self.warmup_steps, 0).items()}
        answers = Answers(self, masked, batch, answer)
        kl = answers.mean_divergence(masked.masked_logits(edges, nodes, batch.tokens, answers.positions))
        total, metrics = kl, {"kl": kl, "edge_sparsity": sparsity(edges), "node_sparsity": sparsity(nodes)}
        for kind, name in (("edge", EDGE_MULTIPLIERS), ("node", NODE_MULTIPLIERS)):
            if kind == "edge" or self.node_loss:
                prefix = "" if kind == "edge" else "node_"
                target = targets[f"{prefix}target"].expand_as(kl)
                penalty = self._penalty(metrics[f"{kind}_sparsity"] - target, parameters[name])
                metrics |= {f"{kind}_loss": penalty, f"{prefix}target": target}
                metrics |= {f"{prefix}lambda_{power + 1}": parameters[name][:, power] for power in (0, 1)}
                total = total + penalty
        if not self.node_loss:  # workers that average gradients wait for those of every parameter
            total = total + 0.0 * parameters[NODE_MULTIPLIERS].sum(-1)
        return total, {name: value.detach().clone() for name, value in metrics.items()}

    def _penalty(self, excess: Tensor, multipliers: Tensor) -> Tensor:
        """Sparsity minus target [K], multipliers [K, 2] -> [K]."""
        quadratic = multipliers[:, 1] * excess.square()
        return multipliers[:, 0] * excess + quadratic if self.use_l1 else quadratic

    def weight(self, batch: Split) -> Tensor:
        """Examples with an answer [K]."""
        return (batch.targets != IGNORE).any(-1).sum(-1).float()

    def evaluate(self, model: Model, parameters: Parameters, batch: Split, answer: Answer) -> dict[str, Tensor]:
        masked = _edge_masked(model)
        edges, nodes = masked.deterministic(parameters)
        answers = Answers(self, masked, batch, answer)
        logits = masked.masked_logits(edges, nodes, batch.tokens, answers.positions)
        metrics = {"kl": answers.divergence(logits), "exact_match": answers.agree(logits)}
        if self.answer_space != "positions":
            metrics["accuracy"] = answers.right(logits)
        return metrics | {"edge_sparsity": sparsity(edges)[:, None].expand_as(metrics["kl"])}


def _edge_masked(model: Model) -> EdgeMasked:
    if isinstance(model, Model) and not isinstance(model, EdgeMasked):
        raise ConfigError(f"objective: EdgePruning trains edge masks, {type(model).__name__} has none; use EdgeMasked")
    return cast(EdgeMasked, model)


class Answers:
    """What the whole network answers to a batch, and how answers are compared with it."""

    def __init__(self, objective: EdgePruning, model: EdgeMasked, batch: Split, answer: Answer) -> None:
        self.objective = objective
        self.positions = batch.positions[:, :, answer.columns]  # [K, B, A]
        self.targets = batch.targets[:, :, answer.columns]
        self.counted = self.targets != IGNORE
        self.candidates = self._candidates(answer)
        self.reference = model.whole_logits(batch.tokens, self.positions)  # [K or 1, B, A, V]

    def _candidates(self, answer: Answer) -> Tensor | None:
        """[V], in a pack [K, 1, 1, V]: which outputs compete; None: all."""
        if self.objective.answer_space != "candidates":
            return None
        if answer.token_kinds is None:
            raise ConfigError("objective.answer_space candidates: the task names no candidates; use vocabulary")
        among = answer.token_kinds >= 0
        return among if among.dim() == 1 else among[:, None, None, :]

    def _scores(self, logits: Tensor) -> Tensor:
        """logits [K, B, A, V] -> unnormalised log probabilities, those compared in the last dimension."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.objective.answer_space == "positions":
            competes = self.counted | ~self.counted.any(-1, keepdim=True)  # a row without any stays finite
            return scores.squeeze(-1).masked_fill(~competes, float("-inf"))
        return scores if self.candidates is None else scores.masked_fill(~self.candidates, float("-inf"))

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(whole network || masked) of each example [K, B]; 0 for an example without an answer."""
        expected, found = self._scores(self.reference).log_softmax(-1), self._scores(logits).log_softmax(-1)
        apart = (expected - found).masked_fill(expected == float("-inf"), 0.0)
        kl = (expected.exp() * apart).sum(-1)
        if self.objective.answer_space == "positions":
            return kl.masked_fill(~self.counted.any(-1), 0.0)
        kl = kl.masked_fill(~self.counted, 0.0).sum(-1)
        return kl if self.objective.token_reduction == "sum" else kl / self.counted.sum(-1).clamp(min=1)

    def mean_divergence(self, logits: Tensor) -> Tensor:
        """Mean over the examples with an answer [K]."""
        return self.divergence(logits).sum(-1) / self.counted.any(-1).sum(-1).clamp(min=1)

    def agree(self, logits: Tensor) -> Tensor:
        """Is every answer token the whole network's [K, B]?"""
        if self.objective.answer_space == "positions":
            same = (logits - self.reference).abs().squeeze(-1) <= NEAR
        else:
            same = self._scores(logits).argmax(-1) == self._scores(self.reference).argmax(-1)
        return (same | ~self.counted).all(-1)

    def right(self, logits: Tensor) -> Tensor:
        """Is every answer token the target [K, B]?"""
        return ((self._scores(logits).argmax(-1) == self.targets) | ~self.counted).all(-1)
