"""Causal tracing and logit lens inside a circuit: the same questions as to a whole network, asked where only the
circuit's edges carry the clean input.

A circuit is run on prompts; its other edges carry what their writers put out on fixed other prompts. The state after a
layer is the sum of what all writers so far put out: of the whole network, its residual stream.

Shapes: N examples, T tokens, d width, E edges, W writers, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.edge_masks import Circuit
from models.edge_network import EdgeNetwork
from tasks.tracing import TracingExamples


@dataclass(frozen=True)
class CircuitPass:
    logits: Tensor  # [N, V], at the last token
    embeddings: Tensor  # [N, T, d], where they are no writers; else 0
    writers: Tensor  # [W, N, T, d]

    @property
    def best(self) -> Tensor:
        return self.logits.argmax(-1)


@dataclass(frozen=True)
class Patch:
    """The states after `layer` layers at positions start..stop-1 become those of another pass."""

    layer: int
    start: int
    stop: int
    other: CircuitPass


class CircuitRunner:
    """`others` [N, T]: the prompts whose values all edges outside the circuit carry."""

    def __init__(self, network: EdgeNetwork, circuit: Circuit, others: Tensor) -> None:
        self.network, device = network, network.device
        self.mask, self.nodes = circuit.mask.to(device, network.dtype), circuit.nodes.to(device, network.dtype)
        last = torch.full((len(others), 1), others.shape[1] - 1, device=device)
        writers = network.run(others.to(device), last, keep_writers=True).writers
        assert writers is not None
        self.others = writers  # [W, N, T, d]

    @torch.no_grad()
    def run(self, prompts: Tensor, patch: Patch | None = None) -> CircuitPass:
        """prompts [N, T]."""
        network, graph = self.network, self.network.graph
        embeddings = network.embeddings(prompts.to(network.device))
        is_written = bool(graph.embeddings)
        always = torch.zeros_like(embeddings[0]) if is_written else embeddings.sum(0)
        writers = self._written(embeddings[:0], embeddings if is_written else embeddings[:0])
        heads, groups = graph.num_heads, graph.num_kv_heads
        for layer in range(graph.num_layers):
            if patch is not None and layer == patch.layer:
                always = _patched(always, patch.other.embeddings, patch)
                writers = _patched(writers, patch.other.writers[: len(writers)], patch)
            masks, own = graph.reads(self.mask, layer), graph.own_heads(self.mask, layer)
            inputs = self._read(masks[:-1], always, writers).split([heads, groups, groups])
            writers = self._written(writers, network.attend(layer, *inputs))
            joined = self._read(torch.cat([masks[-1], own])[None], always, writers)
            writers = self._written(writers, network.mlp(layer, joined))
        final = self._read(graph.last(self.mask)[None], always, writers)[0]
        return CircuitPass(network.logits(final[:, -1]), always, writers)

    def _read(self, masks: Tensor, always: Tensor, writers: Tensor) -> Tensor:
        """Masks [R, w] of the writers so far -> the readers' inputs [R, N, T, d]."""
        others = self.others[: len(writers)]
        return always + others.sum(0) + torch.einsum("rw,wntd->rntd", masks, writers - others)

    def _written(self, writers: Tensor, outputs: Tensor) -> Tensor:
        """The next writers' outputs are added; one that is off puts out what it does on the other prompts."""
        span = slice(len(writers), len(writers) + len(outputs))
        return torch.cat([writers, torch.lerp(self.others[span], outputs, self.nodes[span, None, None, None])])

    def state(self, run: CircuitPass, layer: int) -> Tensor:
        """After `layer` layers [N, T, d]."""
        return run.embeddings + run.writers[: self.network.graph.writers_before(layer)].sum(0)

    def lens(self, run: CircuitPass, position: int, tokens: Tensor) -> np.ndarray:
        """Rank of tokens [N] in the state after 0..L layers at a position: [L + 1, N]."""
        layers = range(self.network.graph.num_layers + 1)
        logits = (self.network.logits(self.state(run, layer)[:, position]) for layer in layers)
        return np.stack([ranks(found, tokens) for found in logits])


def _patched(x: Tensor, other: Tensor, patch: Patch) -> Tensor:
    """[..., T, d]: `other` at the patch's positions."""
    parts = x[..., : patch.start, :], other[..., patch.start : patch.stop, :], x[..., patch.stop :, :]
    return torch.cat(parts, dim=-2)


def ranks(logits: Tensor, tokens: Tensor) -> np.ndarray:
    """logits [N, V], tokens [N] -> how many score higher [N]; ties go to the lower id, as in the probes."""
    tokens = tokens.to(logits.device)
    own = logits.gather(1, tokens[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < tokens[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(1).cpu().numpy()


def strengths(runner: CircuitRunner, examples: TracingExamples) -> Mapping[str, np.ndarray]:
    """Role -> causal strength [L - 1] of its states after layers 1..L-1: the share of examples, of those that the
    circuit answers right and that have a counterfactual, whose right token is not first after the patch. NaN where it
    answers none."""
    normal = runner.run(examples.prompts)
    right = ranks(normal.logits, examples.answers) == 0
    found = {}
    for name, role in examples.roles.items():
        prompts = examples.prompts.clone()
        prompts[:, : role.stop] = role.prompts  # what follows the patch does not matter to it
        other, counted = runner.run(prompts), right & role.possible
        after = [
            runner.run(examples.prompts, Patch(layer, role.start, role.stop, other))
            for layer in range(1, runner.network.graph.num_layers)
        ]
        found[name] = np.array([mean((ranks(run.logits, examples.answers) != 0)[counted]) for run in after])
    return found


def interchange(
    runner: CircuitRunner, prompts: Tensor, others: Tensor, position: int, answers: Tensor, expected: Tensor
) -> np.ndarray:
    """[L - 1]: share of questions whose answer becomes `expected` [N] when the state at a position, after layers
    1..L-1, is that of the circuit's run on `others` [N, T]; of those [N] that it answers right in both runs (`answers`
    of the prompts, `expected` of the others)."""
    normal, other = runner.run(prompts), runner.run(others)
    answers, expected = answers.to(normal.logits.device), expected.to(normal.logits.device)
    counted = (normal.best == answers) & (other.best == expected)
    layers = range(1, runner.network.graph.num_layers)
    after = [runner.run(prompts, Patch(layer, position, position + 1, other)) for layer in layers]
    return np.array([mean((run.best == expected)[counted].cpu().numpy()) for run in after])


def mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")
