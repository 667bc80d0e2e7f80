"""A decoder as a torch module whose blocks can be sharded and recomputed. It computes with the decoder's own functions.

Shapes: B batch rows, T tokens, A answer positions, V vocabulary, d width. Inside, tensors keep a run axis of 1.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from groundswell.protocols import Parameters, ParameterSpec

if TYPE_CHECKING:
    from models.decoder import Decoder

BLOCK_PREFIX = "transformer.h."
# FSDP2 warns that changing a view in place would lose its hooks; nothing here changes a block's output in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class DecoderNetwork(nn.Module):
    """Parameters on the meta device under the names of `Decoder.parameters`."""

    blocks: Sequence[nn.Module]

    def __init__(self, decoder: Decoder, specs: Sequence[ParameterSpec]) -> None:
        super().__init__()
        self.decoder = decoder
        blocks = nn.ModuleList(DecoderBlock(decoder, layer) for layer in range(decoder.num_layers))
        self.transformer = nn.Module()
        self.transformer.h = blocks
        self.blocks = list(blocks)
        self._own = [spec.name for spec in specs if not spec.name.startswith(BLOCK_PREFIX)]
        for spec in specs:
            place(self, spec)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        generator: torch.Generator | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T], positions [B, A] -> logits [B, A, V]. The last block and the head see answers only.
        `places` [1, B, T] as for `Decoder.embed`."""
        decoder = self.decoder
        parameters = {name: self.get_parameter(name).unsqueeze(0) for name in self._own}
        generators = None if generator is None else [generator]
        x = decoder.embed(parameters, tokens.unsqueeze(0), generators, places=places)
        blocks = cast(nn.ModuleList, self.transformer.h)
        last = decoder.num_effective_layers - 1
        for layer in range(last + 1):
            x = decoder.before_block(parameters, layer, x)
            state = None if generator is None else generator.get_state()
            x = blocks[layer % decoder.num_layers](x, layer, positions if layer == last else None, generator, state)
        return decoder.unembed(parameters, decoder.final_norm(parameters, x)).squeeze(0)


class DecoderBlock(nn.Module):
    """One physical layer."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        super().__init__()
        self.decoder, self.prefix = decoder, f"{BLOCK_PREFIX}{layer}."

    def forward(
        self,
        x: Tensor,
        layer: int,
        positions: Tensor | None = None,
        generator: torch.Generator | None = None,
        state: Tensor | None = None,
    ) -> Tensor:
        """Residual stream [1, B, T, d] through effective layer `layer`; with `positions` [B, A] only those come out.

        `state`: the generator's when the block first ran, so that recomputing it draws the same dropout.
        """
        parameters: Parameters = {f"{self.prefix}{name}": p.unsqueeze(0) for name, p in self.named_parameters()}
        queries = None if positions is None else positions.unsqueeze(0)
        if generator is None or state is None:
            return self.decoder.block(parameters, layer, x, queries)
        with _drawing_from(generator, state):
            return self.decoder.block(parameters, layer, x, queries, [generator])


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator, state: Tensor) -> Iterator[None]:
    """The first time this is where the generator is anyway. A recomputation goes back, and leaves no trace."""
    now = generator.get_state()
    recomputed = not torch.equal(now, state)
    generator.set_state(state)
    try:
        yield
    finally:  # checkpointing leaves a recomputation by an exception once it has what it needs
        if recomputed:
            generator.set_state(now)


def place(root: nn.Module, spec: ParameterSpec) -> None:
    *path, last = spec.name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, nn.Parameter(torch.empty(spec.shape, device="meta"), requires_grad=spec.trained))
