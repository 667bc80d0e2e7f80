"""Train steps of student and emulator of an implicit chain of thought, straightforwardly formulated, for comparison.

transformers' GPT-2 as it is; hooks before each block clone the hidden states and overwrite the separator's; the teacher
runs whole at every step and gives all its hidden states; logits at every position. Parameters are named as ours are.
Shapes: B rows, T tokens, L layers, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from models.decoder import Decoder


def gpt2(decoder: Decoder, vocab_size: int) -> GPT2LMHeadModel:
    """In evaluation mode: no dropout."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=decoder.num_positions,
        n_embd=decoder.width,
        n_layer=decoder.num_layers,
        n_head=decoder.num_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def mlps(num_layers: int, num_inputs: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(num_inputs, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        for _ in range(num_layers)
    )


class Hooked(nn.Module):
    """A GPT-2 with something done to the separator's state before each block."""

    def __init__(self, decoder: Decoder, vocab_size: int, num_inputs: int) -> None:
        super().__init__()
        network = gpt2(decoder, vocab_size)
        self.transformer, self.lm_head = network.transformer, network.lm_head
        self.mlps = mlps(decoder.num_layers, num_inputs, decoder.width)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Ours [*shape], by name."""
        self.load_state_dict(dict(tensors) | {"lm_head.weight": tensors["transformer.wte.weight"]})

    def run(self, tokens: Tensor, places: Tensor, replaced: Callable[[int, Tensor], Tensor]) -> Tensor:
        """tokens [B, T], places [B]; `replaced`: layer, state [B, d] -> what stands there instead. -> [B, T, d]."""
        rows = torch.arange(len(tokens))

        def before(layer: int) -> Callable[[Any, Any, Any], Any]:
            def hook(_: Any, inputs: tuple[Tensor, ...], options: Any) -> Any:
                hidden = inputs[0].clone()
                hidden[rows, places] = replaced(layer, inputs[0][rows, places])
                return (hidden, *inputs[1:]), options

            return hook

        handles = [
            block.register_forward_pre_hook(before(layer), with_kwargs=True)
            for layer, block in enumerate(self.transformer.h)
        ]
        try:
            return self.transformer(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()


class HookedStudent(Hooked):
    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        super().__init__(decoder, vocab_size, decoder.width)

    def forward(self, tokens: Tensor, labels: Tensor, places: Tensor, states: Tensor) -> Tensor:
        """Rows without a chain [B, T], labels [B, T] (-100: none), states [B, L, d] -> loss []."""
        hidden = self.run(tokens, places, lambda layer, _: self.mlps[layer](states[:, layer]))
        logits = self.lm_head(hidden)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class HookedEmulator(Hooked):
    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        width = decoder.width
        super().__init__(decoder, vocab_size, 2 * width)
        self.mixture_components = nn.Embedding(1, width)
        self.rnn = nn.LSTM(width, width)
        self.key_proj, self.query_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.out_proj = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, places: Tensor, states: Tensor) -> Tensor:
        """Questions [B, T], states of the teacher [B, L, d] -> loss []."""
        predicted: list[Tensor] = []
        keys: list[Tensor] = []
        context = torch.zeros_like(states[:, 0])
        memory: tuple[Tensor, Tensor] | None = None

        def replaced(layer: int, state: Tensor) -> Tensor:
            nonlocal context, memory
            component = self.mixture_components.weight.expand_as(state)
            predicted.append(self.mlps[layer](torch.cat([state, component], -1)))
            output, memory = self.rnn((predicted[-1] + context).unsqueeze(0), memory)
            output = output.squeeze(0)
            if keys:
                past = torch.stack(keys, 1)
                weights = (past @ self.query_proj(output).unsqueeze(-1)).squeeze(-1).softmax(-1)
                context = (weights.unsqueeze(1) @ past).squeeze(1)
            keys.append(self.key_proj(output))
            return self.out_proj(torch.cat([output, context], -1))

        self.run(tokens, places, replaced)
        return (torch.stack(predicted, 1) - states).square().sum((1, 2)).mean() / 2


@torch.no_grad()
def teacher_states(teacher: GPT2LMHeadModel, tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """tokens [B, T] of question and chain, separators' places [B] -> states on the diagonal [B, L, d]."""
    hidden = teacher(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    step = (second - first).float() / (len(hidden) - 1)
    rows, states = torch.arange(len(tokens)), []
    for layer, state in enumerate(hidden):
        places = torch.round(first + step * layer).long().minimum(second)
        states.append(F.layer_norm(state[rows, places], state.shape[-1:]))
    return torch.stack(states, 1)
