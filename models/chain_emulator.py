"""The thought emulator: it predicts the teacher's states from the question alone (Deng et al. 2023, arXiv 2311.01460,
section 3.2).

Shapes: K runs, B rows, T tokens, L layers, d width, C mixture components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Parameters, ParameterSpec
from models.chain_model import TaughtModel, linear_specs, mlp_specs
from models.chain_states import dense, mlp, overwrite
from models.decoder import Decoder
from models.layers import embed, take

MIXTURE = "mixture_components.weight"


def _check_mixture(size: int | str) -> int | str:
    if isinstance(size, int) and size < 1:
        raise ValueError(f"mixture_size {size} is less than 1; use 1, 2, ... components, or vocabulary")
    return size


MixtureSize = Annotated[int | Literal["vocabulary"], AfterValidator(_check_mixture)]


def emulator_specs(
    decoder: Decoder, vocab_size: int, max_length: int, mixture_size: MixtureSize
) -> list[ParameterSpec]:
    """Of the decoder and of what predicts and carries states. What no state depends on, as the last block, keeps its
    initial values."""
    width, num_layers = decoder.width, decoder.num_layers
    std = 1 / math.sqrt(3 * width)  # torch.nn.LSTM's variance
    specs = decoder.parameters(vocab_size, max_length)
    for layer in range(num_layers):
        specs += mlp_specs(f"mlps.{layer}", 2 * width, width)
    components = vocab_size if mixture_size == "vocabulary" else mixture_size
    specs.append(ParameterSpec(MIXTURE, (components, width), True, 1.0))  # torch.nn.Embedding's deviation
    specs += [ParameterSpec(f"rnn.weight_{part}_l0", (4 * width, width), True, std) for part in ("ih", "hh")]
    specs += [ParameterSpec(f"rnn.bias_{part}_l0", (4 * width,), False, std) for part in ("ih", "hh")]
    specs += linear_specs("key_proj", width, width) + linear_specs("query_proj", width, width)
    specs += linear_specs("out_proj", 2 * width, width)
    unused = [f"transformer.h.{num_layers - 1}.", "transformer.ln_f.", "lm_head."]
    if num_layers < 3:  # the first context is needed at the third layer
        unused += ["key_proj.", "query_proj."]
    if num_layers < 2:
        unused += ["rnn.", "out_proj.", "transformer.h."]
    return [replace(spec, trained=spec.trained and not spec.name.startswith(tuple(unused))) for spec in specs]


class Emulated(NamedTuple):
    states: Tensor  # [K, B, L, d]
    scores: Tensor | None  # [K, B, L, C] of the components, before the temperature; None where there is one


class _Memory:
    """What layers know of those below: an LSTM over the predicted states, and attention over its outputs' keys, which
    serve as values too. A key is seen from the next layer on."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.hidden: Tensor | None = None
        self.cell: Tensor | None = None
        self.context: Tensor | None = None
        self.keys: list[Tensor] = []

    def next(self, state: Tensor) -> Tensor:
        """Predicted state of a layer [K, B, d] -> what replaces the separator's state there [K, B, d]."""
        output = self._lstm(state if self.context is None else state + self.context)
        if self.keys:
            query = dense(self.parameters, "query_proj.weight", "query_proj.bias", output)
            keys = torch.stack(self.keys, 2)  # [K, B, l, d]
            weights = torch.einsum("kbld,kbd->kbl", keys, query).softmax(-1)
            self.context = torch.einsum("kbld,kbl->kbd", keys, weights)
        self.keys.append(dense(self.parameters, "key_proj.weight", "key_proj.bias", output))
        context = torch.zeros_like(output) if self.context is None else self.context
        return dense(self.parameters, "out_proj.weight", "out_proj.bias", torch.cat([output, context], -1))

    def _lstm(self, x: Tensor) -> Tensor:
        gates = dense(self.parameters, "rnn.weight_ih_l0", "rnn.bias_ih_l0", x)
        hidden = torch.zeros_like(x) if self.hidden is None else self.hidden
        gates = gates + dense(self.parameters, "rnn.weight_hh_l0", "rnn.bias_hh_l0", hidden)
        enter, forget, new, leave = gates.chunk(4, -1)
        added = enter.sigmoid() * new.tanh()
        self.cell = added if self.cell is None else forget.sigmoid() * self.cell + added
        self.hidden = leave.sigmoid() * self.cell.tanh()
        return self.hidden


def emulate(
    decoder: Decoder,
    parameters: Parameters,
    tokens: Tensor,
    places: Tensor,
    temperature: float,
    components: Tensor | None = None,
) -> Emulated:
    """tokens [K, B, T] that begin with the question, places [K, B] of the separator after it -> predicted states.

    `components` [K, B, L]: which mixture component each state has, where that is known; else the softmax of their
    scores over `temperature` mixes them. Tokens after the separators are not computed, nor is what no state depends on.
    """
    last = decoder.num_layers - 1
    at, table = places.unsqueeze(-1), parameters[MIXTURE]
    x = decoder.embed(parameters, tokens[:, :, : int(places.max()) + 1])
    memory, states, scores = _Memory(parameters), [], []
    for layer in range(last + 1):
        own = (take(x, at) if layer < last or last == 0 else x).squeeze(2)
        if table.shape[1] > 1:
            scores.append(torch.matmul(own, table.mT))
        if table.shape[1] == 1:
            component = table.expand_as(own)
        elif components is not None:
            component = embed(table, components[..., layer : layer + 1]).squeeze(2)
        else:
            component = torch.matmul((scores[-1] / temperature).softmax(-1), table)
        states.append(mlp(parameters, f"mlps.{layer}", torch.cat([own, component], -1)))
        if layer < last:
            x = overwrite(x, places, memory.next(states[-1]))
            x = decoder.block(parameters, layer, x, at if layer == last - 1 else None)
    return Emulated(torch.stack(states, 2), torch.stack(scores, 2) if scores else None)


class ThoughtEmulator(TaughtModel):
    """A decoder on the question. Before each block an MLP of its state at the separator and of a mixture component
    predicts the teacher's state of that layer; LSTM and attention over the predictions replace the state. Train it with
    StateRegression, on rows of form hidden."""

    mixture_size: MixtureSize = Field(1, description="mixture components; vocabulary: one for each token")
    softmax_temperature: float = Field(0.05, gt=0, description="of the softmax that mixes the components")

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        return emulator_specs(self.decoder, vocab_size, max_length, self.mixture_size)

    def emulate(
        self, parameters: Parameters, tokens: Tensor, places: Tensor, components: Tensor | None = None
    ) -> Emulated:
        """As the function: tokens [K, B, T], places of the separators [K, B], components [K, B, L] or None."""
        return emulate(self.decoder, parameters, tokens, places, self.softmax_temperature, components)

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        raise ConfigError("model: an emulator predicts states, no tokens; train it with objective StateRegression")
