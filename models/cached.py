"""Forward passes that keep what they have computed: keys and values for decoding, every state for looking inside.

Works on the pieces of a `Decoder`. Shapes: K runs, B rows, T tokens, P tokens before them, d width, S effective layers.
Layer l = 0..S-1 is a block; state l is the residual stream before block l (after l blocks), state S comes out of the
last one, before the final LayerNorm. No gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundswell.protocols import Parameters
from models.attention import attention

if TYPE_CHECKING:
    from models.decoder import Decoder


@dataclass(frozen=True)
class Pass:
    """Everything a forward pass went through."""

    states: list[Tensor]  # S+1 of [K, B, T, d]
    key_values: list[Tensor]  # S of [K, B, T, 2d]
    mixed: list[Tensor]  # S of [K, B, T, d]: what the heads found, side by side, before their output matrix


def extend(
    model: Decoder, parameters: Parameters, layer: int, x: Tensor, past: Tensor | None, num_queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block `layer` on x [K, B, T, d], whose tokens follow those of `past` [K, B, P, 2d] (keys and values, or None).

    -> x after the block, keys and values of these tokens [K, B, T, 2d], and what the heads found. With `num_queries`
    only so many of the last tokens come out.
    """
    start = 0 if past is None else past.shape[2]
    query, own = model.query_key_value(parameters, layer, x, start)
    key_value = own if past is None else torch.cat([past, own], dim=2)
    if num_queries is not None:
        query, x = query[:, :, -num_queries:], x[:, :, -num_queries:]
    mixed = attention(query, key_value, None, model.num_heads)
    rows = x.reshape(mixed.shape) + _by_row(mixed, lambda rows: model.attention_branch(parameters, layer, rows))
    return rows + _by_row(rows, lambda rows: model.mlp_branch(parameters, layer, rows)), own, mixed


def _by_row(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of [(K,) N, d] to [K, B, T, d]."""
    return function(x.flatten(0, 2) if len(x) == 1 else x.flatten(1, 2)).view_as(x)


@torch.no_grad()
def forward(
    model: Decoder, parameters: Parameters, tokens: Tensor, known: Pass | None = None, num_known: int = 0
) -> Pass:
    """tokens [K, B, T] from position 0 on. The first `num_known` of them are those of the pass `known`: what it went
    through there is taken over instead of computed."""
    x = model.embed(parameters, tokens[:, :, num_known:], start=num_known)
    states, key_values, heads = [], [], []
    for layer in range(model.num_effective_layers):
        x = model.before_block(parameters, layer, x)
        states.append(x)
        past = known.key_values[layer][:, :, :num_known] if known else None
        x, own, mixed = extend(model, parameters, layer, x, past)
        key_values.append(own)
        heads.append(mixed)
    found = Pass([*states, x], key_values, heads)
    return _joined(known, found, num_known) if known and num_known else found


def _joined(known: Pass, found: Pass, num_known: int) -> Pass:
    pairs = ((known.states, found.states), (known.key_values, found.key_values), (known.mixed, found.mixed))
    return Pass(*([torch.cat([a[:, :, :num_known], b], dim=2) for a, b in zip(*pair, strict=True)] for pair in pairs))


@torch.no_grad()
def generate(
    model: Decoder, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
) -> Tensor:
    """As `Model.generate`; after the prompt each step computes one token. Raises ValueError where positions run out."""
    length = prompts.shape[-1]
    table = parameters.get("transformer.wpe.weight")
    if table is not None and length + num_tokens - 1 > table.shape[1]:
        raise ValueError(f"{length} + {num_tokens} tokens do not fit the {table.shape[1]} positions of the model")
    caches: list[Tensor | None] = [None] * model.num_effective_layers
    tokens, found = prompts, prompts.new_zeros(*prompts.shape[:2], num_tokens)
    ended = torch.zeros_like(prompts[:, :, :1], dtype=torch.bool)
    for number in range(num_tokens):
        x = model.embed(parameters, tokens, start=0 if caches[0] is None else caches[0].shape[2])
        for layer, past in enumerate(caches):
            x = model.before_block(parameters, layer, x)
            last = 1 if layer == len(caches) - 1 else None
            x, own, _ = extend(model, parameters, layer, x, past, last)
            caches[layer] = own if past is None else torch.cat([past, own], dim=2)
        tokens = model.unembed(parameters, model.final_norm(parameters, x)).argmax(-1).masked_fill(ended, 0)
        found[:, :, number] = tokens[:, :, 0]
        if stop_token is not None:
            ended = ended | (tokens == stop_token)
            if ended.all():
                break
    return found
