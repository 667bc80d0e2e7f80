"""Greedy decoding of a recurrent decoder with a key-value cache for each recurrence and layer. No gradients.

Shapes: K runs, B rows, P prompt tokens, H heads, d width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from groundswell.protocols import Model, Parameters
from models.recurrent_layers import rows_of

if TYPE_CHECKING:
    from models.recurrent import RecurrentDecoder

PAD = 0  # what follows the stop token


class _Cache:
    """Keys and values [K*B, H, T, d / H] of each recurrence and layer, of the tokens so far."""

    def __init__(self, model: RecurrentDecoder, prompts: Tensor, length: int, like: Tensor) -> None:
        num_runs, batch, _ = prompts.shape
        shape = (2, num_runs, batch, model.num_heads, length, model.head_width)
        count = model.eval_recurrences * model.num_layers
        self.buffers = [like.new_empty(shape) for _ in range(count)]

    def put(self, index: int, start: int, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """key_value [K, B, T, 2d] of the tokens from `start` on -> keys and values of all so far [K*B, H, T, d / H]."""
        buffer, end = self.buffers[index], start + key_value.shape[2]
        heads = buffer.shape[3]
        buffer[..., start:end, :] = key_value.unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        keys, values = buffer[..., :end, :].flatten(1, 2)
        return keys, values

    def keep(self, rows: Tensor) -> None:
        self.buffers = [buffer.index_select(2, rows) for buffer in self.buffers]


@torch.no_grad()
def generate(
    model: RecurrentDecoder, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
) -> Tensor:
    """As `RecurrentDecoder.generate`. A row leaves the batch when it has ended in every run of the pack."""
    num_runs, batch, length = prompts.shape
    result = prompts.new_full((num_runs, batch, num_tokens), PAD)
    if num_tokens == 0 or batch == 0:
        return result
    total = length + num_tokens - 1
    biases = model.biases_of(parameters, total, prompts.device)
    cache = _Cache(model, prompts, total, parameters["embedding.token.weight"])
    rows = torch.arange(batch, device=prompts.device)
    ended = torch.zeros(num_runs, batch, dtype=torch.bool, device=prompts.device)
    tokens = prompts
    start = 0
    for step in range(num_tokens):
        best = _next(model, parameters, tokens, start, biases, cache)
        best = best.masked_fill(ended, PAD)
        result[:, rows, step] = best
        tokens, start = torch.cat([tokens, best.unsqueeze(-1)], -1), length + step
        if stop_token is not None:
            ended = ended | (best == stop_token)
            open_rows = (~ended.all(0)).nonzero().squeeze(1)
            if len(open_rows) == 0:
                break
            if len(open_rows) < len(rows):
                cache.keep(open_rows)
                rows, tokens, ended = rows[open_rows], tokens[:, open_rows], ended[:, open_rows]
    return result


def _next(
    model: RecurrentDecoder,
    parameters: Parameters,
    tokens: Tensor,
    start: int,
    biases: list[Tensor | None],
    cache: _Cache,
) -> Tensor:
    """tokens [K, B, T], of which those before `start` are in the cache -> the best next token [K, B]."""
    injected = model.embed(parameters, tokens, start=start)
    state = model.first_state(injected, None, start)
    count, index = model.eval_recurrences * model.num_layers, 0
    for _ in range(model.eval_recurrences):
        if not model.inject_every_layer:
            state = model.inject(parameters, "", state, injected)
        for layer, bias in enumerate(biases):
            last = index == count - 1
            state = _layer(model, parameters, layer, state, injected, start, bias, cache, index, last)
            index += 1
    return model.unembed(parameters, state[:, :, -1:]).argmax(-1).squeeze(-1)


def _layer(
    model: RecurrentDecoder,
    parameters: Parameters,
    layer: int,
    x: Tensor,
    injected: Tensor,
    start: int,
    bias: Tensor | None,
    cache: _Cache,
    index: int,
    last: bool,
) -> Tensor:
    """State [K, B, T, d] of the tokens from `start` on through a layer; of the last one, only the last token."""
    if model.inject_every_layer:
        x = model.inject(parameters, f"layers.{layer}.", x, injected)
    query, key_value = model.query_key_value(parameters, layer, x, start=start)
    keys, values = cache.put(index, start, key_value)
    if last:
        query, x = query[:, :, -1:], x[:, :, -1:]
    mixed = _attend(model.num_heads, query, keys, values, bias)
    rows = rows_of(x.reshape(mixed.shape))
    return model.after_attention(parameters, layer, rows, rows_of(mixed)).view_as(mixed)


def _attend(num_heads: int, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """query [K, B, A, d] of the last A tokens -> what the heads found [K, B, A, d]."""
    num_runs, batch, num_queries, _ = query.shape
    length = keys.shape[2]
    q = query.reshape(num_runs * batch, num_queries, num_heads, -1).transpose(1, 2)
    mask = None
    if bias is not None:
        mask = bias[:, :, length - num_queries : length, :length]
    if num_queries > 1:
        later = torch.ones(num_queries, length, dtype=torch.bool, device=query.device).triu(1 + length - num_queries)
        base = mask if mask is not None else query.new_zeros(1, 1, 1, 1)
        mask = base.masked_fill(later, float("-inf"))
    if mask is not None and num_runs > 1 and len(mask) == num_runs:
        mask = mask.repeat_interleave(batch, 0)
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return mixed.transpose(1, 2).reshape(query.shape)


@torch.no_grad()
def generate_by_length(
    model: Model, parameters: Parameters, prompts: Tensor, lengths: Tensor, num_tokens: int, stop_token: int
) -> Tensor:
    """Greedy decoding of prompts [K, B, P] of which the first `lengths` [B] tokens count -> [K, B, num_tokens].

    Prompts of one length go together, for any model.
    """
    result = prompts.new_full((*prompts.shape[:2], num_tokens), PAD)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        result[:, rows] = model.generate(parameters, prompts[:, rows, :length], num_tokens, stop_token)
    return result
