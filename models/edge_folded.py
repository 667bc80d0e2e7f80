"""A frozen transformer's parts with their norms folded away, and the transposes of their derivatives, by hand.

All that is read from the residual stream goes through a norm first, so what is written may be centred once and for all,
in the weights; a LayerNorm then is an RMSNorm, and its gain and bias move into the matrix that follows:

    norm(x) W + b = s (x A) + b',   s = 1 / rms(x),   A = diag(gain) W,   b' = b + bias W

so that the input of a head's reader, d numbers a token, is read once for s and once for the product, and not written
again. The transpose for a gradient g [h] of the product: dx = s (A g) - x s^2 <g, s (x A)> / d.

Shapes: N sequences, T tokens of each, Q queries, d width, h head width, m hidden units, H heads, G key/value heads,
J = H + 2G, V outputs. Inputs of readers are [readers, N*T, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.edge_transformer import ACTIVATIONS, EdgeTransformer, Layer, Norm, turn
from models.edge_workspace import Workspace
from models.layers import GELU_CUBIC, GELU_SCALE


class Projection(NamedTuple):
    """A norm and the product after it. Whichever has fewer numbers, input or product, is multiplied by s."""

    matrix: Tensor  # [..., d, o]
    bias: Tensor  # [..., 1, o]
    eps: float | None  # None: there is no norm

    def __call__(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Projected]:
        """x [..., n, d] -> the product with its bias [..., n, o], and what the way back needs. `out`: where a wide
        projection of one matrix may put the product."""
        if self.eps is None:
            return self._affine(x, out), Projected(x, None, None)
        scale = inverse_rms(x, self.eps)
        if self._is_wide:
            x = x * scale
            return self._affine(x, out), Projected(x, None, scale)
        product = torch.matmul(x, self.matrix).mul_(scale)
        return product + self.bias, Projected(x, product, scale)

    def backward(self, grad: Tensor, saved: Projected, out: Tensor | None = None) -> Tensor:
        """grad [..., n, o] -> gradient of the input [..., n, d], in `out` where that is given."""
        x, product, scale = saved
        if scale is None:
            return torch.matmul(grad, self.matrix.mT, out=out)
        share = -1.0 / x.shape[-1]
        if product is None:
            found = torch.matmul(grad, self.matrix.mT, out=out)
            return found.addcmul_(x, (found * x).sum(-1, keepdim=True), value=share).mul_(scale)
        grad = grad * scale
        along = (grad * product).sum(-1, keepdim=True).mul_(scale)
        return torch.matmul(grad, self.matrix.mT, out=out).addcmul_(x, along, value=share)

    def _affine(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self.matrix.dim() == 2 and x.dim() == 2:
            return torch.addmm(self.bias, x, self.matrix, out=out)
        return torch.matmul(x, self.matrix) + self.bias

    @property
    def _is_wide(self) -> bool:
        return self.matrix.shape[-1] > self.matrix.shape[-2]


class Projected(NamedTuple):
    x: Tensor  # [..., n, d], of a wide projection times s
    product: Tensor | None  # [..., n, o], before the bias, of a narrow one
    scale: Tensor | None  # [..., n, 1]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., d] -> [..., 1]; sums of squares in float32 at least."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    return length.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


@dataclass(frozen=True)
class FoldedLayer:
    attention: Projection  # [J, d, h]: queries scaled for the softmax
    output: Tensor  # [H, h, d]
    output_bias: Tensor  # [d], of all heads together
    hidden: Projection  # [d, m or 2m]
    mlp_output: Tensor  # [m, d]
    mlp_output_bias: Tensor  # [d]


class Attended(NamedTuple):
    """Of one layer's heads. Queries may stand for fewer tokens than keys and values."""

    q: Tensor  # [H*N, Q, h]
    k: Tensor  # [H*N, S, h]
    v: Tensor
    weights: Tensor  # [H*N, Q, S]


class MlpSaved(NamedTuple):
    projected: Projected
    hidden: Tensor  # [n, m or 2m]
    gate: Tensor | None  # of tanh-gelu, so that the way back needs no exponential

    @property
    def buffers(self) -> list[Tensor]:
        return [self.hidden] if self.gate is None else [self.hidden, self.gate]


class FoldedTransformer:
    """The parts of an EdgeTransformer. Copies of its weights: twice the memory."""

    def __init__(self, network: EdgeTransformer) -> None:
        self.network, self.graph, self.width = network, network.graph, network.width
        self.head_width, self.activation, self.gated = network.head_width, network.activation, network.gated
        self.rotary, self.space = network.rotary, Workspace()
        self.centred = network.final_norm.weight is not None and network.final_norm.centred
        folded = {id(layer): self.fold(layer) for layer in network.layers}  # some may be passed several times
        self.layers: Sequence[FoldedLayer] = [folded[id(layer)] for layer in network.layers]
        head = network.tables.head.T
        self.head = _project(network.final_norm, head, torch.zeros_like(head[0]))

    def fold(self, layer: Layer) -> FoldedLayer:
        heads, size = self.graph.num_heads, self.head_width
        qkv = _project(layer.attention_norm, layer.qkv, layer.qkv_bias)
        matrix, bias = (x.clone() for x in (qkv.matrix, qkv.bias))
        for part in (matrix, bias):
            part[:, : heads * size] *= size**-0.5
        matrix = matrix.T.contiguous().T  # products with narrow heads are up to twice as fast so
        # views: as one matrix they serve inputs that all readers share
        matrix, bias = (x.unflatten(-1, (-1, size)).movedim(-2, 0) for x in (matrix, bias))
        return FoldedLayer(
            Projection(matrix, bias, qkv.eps),
            self.centre(layer.output).view(heads, size, self.width),
            self.centre(layer.output_bias),
            _project(layer.mlp_norm, layer.hidden, layer.hidden_bias),
            self.centre(layer.mlp_output),
            self.centre(layer.mlp_output_bias),
        )

    def centre(self, x: Tensor) -> Tensor:
        """[..., d]; the mean over the width never passes a norm."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def embeddings(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [e, N, T, d]."""
        return self.centre(self.network.embeddings(tokens))

    # ---- heads ----

    def readers(self, layer: int, part: slice) -> Projection:
        """Those of q, k and v [j, d, h]."""
        whole = self.layers[layer].attention
        return Projection(whole.matrix[part], whole.bias[part], whole.eps)

    def joined(self, layer: int) -> Projection:
        """All readers of q, k and v of one input: [d, J*h]."""
        whole = self.layers[layer].attention
        return Projection(whole.matrix.movedim(0, 1).flatten(1), whole.bias.movedim(0, 1).flatten(1), whole.eps)

    def turn(self, x: Tensor, places: Tensor, back: bool = False) -> Tensor:
        """x [j, N, Q, h] at positions [N or 1, Q], by the rotary angles if the network has them; `back`: transposed."""
        if self.rotary is None:
            return x
        cos, sin = self.rotary.tables(places, x.dtype)
        return turn(x, cos, -sin if back else sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Attended]:
        """q [H, N, Q, h], k and v [G, N, S, h], `hidden` [Q, S] or [N, Q, S]: -inf where a query may not look ->
        what is found [H, N, Q, h]."""
        heads, groups = self.graph.num_heads, self.graph.num_kv_heads
        if heads > groups:
            k, v = k.repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
        shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
        if hidden.dim() == 3:
            hidden = hidden.expand(heads, *hidden.shape).flatten(0, 1)
        weights = torch.baddbmm(hidden, q, k.mT).softmax(-1)
        return torch.bmm(weights, v).view(shape), Attended(q, k, v, weights)

    def attend_backward(self, grad: Tensor, saved: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of what is found [H, N, Q, h] -> of q as it is, of k and v [G, N, S, h]."""
        heads, groups = self.graph.num_heads, self.graph.num_kv_heads
        q, k, v, weights = saved
        inner = grad.flatten(0, 1)
        by_score = torch._softmax_backward_data(torch.bmm(inner, v.mT), weights, -1, weights.dtype)
        keys, values = torch.bmm(by_score.mT, q), torch.bmm(weights.mT, inner)
        shape = (groups, heads // groups, grad.shape[1], *k.shape[1:])
        keys, values = keys.view(shape), values.view(shape)
        both = (keys.sum(1), values.sum(1)) if heads > groups else (keys.squeeze(1), values.squeeze(1))
        return torch.bmm(by_score, k).view(grad.shape), *both

    # ---- MLP ----

    def mlp(self, layer: int, x: Tensor) -> tuple[Tensor, MlpSaved]:
        """[n, d] -> what comes before the output matrix [n, m], and what the way back needs. Both are of the workspace,
        to be given back."""
        own = self.layers[layer].hidden
        hidden, projected = own(x, self.space.take((len(x), own.matrix.shape[-1]), x))
        outer, gate = hidden, None
        if self.gated:
            first, second = hidden.chunk(2, -1)
            outer = F.silu(first) * second
        elif self.activation == "gelu_new" and not x.is_cuda:
            outer, gate = (self.space.take(hidden.shape, x) for _ in range(2))
            gelu_tanh_forward(hidden, gate, outer)
        else:
            outer = ACTIVATIONS[self.activation](hidden)
        return outer, MlpSaved(projected, hidden, gate)

    def mlp_backward(self, layer: int, grad: Tensor, saved: MlpSaved, out: Tensor | None = None) -> Tensor:
        """Gradient of what the MLP adds [n, d] -> of its input [n, d], in `out` where that is given."""
        own = self.layers[layer]
        size = own.mlp_output.shape[0]
        whole = grad = torch.mm(grad, own.mlp_output.T, out=self.space.take((len(grad), size), grad))
        if self.gated:
            first, second = saved.hidden.chunk(2, -1)
            grad = torch.cat([torch.ops.aten.silu_backward(grad * second, first), grad * F.silu(first)], -1)
        elif saved.gate is not None:
            grad = gelu_tanh_backward(saved.hidden, saved.gate, grad, self.space)
        elif self.activation == "relu":
            grad = grad * (saved.hidden > 0)
        else:
            kind = "tanh" if self.activation == "gelu_new" else "none"
            grad = torch.ops.aten.gelu_backward(grad, saved.hidden, approximate=kind)
        found = own.hidden.backward(grad, saved.projected, out)
        self.space.give(whole, *saved.buffers)
        return found


def gelu_tanh_forward(x: Tensor, gate: Tensor, out: Tensor) -> None:
    """As that of models.layers, to given buffers."""
    torch.mul(x, x, out=gate).mul_(GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x).sigmoid_()
    torch.mul(x, gate, out=out)


def gelu_tanh_backward(x: Tensor, gate: Tensor, grad: Tensor, space: Workspace) -> Tensor:
    """Changes `grad`."""
    slope = torch.mul(x, x, out=space.take(x.shape, x))
    slope.mul_(3 * GELU_SCALE * GELU_CUBIC).add_(GELU_SCALE).mul_(x)
    slope.addcmul_(slope, gate, value=-1.0).add_(1.0)
    grad.mul_(gate).mul_(slope)
    space.give(slope)
    return grad


def _project(norm: Norm, matrix: Tensor, bias: Tensor) -> Projection:
    """Matrix [d, o], bias [o]; the norm's gain and bias go into them."""
    if norm.weight is None:
        return Projection(matrix, bias[None], None)
    if norm.bias is not None:
        bias = bias + norm.bias @ matrix
    return Projection(norm.weight[:, None] * matrix, bias[None], norm.eps)
