"""A train step of Edge Pruning in the published formulation (Bhaskar et al. 2024, code of 2025-08), for comparison.

All writers' outputs in one tensor of W rows; a write pads the new outputs with zeros to W rows and adds, so that each
makes a new tensor; a read is an einsum over all W rows with masks that are 0 for later writers, once for the masked run
and once for the corrupted one; both reference runs go through the same network with masks of sigmoid(12); logits at
every position. Noise is drawn on the CPU once for each matrix of masks.
Shapes: B rows, T tokens, d width, h head width, H heads, W writers, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models import hard_concrete
from models.edge_transformer import EdgeTransformer

TARGET, LEARNING_RATE = 0.5, 0.8


class PublishedStep:
    """reference runs, masked run, loss, backward, AdamW. `network`: a GPT-2 with embeddings as writers."""

    def __init__(self, network: EdgeTransformer) -> None:
        self.network, self.graph = network, network.graph
        self.heads, self.width, self.size = network.graph.num_heads, network.width, network.head_width
        self.log_alphas, self.usable = [], []
        writers = self.graph.num_writers
        for layer in range(self.graph.num_layers):
            before = self.graph.writers_before(layer)
            shapes = [((writers, self.heads), before)] * 3 + [((writers,), before + self.heads)]
            shapes += [((self.heads,), self.heads), ((1,), 1)]
            for shape, usable in shapes:
                self._add(shape, usable)
        for shape, usable in (((writers,), writers), ((1,), 1), ((1,), 1)):
            self._add(shape, usable)
        self.reference_log_alphas = [x.detach().clone() for x in self.log_alphas]
        self.multipliers = torch.zeros(4, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": self.log_alphas}, {"params": [self.multipliers], "maximize": True}],
            lr=LEARNING_RATE,
            fused=True,
        )

    def _add(self, shape: tuple[int, ...], usable: int) -> None:
        self.log_alphas.append(torch.full(shape, 10.0).requires_grad_())
        self.usable.append((torch.arange(shape[0]) < usable).float().view(-1, *[1] * (len(shape) - 1)))

    def __call__(self, clean: Tensor, corrupted: Tensor, positions: Tensor) -> float:
        with torch.no_grad():
            reference, _ = self._forward(clean, None, self._deterministic())
            _, states = self._forward(corrupted, None, self._deterministic())
        masks = self._sampled()
        logits, _ = self._forward(clean, states, masks)
        picked = [F.log_softmax(_at(x, positions), -1) for x in (logits, reference)]
        loss = F.kl_div(picked[0], picked[1], log_target=True, reduction="none").sum(-1).mean()
        loss = loss + self._sparsity_loss(masks)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _sampled(self) -> list[Tensor]:
        found = []
        for log_alpha, usable in zip(self.log_alphas, self.usable, strict=True):
            noise = torch.empty(log_alpha.shape).uniform_(hard_concrete.EPS, 1 - hard_concrete.EPS)
            found.append(hard_concrete.sample(log_alpha, noise) * usable)
        return found

    def _deterministic(self) -> list[Tensor]:
        """The reference network's masks, found anew in each run, one matrix at a time."""
        found = []
        for log_alpha, usable in zip(self.reference_log_alphas, self.usable, strict=True):
            soft = torch.sigmoid(log_alpha * (hard_concrete.MAGNITUDE / hard_concrete.TEMPERATURE))
            zeros = round(hard_concrete.probability_of_zero(log_alpha).sum().item())
            if zeros:
                soft.view(-1)[soft.view(-1).topk(zeros, largest=False).indices] = 0.0
            found.append(soft * usable)
        return found

    def _sparsity_loss(self, masks: list[Tensor]) -> Tensor:
        is_edge = [number % 6 < 4 for number in range(6 * self.graph.num_layers)] + [True, False, False]
        edges = torch.stack([mask.sum() for mask, edge in zip(masks, is_edge, strict=True) if edge]).sum()
        nodes = torch.stack([mask.sum() for mask, edge in zip(masks, is_edge, strict=True) if not edge]).sum()
        edge_gap = 1 - edges / self.graph.num_edges - TARGET
        node_gap = 1 - nodes / self.graph.num_writers - TARGET
        first, second, third, fourth = self.multipliers
        return first * edge_gap + second * edge_gap**2 + third * node_gap + fourth * node_gap**2

    def _forward(self, tokens: Tensor, corrupted: Tensor | None, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> logits [B, T, V], outputs of writers [W, B, T, d]. `masks` in the order of the constructor."""
        network, heads = self.network, self.heads
        *of_layers, final, token_node, position_node = masks
        embeddings = network.embeddings(tokens)
        x = embeddings.new_zeros(self.graph.num_writers, *embeddings.shape[1:])
        for row, node in enumerate((token_node, position_node)):
            x = self._write(x, embeddings[row : row + 1], row, node, corrupted)
        for layer in range(self.graph.num_layers):
            q, k, v, mlp, attention_node, mlp_node = of_layers[6 * layer : 6 * layer + 6]
            own, start = network.layers[layer], self.graph.writers_before(layer)
            inputs = [self._read(x, corrupted, mask, layer, heads) for mask in (q, k, v)]
            mixed = self._attend(layer, [own.attention_norm(part) for part in inputs])
            weight = own.output.view(heads, self.size, self.width)
            outputs = torch.einsum("nbth,nhd->nbtd", mixed, weight) + own.output_bias / heads
            x = self._write(x, outputs, start, attention_node, corrupted)
            inner = self._read(x, corrupted, mlp[:, None], layer, 1)[0]
            x = self._write(x, network.mlp(layer, inner)[None], start + heads, mlp_node, corrupted)
        last = self._read(x, corrupted, final[:, None], self.graph.num_layers, 1)[0]
        return network.logits(last), x

    def _read(self, x: Tensor, corrupted: Tensor | None, mask: Tensor, layer: int, readers: int) -> Tensor:
        found = torch.einsum("wbtd,wn->nbtd", x, mask)
        if corrupted is None:
            return found
        stop = self._usable_rows(layer, readers)
        usable = (torch.arange(len(mask)) < stop).float()[:, None]
        return found + torch.einsum("wbtd,wn->nbtd", corrupted, (1 - mask) * usable)

    def _usable_rows(self, layer: int, readers: int) -> int:
        if layer == self.graph.num_layers:
            return self.graph.num_writers
        return self.graph.writers_before(layer) + (self.heads if readers == 1 and self.heads > 1 else 0)

    def _write(self, x: Tensor, outputs: Tensor, start: int, node: Tensor, corrupted: Tensor | None) -> Tensor:
        scale = node.view(-1, 1, 1, 1)
        outputs = outputs * scale
        if corrupted is not None:
            outputs = outputs + corrupted[start : start + len(outputs)] * (1 - scale)
        padding = torch.eye(len(x))[start : start + len(outputs)]
        return x + torch.einsum("nbtd,nw->wbtd", outputs, padding)

    def _attend(self, layer: int, inputs: list[Tensor]) -> Tensor:
        own, heads = self.network.layers[layer], self.heads
        weights = own.qkv.view(self.width, 3, heads, self.size).permute(1, 2, 0, 3)
        biases = own.qkv_bias.view(3, heads, 1, 1, self.size)
        q, k, v = (
            torch.einsum("nbtd,ndh->nbth", x, weight) + bias
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits = (q @ k.mT / self.size**0.5).masked_fill(hidden, torch.finfo(q.dtype).min)
        return logits.softmax(-1) @ v


def _at(logits: Tensor, positions: Tensor) -> Tensor:
    return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
