"""GPT-2s and Llamas of frozen weights, taken apart for edge masks: one form for both families.

Shapes: B batch rows, T tokens, Q query positions, A answer positions, d width, h head width, m hidden units of the MLP,
H heads, G key/value heads (H = G but for grouped heads), J = H + 2G, W writers, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from groundswell.config import ConfigError
from models.edge_graph import EdgeGraph
from models.edge_network import EdgeNetwork, WholeRun

if TYPE_CHECKING:
    from models.edge_cache import ReferenceCache
    from models.edge_folded import FoldedTransformer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Norm:
    """LayerNorm (Ba et al. 2016); RMSNorm (Zhang & Sennrich 2019) if not centred; identity without a weight."""

    weight: Tensor | None = None  # [d]
    bias: Tensor | None = None  # [d]
    eps: float = 0.0
    centred: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


@dataclass(frozen=True)
class Layer:
    """One layer's weights, matrices as [in, out]. Heads lie side by side: all of q, then of k, then of v."""

    attention_norm: Norm
    qkv: Tensor  # [d, J*h]
    qkv_bias: Tensor  # [J*h]
    output: Tensor  # [H*h, d]
    output_bias: Tensor  # [d]
    mlp_norm: Norm
    hidden: Tensor  # [d, m], of a gated MLP [d, 2m]: the gate, then what it opens
    hidden_bias: Tensor  # [m] or [2m]
    mlp_output: Tensor  # [m, d]
    mlp_output_bias: Tensor  # [d]


@dataclass(frozen=True)
class Rotary:
    """Turns the leading 2r dimensions of a head: dimension i with dimension r + i (Su et al. 2021)."""

    frequencies: Tensor  # [r] float64, radians a position
    scale: float = 1.0  # of cosines and sines (Peng et al. 2023, YaRN, section 3.4)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [...] -> cosines and sines [..., r]."""
        angles = positions.unsqueeze(-1) * self.frequencies.to(positions.device)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., h] by cos and sin [..., r]. With -sin: the transposed map."""
    size = cos.shape[-1]
    first, second, rest = x.split([size, size, x.shape[-1] - 2 * size], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@dataclass(frozen=True)
class Tables:
    tokens: Tensor  # [V, d]
    positions: Tensor | None  # [P, d]
    head: Tensor  # [V, d]


class EdgeTransformer(EdgeNetwork):
    """`layers` are passed in turn until the graph's number is reached, so perhaps several times.

    `limit`: the longest sequence that the network computes as it was trained to, None where any will do.
    """

    def __init__(
        self,
        graph: EdgeGraph,
        tables: Tables,
        layers: Iterable[Layer],
        final_norm: Norm,
        activation: str,
        rotary: Rotary | None = None,
        limit: int | None = None,
        gated: bool = False,
    ) -> None:
        self.graph, self.tables, self.final_norm = graph, tables, final_norm
        given = tuple(layers)
        self.layers: Sequence[Layer] = given * (graph.num_layers // len(given))
        self.activation, self.rotary, self.limit, self.gated = activation, rotary, limit, gated
        self.num_outputs, self.width = tables.head.shape
        self.head_width = given[0].output.shape[0] // graph.num_heads
        self.device, self.dtype = tables.head.device, tables.head.dtype

    # ---- parts ----

    def embeddings(self, tokens: Tensor) -> Tensor:
        """Raises ConfigError for a sequence that is longer than the network's."""
        length = tokens.shape[1]
        if self.limit is not None and length > self.limit:
            raise ConfigError(
                f"task: sequences have {length} tokens, the network takes {self.limit}; shorten them, or prune another"
            )
        by_token = self.tables.tokens[tokens]
        if self.tables.positions is None:
            return by_token[None]
        return torch.stack([by_token, self.tables.positions[:length].expand_as(by_token)])

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        own, heads, groups = self.layers[layer], self.graph.num_heads, self.graph.num_kv_heads
        weights = own.qkv.unflatten(1, (-1, 1, self.head_width)).permute(1, 2, 0, 3)  # [J, 1, d, h]
        biases = own.qkv_bias.view(-1, 1, 1, self.head_width)
        q, k, v = (
            own.attention_norm(x) @ weight + bias
            for x, weight, bias in zip(
                (queries, keys, values), weights.split([heads, groups, groups]), biases.split([heads, groups, groups]),
                strict=True,
            )
        )  # fmt: skip
        mixed = self.mix(q, k, v, positions)
        outputs = mixed @ own.output.view(heads, 1, self.head_width, self.width)
        return outputs + own.output_bias / heads

    def mix(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
        """Causal attention of heads: q [H, B, Q, h], k and v [G, B, T, h], positions [B, Q] or None: all -> as q."""
        length = k.shape[2]
        everywhere = torch.arange(length, device=k.device)
        places = everywhere.expand(q.shape[1:3]) if positions is None else positions
        if self.rotary is not None:
            q = turn(q, *self.rotary.tables(places, q.dtype))
            k = turn(k, *self.rotary.tables(everywhere, k.dtype))
        shared = self.graph.num_heads // self.graph.num_kv_heads
        if shared > 1:
            k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        hidden = everywhere > places.unsqueeze(-1)  # [B, Q, T]
        logits = (q @ k.mT) * self.head_width**-0.5
        return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        own, activation = self.layers[layer], ACTIVATIONS[self.activation]
        hidden = own.mlp_norm(x) @ own.hidden + own.hidden_bias
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            return activation(gate) * up @ own.mlp_output + own.mlp_output_bias
        return activation(hidden) @ own.mlp_output + own.mlp_output_bias

    def logits(self, x: Tensor) -> Tensor:
        return self.final_norm(x) @ self.tables.head.T

    # ---- the whole ----

    @functools.cached_property
    def folded(self) -> FoldedTransformer:
        """For fast passes. Copies of the weights."""
        from models.edge_folded import FoldedTransformer

        return FoldedTransformer(self)

    @functools.cached_property
    def references(self) -> ReferenceCache:
        """Of training examples."""
        from models.edge_cache import ReferenceCache

        return ReferenceCache(self.folded)

    def run(self, tokens: Tensor, positions: Tensor, keep_writers: bool = False) -> WholeRun:
        if not keep_writers:
            from models.edge_ordinary import ordinary_pass

            final = ordinary_pass(self.folded, tokens, positions).final
            return WholeRun(self.folded.head(final)[0])
        embeddings = self.embeddings(tokens)
        writers = list(embeddings) if self.graph.embeddings else []
        x, residual = embeddings.sum(0), []
        for number, layer in enumerate(self.layers):
            residual.append(x)
            mixed = self._mixed(layer, x)
            weights = layer.output.view(-1, 1, self.head_width, self.width)
            writers += list(mixed @ weights + layer.output_bias / len(mixed))
            x = x + (mixed.permute(1, 2, 0, 3).flatten(2) @ layer.output + layer.output_bias)
            residual.append(x)
            writers.append(self.mlp(number, x))
            x = x + writers[-1]
        answers = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.width))
        return WholeRun(self.logits(answers), torch.stack(writers), (*residual, x))

    def _mixed(self, layer: Layer, x: Tensor) -> Tensor:
        """What the heads find [H, B, T, h] in a residual stream that is the same for all readers [B, T, d]."""
        heads, groups = self.graph.num_heads, self.graph.num_kv_heads
        qkv = layer.attention_norm(x) @ layer.qkv + layer.qkv_bias
        q, k, v = qkv.unflatten(-1, (-1, self.head_width)).permute(2, 0, 1, 3).split([heads, groups, groups])
        return self.mix(q, k, v, None)
