"""A recurrent decoder as a torch module whose layers can be sharded and recomputed. It computes with the decoder's own
functions. What layers share (FIRE's numbers, an injection before the block) belongs to the whole.

Shapes: B batch rows, T tokens, A answer positions, V vocabulary, d width. Inside, tensors keep a run axis of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from groundswell.protocols import Parameters, ParameterSpec
from models.decoder_network import place

if TYPE_CHECKING:
    from models.recurrent import Recurrences, RecurrentDecoder


class RecurrentNetwork(nn.Module):
    """Parameters on the meta device under the names of `RecurrentDecoder.parameters`."""

    blocks: Sequence[nn.Module]

    def __init__(self, model: RecurrentDecoder, specs: Sequence[ParameterSpec]) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(RecurrentLayer(model, layer) for layer in range(model.num_layers))
        self.blocks = list(self.layers)
        self._own = [spec.name for spec in specs if not spec.name.startswith("layers.")]
        for spec in specs:
            place(self, spec)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        generator: torch.Generator | None = None,
        *,
        recurrences: Recurrences | None = None,
    ) -> Tensor:
        """tokens [B, T], positions [B, A] -> logits [B, A, V]; `recurrences` as in `RecurrentDecoder.answer_logits`."""
        parameters: Parameters = {name: self.get_parameter(name).unsqueeze(0) for name in self._own}
        generators = None if generator is None else [generator]

        def run(layer: int, x: Tensor, injected: Tensor, bias: Tensor | None, answers: Tensor | None) -> Tensor:
            return self.layers[layer](x, injected, bias, answers)

        return self.model.forward(
            parameters, tokens.unsqueeze(0), positions.unsqueeze(0), generators, recurrences, run
        ).squeeze(0)


class RecurrentLayer(nn.Module):
    """One physical layer."""

    def __init__(self, model: RecurrentDecoder, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(
        self, x: Tensor, injected: Tensor, bias: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """State [1, B, T, d] through the layer; with `positions` [1, B, A] only those tokens come out."""
        prefix = f"layers.{self.layer}."
        parameters: Parameters = {f"{prefix}{name}": p.unsqueeze(0) for name, p in self.named_parameters()}
        return self.model.layer(parameters, self.layer, x, injected, bias, positions)
