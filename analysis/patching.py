"""Activation patching in batches: states of one run replaced by those of a counterfactual one, for all layers at once.

Two facts about causal decoders save most of the work. Positions before the replaced ones never change, so their keys
and values are those of the run itself. And where the replaced positions hold whole states, they go on exactly as in
the counterfactual run (whose earlier tokens are the same), so theirs are there already too. Only positions after them
are computed, from the patched layer on, for the patches of all layers so far as one batch.

Shapes: B examples, T positions, W of them computed, P before those, C patches, d width, H heads, S effective layers.
State l = 0..S is the residual stream after l blocks, as in `models.cached`. Parameters hold one run ([1, *shape]).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from groundswell.protocols import Parameters
from models.cached import Pass, extend
from models.decoder import Decoder

LENS_ELEMENTS = 2**25  # logits held at once: 128 MiB of float32


def continued(
    model: Decoder,
    parameters: Parameters,
    prefix: Sequence[Tensor],
    entering: Mapping[int, Tensor],
    last: int,
    last_position_only: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Run patched copies of a batch on, block by block.

    prefix[l] [B, P, 2d]: keys and values before the computed positions in block l. entering[l] [C, B, W, d]: states
    after l blocks of the copies patched there. Yields (l, states [C', B, W, d] after l blocks of all copies that have
    entered by then, in order) from the first patched layer to state `last`; that one can be had for the last position
    only ([C', B, 1, d]) where none enters there.
    """
    x: Tensor | None = None
    for layer in range(min(entering), last + 1):
        if x is not None:
            copies, batch, width, size = x.shape
            past = prefix[layer - 1].expand(copies, -1, -1, -1).flatten(0, 1).unsqueeze(0)
            queries = 1 if layer == last and last_position_only else None
            rows, _, _ = extend(model, parameters, layer - 1, x.reshape(1, -1, width, size), past, queries)
            if layer < model.num_effective_layers:
                rows = model.before_block(parameters, layer, rows)
            x = rows.view(copies, batch, -1, size)
        if layer in entering:
            x = entering[layer] if x is None else torch.cat([x, entering[layer]])
        assert x is not None
        yield layer, x


def joined_prefix(normal: Pass, other: Pass, start: int, stop: int) -> list[Tensor]:
    """Keys and values of each block, [B, stop, 2d]: the run's own before `start`, then the other run's."""
    pairs = zip(normal.key_values, other.key_values, strict=True)
    return [torch.cat([mine[0, :, :start], theirs[0, :, start:stop]], dim=1) for mine, theirs in pairs]


def head_patches(
    model: Decoder, parameters: Parameters, normal: Pass, other: Pass, layer: int, start: int, stop: int
) -> Tensor:
    """States after `layer` blocks of H copies, in each of which one head of the last of these blocks has found, at
    positions start..stop-1, what it finds in the other run: [H, B, T - start, d]."""
    mine, theirs = normal.mixed[layer - 1][0, :, start:stop], other.mixed[layer - 1][0, :, start:stop]
    head_width = mine.shape[-1] // model.num_heads
    own = torch.eye(model.num_heads, device=mine.device, dtype=mine.dtype).repeat_interleave(head_width, dim=1)
    middle = _middle(model, parameters, normal, layer, mine + (theirs - mine) * own[:, None, None, :], start)
    return _with_rest(model, parameters, normal, layer, middle + _mlp(model, parameters, layer, middle), stop)


def mlp_patches(
    model: Decoder, parameters: Parameters, normal: Pass, other: Pass, layer: int, start: int, stop: int
) -> Tensor:
    """As `head_patches`, for one copy in which the MLP adds what it adds in the other run: [1, B, T - start, d]."""
    mine, theirs = (
        _middle(model, parameters, run, layer, run.mixed[layer - 1][:, :, start:stop], start) for run in (normal, other)
    )
    return _with_rest(model, parameters, normal, layer, mine + _mlp(model, parameters, layer, theirs), stop)


def _middle(model: Decoder, parameters: Parameters, run: Pass, layer: int, mixed: Tensor, start: int) -> Tensor:
    """Residual stream between attention and MLP, where the heads found `mixed` [C, B, w, d] from `start` on."""
    before = run.states[layer - 1][0, :, start : start + mixed.shape[2]]
    return before + model.attention_branch(parameters, layer - 1, mixed.flatten(0, 2)).view_as(mixed)


def _mlp(model: Decoder, parameters: Parameters, layer: int, middle: Tensor) -> Tensor:
    return model.mlp_branch(parameters, layer - 1, middle.flatten(0, 2)).view_as(middle)


def _with_rest(model: Decoder, parameters: Parameters, normal: Pass, layer: int, patched: Tensor, stop: int) -> Tensor:
    """Patched states [C, B, w, d] as the next block sees them, and the run's own from `stop` on."""
    if layer < model.num_effective_layers:
        patched = model.before_block(parameters, layer, patched)
    rest = normal.states[layer][0, :, stop:].expand(len(patched), -1, -1, -1)
    return torch.cat([patched, rest], dim=2)


def read_tokens(model: Decoder, parameters: Parameters, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logit lens: what states [C, B, d] of the residual stream say, read by the final norm and the output matrix.

    -> rank of tokens[b] (how many score higher; ties go to the lower id, as in a stable sort), the best token: [C, B].
    """
    copies, batch, width = states.shape
    if not copies:
        return (tokens.new_zeros(0, batch),) * 2
    rows, wanted = states.reshape(-1, width), tokens.repeat(copies)
    size = max(1, LENS_ELEMENTS // model.token_embeddings(parameters).shape[1])
    found = [
        _ranks(model.unembed(parameters, model.final_norm(parameters, part.view(1, 1, -1, width)))[0, 0], ids)
        for part, ids in zip(rows.split(size), wanted.split(size), strict=True)
    ]
    ranks, best = (torch.cat(parts).view(copies, batch) for parts in zip(*found, strict=True))
    return ranks, best


def _ranks(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], tokens [N]."""
    own = logits.gather(1, tokens.unsqueeze(1))
    lower = torch.arange(logits.shape[1], device=logits.device) < tokens.unsqueeze(1)
    return ((logits > own) | ((logits == own) & lower)).sum(1), logits.argmax(1)
