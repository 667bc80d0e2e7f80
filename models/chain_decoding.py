"""Decoding of rows whose prompts differ in length: with keys and values kept, up to a number of separators.

A chain of thought is written up to its separator, then the answer up to another: two. An answer alone ends with one.
Shapes: B rows, P tokens of the longest prompt, N new tokens, L layers, d width, V vocabulary. Parameters [1, *shape].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Model, Parameters
from models.attention import attention
from models.chain_states import overwrite
from models.chain_student import project
from models.decoder import WPE, WTE, Decoder
from models.layers import embed, rotate, take

GROWTH = 32  # positions by which the memory of keys and values grows, at least


class Prompts(NamedTuple):
    """Rows to go on from."""

    tokens: Tensor  # [B, P], right-padded with any token
    lengths: Tensor  # [B]
    gaps: Tensor | None = None  # [B] rows of a learned position table that are passed over behind the prompt


class Ending(NamedTuple):
    """A row ends with its `number`-th separator, or when it has `limit` new tokens (`number` None: then alone)."""

    separator: int
    number: int | None
    limit: Tensor  # [B], 1 or more

    @property
    def needed(self) -> int:
        """Separators; more than there can be where they end nothing."""
        return int(self.limit.max()) + 1 if self.number is None else self.number


class Decoded(NamedTuple):
    """New tokens of each row."""

    tokens: Tensor  # [B, N], the separator behind a row's end
    counts: Tensor  # [B] tokens before that, the closing separator included
    truncated: Tensor  # [B] bool: ended by the limit

    def rows(self) -> list[list[int]]:
        return [row[:count] for row, count in zip(self.tokens.tolist(), self.counts.tolist(), strict=True)]


class Stream:
    """A decoder that reads prompts and then one more token of each row at a time."""

    def __init__(
        self, decoder: Decoder, parameters: Parameters, prompts: Prompts, states: Tensor | None = None
    ) -> None:
        """`states` [B, L, d]: what the parameters' MLPs make of them replaces the state of a prompt's last token before
        each block; it lives on in the keys and values."""
        self.decoder, self.parameters, self._prompts, self._states = decoder, parameters, prompts, states
        self._places = prompts.lengths[None]  # [1, B] of the next token
        self._gaps = 0 if prompts.gaps is None else prompts.gaps[None, :, None]
        self._end = prompts.tokens.shape[1]  # no place is beyond
        self._kept: list[Tensor] = []  # keys and values of each layer [1, B, capacity, 2d]

    def start(self) -> Tensor:
        """Read the prompts -> logits of the next token [B, V]."""
        decoder, parameters = self.decoder, self.parameters
        last = self._places - 1
        x = decoder.embed(parameters, self._prompts.tokens[None])
        values = None if self._states is None else project(parameters, self._states[None])
        for layer in range(decoder.num_effective_layers):
            x = decoder.before_block(parameters, layer, x)
            if values is not None:
                x = overwrite(x, last, values[layer])
            query, key_value = decoder.query_key_value(parameters, layer, x)
            self._kept.append(key_value)
            at = None
            if layer == decoder.num_effective_layers - 1:
                at = last.unsqueeze(-1)
                x, query = take(x, at), take(query, at)
            x = self._rest_of_block(layer, x, attention(query, key_value, at, decoder.num_heads))
        return self._logits(x)

    def next(self, tokens: Tensor) -> Tensor:
        """One more token of each row [B] -> logits of the one after it [B, V]."""
        decoder, parameters = self.decoder, self.parameters
        at = self._places.unsqueeze(-1)  # [1, B, 1]
        self._end += 1
        x = self._embed(tokens[None, :, None], at)
        rows = torch.arange(at.shape[1], device=at.device)
        for layer in range(decoder.num_effective_layers):
            x = decoder.before_block(parameters, layer, x)
            query, own = self._query_key_value(layer, x, at)
            self._reserve(layer)
            self._kept[layer][0, rows, self._places[0]] = own[0, :, 0]
            key_value = self._kept[layer][:, :, : self._end]
            x = self._rest_of_block(layer, x, attention(query, key_value, at, decoder.num_heads))
        self._places = self._places + 1
        return self._logits(x)

    def select(self, rows: Tensor) -> None:
        """Go on from these rows [B'] instead."""
        self._places = self._places[:, rows]
        self._gaps = self._gaps if isinstance(self._gaps, int) else self._gaps[:, rows]
        self._kept = [kept[:, rows] for kept in self._kept]

    def _embed(self, tokens: Tensor, at: Tensor) -> Tensor:
        x = embed(self.parameters[WTE], tokens)
        table = self.parameters.get(WPE)
        # rows that have ended may be beyond the table
        return x if table is None else x + embed(table, (at + self._gaps).clamp(max=table.shape[1] - 1))

    def _query_key_value(self, layer: int, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Of one token of each row, at places [1, B, 1]."""
        query, key_value = self.decoder.query_key_value(self.parameters, layer, x)
        if self.decoder.position_encoding != "rotary":
            return query, key_value
        key, value = key_value.chunk(2, -1)  # at place 0 nothing has been turned yet
        turned = (rotate(y, at, self._end, self.decoder.num_heads, self.decoder.rotary_dim) for y in (query, key))
        query, key = turned
        return query, torch.cat([key, value], -1)

    def _reserve(self, layer: int) -> None:
        """Room for one more place. Zeros, not any memory: what is masked is still multiplied with 0."""
        kept = self._kept[layer]
        if self._end > kept.shape[2]:
            self._kept[layer] = F.pad(kept, (0, 0, 0, max(GROWTH, kept.shape[2])))

    def _rest_of_block(self, layer: int, x: Tensor, mixed: Tensor) -> Tensor:
        """What goes in [1, B, T, d] and what the heads found -> what comes out."""
        rows = x.flatten(0, 2) + self.decoder.attention_branch(self.parameters, layer, mixed.flatten(0, 2))
        return (rows + self.decoder.mlp_branch(self.parameters, layer, rows)).view_as(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self.decoder.unembed(self.parameters, self.decoder.final_norm(self.parameters, x))[0, :, 0]


def within_table(parameters: Parameters, prompts: Prompts, limit: Tensor) -> Tensor:
    """`limit` [B], lowered to what the model has positions for. Raises ConfigError for a prompt that is too long."""
    table = parameters.get(WPE)
    if table is None:
        return limit
    room = table.shape[1] - prompts.lengths - (0 if prompts.gaps is None else prompts.gaps) + 1
    if bool((room < 1).any()):
        raise ConfigError(
            f"a question of {int(prompts.lengths.max())} tokens is longer than the {table.shape[1]} positions of the "
            "model; train it with model.num_positions set to more"
        )
    return limit.minimum(room)


@torch.no_grad()
def decode_greedily(stream: Stream, ending: Ending) -> Decoded:
    """Each token is the lowest id of the best. A row does not depend on the others."""
    limit, needed = ending.limit, ending.needed
    longest = int(limit.max())
    found = torch.full((len(limit), longest), ending.separator, device=limit.device)
    counts, seen = torch.zeros_like(limit), torch.zeros_like(limit)
    going = limit > 0
    logits = stream.start()
    for number in range(longest):
        tokens = torch.where(going, logits.argmax(-1), ending.separator)
        found[:, number] = tokens
        counts = counts + going
        seen = seen + (going & (tokens == ending.separator))
        going = (seen < needed) & (number + 1 < limit)
        if not bool(going.any()):
            break
        logits = stream.next(tokens)
    return Decoded(found, counts, seen < needed)


@torch.no_grad()
def decode_anyhow(model: Model, parameters: Parameters, prompts: Prompts, ending: Ending) -> Decoded:
    """Greedy decoding by the model's own `generate`, in batches of rows of one length, once for each separator."""
    separator, device = ending.separator, prompts.tokens.device
    limits = ending.limit.tolist()
    new: list[list[int]] = [[] for _ in limits]
    old = [row[:length] for row, length in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)]
    for number in range(ending.number or 1):
        groups: dict[int, list[int]] = {}
        for row, (before, after) in enumerate(zip(old, new, strict=True)):
            if after.count(separator) >= number and len(after) < limits[row]:
                groups.setdefault(len(before) + len(after), []).append(row)
        for rows in groups.values():
            tokens = torch.tensor([old[row] + new[row] for row in rows], device=device)
            most = max(limits[row] - len(new[row]) for row in rows)
            stop = None if ending.number is None else separator
            found = model.generate(parameters, tokens[None], most, stop)[0].tolist()
            for row, line in zip(rows, found, strict=True):
                end = line.index(separator) + 1 if stop is not None and separator in line else len(line)
                new[row] += line[: min(end, limits[row] - len(new[row]))]
    counts = torch.tensor([len(row) for row in new], device=device)
    padded = [row + [separator] * (int(counts.max()) - len(row)) for row in new]
    cut = torch.tensor([row.count(separator) < ending.needed for row in new], device=device)
    return Decoded(torch.tensor(padded, device=device), counts, cut)
