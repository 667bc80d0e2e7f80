"""Recurrent decoders on CPUs: one run, with padding left out and both passes of a layer written out.

Products of matrices, norms and MLPs work on the rows that answers depend on, laid end to end; only attention sees a
rectangle of rows and tokens. The same arithmetic as `RecurrentDecoder.layer`, the plain version and
oracle of its tests.
Shapes: B batch rows, T tokens, N rows in use, A queries, Q rows of queries in use, H heads, h width of one, d = H h,
m units of the gated MLP, half of them gates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundswell.protocols import Parameters
from models.layers import Generators
from models.recurrent_layers import causal

if TYPE_CHECKING:
    from models.recurrent import Recurrences, RecurrentDecoder

LONGEST = 64  # tokens up to which explicit attention is faster than the fused kernel of torch
PARTS = (
    "attention.query.weight",
    "attention.key.weight",
    "attention.value.weight",
    "attention.output.weight",
    "attention_norm.weight",
    "attention_norm.bias",
    "mlp.up.weight",
    "mlp.down.weight",
    "mlp_norm.weight",
    "mlp_norm.bias",
)


class Rectangle(NamedTuple):
    """Where rows in use lie in a rectangle [B, X] of them. All index rows of h numbers, head by head."""

    spread: Tensor  # [B*H*X] which row (and head) goes to each place; places not in use show the row after the last
    collect: Tensor  # [N*H] which place (head by head) belongs to each row
    shape: tuple[int, int, int]  # B, H, X


class Plan(NamedTuple):
    """Indices of one batch."""

    rows: Tensor  # [N] places (b, t) in use, flat
    tokens: Rectangle
    queries: Rectangle  # of the last layer
    picked: Tensor  # [Q] rows whose queries the last layer needs
    answers: Tensor  # [B*A] which of these each answer is
    last_bias: Tensor  # [B, 1, A, T] 0 or -inf: what the queries of the last layer may look at


def can_fuse(model: RecurrentDecoder, tokens: Tensor) -> bool:
    """One run of a short, published block on a CPU."""
    usual = model.norm == "layer_norm" and model.norm_scheme == "post" and model.activation == "gelu_glu"
    plain = usual and not model.biases and not model.attention_positions.startswith("rotary")
    here = not (tokens.is_cuda or torch.compiler.is_compiling())
    return plain and here and len(tokens) == 1 and tokens.shape[-1] <= LONGEST


def make_plan(positions: Tensor, length: int, num_heads: int, dtype: torch.dtype) -> Plan:
    """positions [B, A] of the answers in rows of `length` tokens. What follows a row's last one is not in use."""
    batch, num_answers = positions.shape
    used = torch.arange(length) <= positions.amax(1, keepdim=True)
    asked = torch.zeros(batch, length, dtype=torch.bool).scatter_(1, positions, True)
    rows, order = _numbered(used)
    query_places, query_order = _numbered(asked)
    # of several columns with one position, the last that writes stands for all
    places = torch.arange(batch * num_answers).view(batch, num_answers)
    query_of = query_order.view(batch, length).gather(1, positions)
    standing = torch.empty(len(query_places), dtype=torch.long)
    standing[query_of.flatten()] = places.flatten()
    spread = torch.full((batch * num_answers,), len(query_places)).index_fill(0, standing, 0)
    spread[standing] = torch.arange(len(query_places))
    hidden = torch.arange(length) > positions.unsqueeze(-1)
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    return Plan(
        rows,
        _rectangle(order.masked_fill(~used.flatten(), len(rows)), rows, (batch, num_heads, length)),
        _rectangle(spread, standing, (batch, num_heads, num_answers)),
        order[query_places],
        query_of.flatten(),
        bias,
    )


def _numbered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, X] -> places that are set, and the number of each place among them [B*X] (any where it is not set)."""
    flat = mask.flatten()
    return flat.nonzero().squeeze(1), (flat.cumsum(0) - 1).clamp_(min=0)


def _rectangle(row_of: Tensor, place_of: Tensor, shape: tuple[int, int, int]) -> Rectangle:
    """row_of [B*X] (one more than the last for a place not in use), place_of [N] -> indices head by head."""
    batch, heads, size = shape
    head = torch.arange(heads)
    spread = row_of.view(batch, 1, size) * heads + head[:, None]
    first = (place_of // size * heads * size + place_of % size).unsqueeze(1)
    return Rectangle(spread.flatten(), (first + head * size).flatten(), shape)


def answer_logits(
    model: RecurrentDecoder,
    parameters: Parameters,
    tokens: Tensor,
    positions: Tensor,
    generators: Generators | None,
    recurrences: Recurrences | None,
) -> Tensor:
    """As `RecurrentDecoder.answer_logits`, for one run that `can_fuse`."""
    length, width = tokens.shape[-1], model.width
    injected = model.embed(parameters, tokens, generators)
    state = model.first_state(injected, generators)
    biases = model.biases_of(parameters, length, tokens.device, generators)
    plan = make_plan(positions[0], length, model.num_heads, injected.dtype)
    injected_rows = _rows(injected, plan.rows)
    state_rows = injected_rows if state is injected else _rows(state, plan.rows)
    weights = [[parameters[f"layers.{n}.{part}"].squeeze(0) for part in PARTS] for n in range(model.num_layers)]
    in_order = causal(injected.new_zeros(1, 1, length, length), None)
    full = [in_order[0] if bias is None else causal(bias, None)[0] for bias in biases]
    final = biases[-1]
    last_bias = plan.last_bias if final is None else causal(final, positions)[0]

    def step(state: Tensor, last: bool) -> Tensor:
        x = state[0]
        for layer in range(model.num_layers):
            if layer == 0 or model.inject_every_layer:
                prefix = f"layers.{layer}." if model.inject_every_layer else ""
                x = model.inject(parameters, prefix, x.view(1, 1, -1, width), injected_rows.view(1, 1, -1, width))[0, 0]
            if last and layer == model.num_layers - 1:
                x = _FusedLayer.apply(
                    x, last_bias, plan.tokens, plan.queries, plan.picked, model.norm_eps, *weights[layer]
                )
            else:
                x = _FusedLayer.apply(x, full[layer], plan.tokens, plan.tokens, None, model.norm_eps, *weights[layer])
        return x.unsqueeze(0)

    rows = model.recur(step, state_rows.unsqueeze(0), generators, recurrences)
    logits = model.unembed(parameters, rows.view(1, 1, -1, width))
    return F.embedding(plan.answers, logits[0, 0]).view(*positions.shape, -1)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, 2).index_select(0, rows)


class _FusedLayer(torch.autograd.Function):
    """(state [N, d], bias [B or 1, H or 1, A, T] on scores, with -inf where a query may not look, ...) -> [Q, d].

    `picked` [Q]: the rows whose queries are wanted; None: all, Q = N.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        keys: Rectangle,
        queries: Rectangle,
        picked: Tensor | None,
        eps: float,
        *w: Tensor,
    ) -> Tensor:
        query_w, key_w, value_w, output_w, norm1_w, norm1_b, up_w, down_w, norm2_w, norm2_b = w
        width = x.shape[1:]
        picked_x = x if picked is None else x.index_select(0, picked)
        kv_w = torch.cat([key_w, value_w], 1)
        q = _spread(torch.mm(picked_x, query_w), queries, 1)[0]
        k, v = _spread(torch.mm(x, kv_w), keys, 2)
        weights = _attention_weights(q, k, bias, keys.shape[1])
        mixed = _collect(torch.bmm(weights, v), queries)
        sum1 = torch.addmm(picked_x, mixed, output_w)
        middle, mean1, rstd1 = torch.native_layer_norm(sum1, width, norm1_w, norm1_b, eps)
        hidden = torch.mm(middle, up_w)
        value, gate = hidden.chunk(2, 1)
        active = F.gelu(gate)
        inner = value * active
        sum2 = torch.addmm(middle, inner, down_w)
        result, mean2, rstd2 = torch.native_layer_norm(sum2, width, norm2_w, norm2_b, eps)
        ctx.save_for_backward(
            x, picked, picked_x, q, k, v, weights, mixed, sum1, mean1, rstd1, middle, hidden, active, inner, sum2,
            mean2, rstd2, query_w, kv_w, output_w, norm1_w, norm1_b, up_w, down_w, norm2_w, norm2_b,
        )  # fmt: skip
        ctx.keys, ctx.queries, ctx.bias_shape = keys, queries, bias.shape
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x, picked, picked_x, q, k, v, weights, mixed, sum1, mean1, rstd1, middle, hidden, active, inner, sum2,
         mean2, rstd2, query_w, kv_w, output_w, norm1_w, norm1_b, up_w, down_w, norm2_w,
         norm2_b) = ctx.saved_tensors  # fmt: skip
        grad_sum2, grad_norm2_w, grad_norm2_b = _norm_backward(grad, sum2, mean2, rstd2, norm2_w, norm2_b)
        grad_hidden = _gated_backward(torch.mm(grad_sum2, down_w.t()), hidden, active)
        grad_down, grad_up = torch.mm(inner.t(), grad_sum2), torch.mm(middle.t(), grad_hidden)
        grad_middle = torch.addmm(grad_sum2, grad_hidden, up_w.t())
        grad_sum1, grad_norm1_w, grad_norm1_b = _norm_backward(grad_middle, sum1, mean1, rstd1, norm1_w, norm1_b)
        grad_output = torch.mm(mixed.t(), grad_sum1)
        grad_mixed = _spread(torch.mm(grad_sum1, output_w.t()), ctx.queries, 1)[0]
        grad_q, grad_kv, grad_logits = _attention_backward(q, k, v, weights, grad_mixed)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad_logits.view(*ctx.queries.shape, -1).sum_to_size(ctx.bias_shape)
        grad_q_rows = _collect(grad_q, ctx.queries)
        grad_kv_rows = torch.cat([_collect(part, ctx.keys) for part in grad_kv], 1)
        grad_query = torch.mm(picked_x.t(), grad_q_rows)
        grad_key, grad_value = torch.mm(x.t(), grad_kv_rows).chunk(2, 1)
        grad_picked = torch.addmm(grad_sum1, grad_q_rows, query_w.t())
        if picked is None:
            grad_x = torch.addmm(grad_picked, grad_kv_rows, kv_w.t())
        else:
            grad_x = torch.mm(grad_kv_rows, kv_w.t()).index_add_(0, picked, grad_picked)
        return (
            grad_x, grad_bias, None, None, None, None, grad_query, grad_key, grad_value, grad_output, grad_norm1_w,
            grad_norm1_b, grad_up, grad_down, grad_norm2_w, grad_norm2_b,
        )  # fmt: skip


def _spread(rows: Tensor, rectangle: Rectangle, parts: int) -> tuple[Tensor, ...]:
    """rows [N, parts*d] -> for each part [B*H, X, h], zero at places that are not in use."""
    batch, heads, size = rectangle.shape
    head = rows.shape[1] // (parts * heads)
    # one row of zeros after the last
    padded = rows.new_zeros(parts, len(rows) + 1, heads, head)
    padded[:, :-1] = rows.view(len(rows), parts, heads, head).transpose(0, 1)
    return tuple(
        part.view(-1, head).index_select(0, rectangle.spread).view(batch * heads, size, head) for part in padded
    )


def _collect(x: Tensor, rectangle: Rectangle) -> Tensor:
    """[B*H, X, h] -> rows [N, d]."""
    return x.view(-1, x.shape[-1]).index_select(0, rectangle.collect).view(-1, rectangle.shape[1] * x.shape[-1])


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """q [B*H, A, h], k [B*H, T, h] -> softmax over scores and bias [B*H, A, T]."""
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
    logits.view(-1, num_heads, *logits.shape[1:]).add_(bias)
    return logits.softmax(-1)


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """grad [B*H, A, h] -> gradients of q, (k, v) and of the scores with their bias [B*H, A, T]."""
    grad_v = torch.bmm(weights.transpose(1, 2), grad)
    grad_logits = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
    scale = q.shape[-1] ** -0.5
    grad_q = torch.bmm(grad_logits, k).mul_(scale)
    grad_k = torch.bmm(grad_logits.transpose(1, 2), q).mul_(scale)
    return grad_q, (grad_k, grad_v), grad_logits


def _gated_backward(grad: Tensor, hidden: Tensor, active: Tensor) -> Tensor:
    """grad [Q, m/2] of value * gelu(gate) -> gradient of both [Q, m]."""
    value, gate = hidden.chunk(2, 1)
    result = torch.empty_like(hidden)
    half = value.shape[1]
    torch.mul(grad, active, out=result[:, :half])
    result[:, half:] = torch.ops.aten.gelu_backward(grad * value, gate)
    return result


def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[1:], mean, rstd, weight, bias, [True, True, True])
