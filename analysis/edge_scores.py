"""Scores of single edges from gradients: edge attribution patching (EAP, Syed et al. 2023, arXiv 2310.10348) and the
same with integrated gradients (EAP-IG, Hanna et al. 2024, arXiv 2403.17806, section 3).

The score of an edge w -> r is what the measure would change, to first order, were the writer's clean output replaced by
the corrupted one there: (f_w - c_w) . dL/dr, by gradients at the clean input (EAP) or their mean over m inputs between
the corrupted and the clean one (EAP-IG). EAP is the case m = 1.
Shapes: E edges, W writers, R readers of a stage, B rows of a batch, T tokens, A answer positions, V outputs, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from analysis.circuit_evaluation import GradedTask, inputs
from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Split
from models.edge_network import EdgeNetwork

EAP_IG_STEPS = 5  # Hanna et al. 2024, section 3
# Differentiable measures of an answer, the best suited first; the last one is made here, and any task has it. The
# divergence from the whole network is none of them: its gradient at the clean input is zero.
LOG_PROBABILITY = "log_probability"
MEASURES = ("logit_difference", "probability_difference", LOG_PROBABILITY)

Measure = Callable[[Tensor], Tensor]  # logits [B, A, V] -> a sum over rows


def edge_scores(
    network: EdgeNetwork,
    task: GradedTask,
    split: Split,
    measure: str | None = None,
    steps: int = 1,
    corrupted: bool = True,
    batch_size: int = 16,
) -> Tensor:
    """[E] float32 on the CPU: mean score over the split's examples, with its sign. `measure`: one of the task's, or
    log_probability (of what the whole network answers); by default the first of MEASURES that there is.

    Raises ConfigError for a measure that the task does not have or that has no gradient.
    """
    total = torch.zeros(network.graph.num_edges, device=network.device)
    for start in range(0, len(split), batch_size):
        batch = split.select(slice(start, start + batch_size)).to(network.device)
        clean, other = inputs(task, batch.tokens, corrupted)
        whole = network.run(clean, batch.positions, keep_writers=True)
        assert whole.writers is not None
        differences = whole.writers.detach()
        begin, end = 0.0 * network.embeddings(clean).sum(0), network.embeddings(clean).sum(0)
        if other is not None:
            ablated = network.run(other, batch.positions, keep_writers=True).writers
            assert ablated is not None
            differences = differences - ablated
            begin = network.embeddings(other).sum(0)
        graded = _measure(task, measure, whole.logits.detach(), batch)
        for step in range(1, steps + 1):
            entered = begin + (end - begin) * (step / steps)
            _Pass(network, differences, total).run(entered, batch.positions, graded)
    return total.cpu() / (len(split) * steps)


def _measure(task: GradedTask, name: str | None, reference: Tensor, batch: Split) -> Measure:
    def grades(logits: Tensor) -> dict[str, Tensor]:
        return {**task.grade(logits, reference, batch), LOG_PROBABILITY: _log_probability(logits, reference, batch)}

    known = grades(reference)
    chosen = name or next(measure for measure in MEASURES if measure in known)
    if chosen not in known:
        raise ConfigError(f"measure: task {type(task).__name__} has no '{chosen}'; it has {', '.join(known)}")

    def graded(logits: Tensor) -> Tensor:
        values = grades(logits)[chosen]
        if not values.requires_grad:
            raise ConfigError(f"measure: '{chosen}' has no gradient; use one of {', '.join(MEASURES)}")
        return values.sum()

    return graded


def _log_probability(logits: Tensor, reference: Tensor, batch: Split) -> Tensor:
    """Of the whole network's best tokens, mean over the answer [B]. A single output is a number: its negative squared
    distance."""
    counted = batch.targets != IGNORE
    if logits.shape[-1] == 1:
        values = -(logits - reference).squeeze(-1).square()
    else:
        values = logits.log_softmax(-1).gather(-1, reference.argmax(-1, keepdim=True)).squeeze(-1)
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)


class _Pass:
    """An ordinary pass that adds up, reader by reader, gradient times difference of each writer before it."""

    def __init__(self, network: EdgeNetwork, differences: Tensor, total: Tensor) -> None:
        self.network, self.graph = network, network.graph
        self.differences = differences.flatten(1)  # [W, B*T*d]
        self.total = total

    def run(self, x: Tensor, positions: Tensor, measure: Measure) -> None:
        """`x` [B, T, d]: the sum of the embeddings."""
        network, graph = self.network, self.graph
        counts = [graph.num_heads, graph.num_kv_heads, graph.num_kv_heads]
        x = x.detach().requires_grad_()  # without embedding writers nothing else would ask for gradients
        with torch.enable_grad():
            for layer in range(graph.num_layers):
                reads, own = graph.reads(self.total, layer), graph.own_heads(self.total, layer)
                queries, keys, values = self._read(x, reads[:-1]).split(counts)
                x = x + network.attend(layer, queries, keys, values).sum(0)
                x = x + network.mlp(layer, self._read(x, reads[-1:], own[None])[0])
            final = self._read(x, graph.last(self.total)[None])[0]
            answers = final.gather(1, positions.unsqueeze(-1).expand(-1, -1, network.width))
            measure(network.logits(answers)).backward()

    def _read(self, x: Tensor, scores: Tensor, own: Tensor | None = None) -> Tensor:
        """One copy of the residual stream [B, T, d] for each reader [R, B, T, d]; the backward pass adds to the
        readers' scores [R, writers before], which are views, and to those of the heads that follow (`own` [R, H])."""
        copies = x.expand(len(scores), *x.shape).clone()
        before = scores.shape[1]

        def add(gradients: Tensor) -> None:
            flat = gradients.flatten(1)
            scores.add_(flat @ self.differences[:before].T)
            if own is not None:
                own.add_(flat @ self.differences[before : before + own.shape[1]].T)

        copies.register_hook(add)
        return copies
