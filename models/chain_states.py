"""Which states of a teacher stand for its chain of thought, and how they are read and overwritten (implicit chain of
thought by distillation, Deng et al. 2023, arXiv 2311.01460, section 3).

A row is question, separator, chain, separator, answer, with separators at places f and s. State l is the residual
stream before block l. Shapes: K runs, B rows, T tokens, A answer positions, L layers, d width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Parameters
from models.decoder import Decoder
from models.layers import LAYER_NORM_EPS, take

Delta = int | Literal["dynamic"]
Subset = Literal["diagonal", "first_column", "last_column", "top_row", "bottom_row"]


class Separators(NamedTuple):
    """Places in each row [K, B]."""

    first: Tensor
    second: Tensor


def find_separators(tokens: Tensor, positions: Tensor) -> Separators:
    """tokens [K, B, T] of question, chain and answer, positions [K, B, A] from the second separator on.

    Raises ConfigError where a row has no separator before that.
    """
    second = positions[..., 0]
    first = (tokens == tokens.gather(-1, positions[..., :1])).int().argmax(-1)  # the first of equals
    if not torch.equal(first < second, torch.ones_like(first, dtype=torch.bool)):
        row = int((first >= second).nonzero()[0, -1])
        raise ConfigError(
            f"row {row} of a batch has no second separator: question, separator, chain, separator and answer are "
            "expected; set task.form=hidden"
        )
    return Separators(first, second)


def check_delta(delta: Delta, num_layers: int, subset: Subset = "diagonal") -> None:
    """Raises ValueError, which names the field, where there are no such positions."""
    if isinstance(delta, int) and delta < 0:
        raise ValueError(f"delta {delta} is negative; use 0, 1, ... tokens a layer, or dynamic")
    if delta == "dynamic" and num_layers < 2 and not subset.endswith("column"):
        raise ValueError("delta dynamic needs two layers or more; set decoder.num_layers, or delta to a number")


def state_positions(
    first: Tensor,
    second: Tensor,
    num_layers: int,
    delta: Delta = "dynamic",
    subset: Subset = "diagonal",
    per_row: bool = True,
) -> Tensor:
    """Separators' places [..., B] -> the place that state l is read at [..., B, L].

    Diagonal and rows of the grid of layers and places: min(f + l delta, s); dynamic: delta = (s - f) / (L - 1),
    rounded half to even. Columns: f or s for all layers. `per_row` False: the dynamic delta of a batch's first row
    serves all its rows, as in the published code. Raises ConfigError for a delta that gives no places.
    """
    try:
        check_delta(delta, num_layers, subset)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    if subset.endswith("column"):
        column = first if subset == "first_column" else second
        return column.unsqueeze(-1).expand(*column.shape, num_layers)
    layers = torch.arange(num_layers, device=first.device)
    if delta == "dynamic":
        step = (second - first).float() / (num_layers - 1)
        if not per_row:
            step = step[..., :1]
        places = torch.round(first.unsqueeze(-1) + step.unsqueeze(-1) * layers).long()
    else:
        places = first.unsqueeze(-1) + delta * layers
    return torch.minimum(places, second.unsqueeze(-1))


def columns_by_depth(num_layers: int, subset: Subset) -> list[slice]:
    """Entry l: which of the L states are read before block l. Shorter than L where the deeper ones are not needed."""
    if subset == "top_row":
        return [slice(0, 0)] * (num_layers - 1) + [slice(0, num_layers)]
    if subset == "bottom_row":
        return [slice(0, num_layers)]
    return [slice(layer, layer + 1) for layer in range(num_layers)]


def extract_states(
    decoder: Decoder, parameters: Parameters, tokens: Tensor, places: Tensor, subset: Subset = "diagonal"
) -> Tensor:
    """tokens [K, B, T], places [K, B, L] -> states [K, B, L, d], each normalised without gain and bias.

    Tokens after the last place are not computed, and of the last block that is needed only the states that are read.
    """
    columns = columns_by_depth(places.shape[-1], subset)
    x = decoder.embed(parameters, tokens[:, :, : int(places.max()) + 1])
    found = []
    for depth, own in enumerate(columns[:-1]):
        if own.stop > own.start:
            found.append(take(x, places[..., own]))
        deepest = depth == len(columns) - 2
        x = decoder.block(parameters, depth, x, places[..., columns[-1]].contiguous() if deepest else None)
    found.append(x if len(columns) > 1 else take(x, places[..., columns[-1]]))
    return F.layer_norm(torch.cat(found, 2), x.shape[-1:], eps=LAYER_NORM_EPS)


def without_chain(tokens: Tensor, positions: Tensor, separators: Separators) -> tuple[Tensor, Tensor]:
    """Question, chain and answer [K, B, T] with positions [K, B, A] from the second separator on -> the same rows
    without places f+1..s, up to the last position of all, and the positions there."""
    first, gap = separators.first.unsqueeze(-1), (separators.second - separators.first).unsqueeze(-1)
    moved = torch.where(positions >= separators.second.unsqueeze(-1), positions - gap, positions.minimum(first))
    index = torch.arange(int(moved.max()) + 1, device=tokens.device)
    index = index + gap * (index > first)
    return tokens.gather(-1, index.clamp(max=tokens.shape[-1] - 1)), moved


def overwrite(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A copy of x [K, B, T, d] with values [K, B, d] at one place [K, B] of each row."""
    num_runs, batch, length, width = x.shape
    start = torch.arange(0, num_runs * batch * length, length, device=x.device).view(num_runs, batch)
    rows = x.reshape(-1, width)
    return rows.index_copy(0, (places + start).flatten(), values.reshape(-1, width).to(x.dtype)).view_as(x)


def dense(parameters: Parameters, weight: str, bias: str, x: Tensor) -> Tensor:
    """x [K, B, i] through a weight [K, o, i] and a bias [K, o], laid out as torch.nn.Linear has them -> [K, B, o]."""
    if len(x) == 1:
        return F.linear(x, parameters[weight].squeeze(0), parameters[bias].squeeze(0))
    return torch.baddbmm(parameters[bias].unsqueeze(1), x, parameters[weight].mT)


def mlp(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """Linear, ReLU, Linear: [K, B, i] -> [K, B, d]."""
    hidden = dense(parameters, f"{name}.0.weight", f"{name}.0.bias", x).relu()
    return dense(parameters, f"{name}.2.weight", f"{name}.2.bias", hidden)
