"""The mind-reading student: it answers from the question and the states of a teacher that has read the chain of thought
(Deng et al. 2023, arXiv 2311.01460, section 3.1).

Shapes: K runs, B rows, T tokens, A answer positions, L layers, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Parameters, ParameterSpec
from models.cached import extend
from models.chain_model import TaughtModel, mlp_specs
from models.chain_states import mlp, overwrite, without_chain
from models.decoder import WPE, Decoder


def student_specs(decoder: Decoder, vocab_size: int, max_length: int) -> list[ParameterSpec]:
    """Of the decoder, and of the MLP that each layer's state goes through."""
    specs = decoder.parameters(vocab_size, max_length)
    for layer in range(decoder.num_layers):
        specs += mlp_specs(f"mlps.{layer}", decoder.width, decoder.width)
    return specs


def project(parameters: Parameters, states: Tensor) -> list[Tensor]:
    """States [K, B, L, d] -> what stands before each block at the separator, L of [K, B, d]."""
    states = states.to(parameters["mlps.0.0.weight"].dtype)
    return [mlp(parameters, f"mlps.{layer}", state) for layer, state in enumerate(states.unbind(2))]


def answer_logits(
    decoder: Decoder, parameters: Parameters, tokens: Tensor, positions: Tensor, states: Tensor
) -> Tensor:
    """tokens [K, B, T] of question and answer, positions [K, B, A] from the separator on, states [K, B, L, d]
    -> logits [K, B, A, V]. Tokens after the last position may be there; they change nothing."""
    x = decoder.embed(parameters, tokens)
    values = project(parameters, states)
    for layer, value in enumerate(values):
        x = overwrite(x, positions[..., 0], value)
        x = decoder.block(parameters, layer, x, positions if layer == len(values) - 1 else None)
    return decoder.unembed(parameters, decoder.final_norm(parameters, x))


@torch.no_grad()
def generate(
    decoder: Decoder,
    parameters: Parameters,
    prompts: Tensor,
    states: Tensor,
    num_tokens: int,
    stop_token: int | None = None,
) -> Tensor:
    """Greedy decoding: prompts [K, B, P] that end with the separator, states [K, B, L, d] -> [K, B, num_tokens]. The
    state at the separator is overwritten once; it lives on in the keys and values. Where `stop_token` is given, a row
    ends with it and is filled with 0. Raises ValueError where positions run out."""
    length, table = prompts.shape[-1], parameters.get(WPE)
    if table is not None and length + num_tokens - 1 > table.shape[1]:
        raise ValueError(f"{length} + {num_tokens} tokens do not fit the {table.shape[1]} positions of the model")
    values, last = project(parameters, states), torch.full_like(prompts[..., 0], length - 1)
    caches: list[Tensor] = []
    tokens, found = prompts, prompts.new_zeros(*prompts.shape[:2], num_tokens)
    ended = torch.zeros_like(prompts[:, :, :1], dtype=torch.bool)
    for number in range(num_tokens):
        x = decoder.embed(parameters, tokens, start=caches[0].shape[2] if caches else 0)
        for layer, value in enumerate(values):
            past = caches[layer] if number else None
            x = x if number else overwrite(x, last, value)
            x, own, _ = extend(decoder, parameters, layer, x, past, 1 if layer == len(values) - 1 else None)
            if past is None:
                caches.append(own)
            else:
                caches[layer] = torch.cat([past, own], dim=2)
        tokens = decoder.unembed(parameters, decoder.final_norm(parameters, x)).argmax(-1).masked_fill(ended, 0)
        found[:, :, number] = tokens[:, :, 0]
        if stop_token is not None:
            ended = ended | (tokens == stop_token)
            if ended.all():
                break
    return found


class MindReadingStudent(TaughtModel):
    """A decoder on question and answer. Before each block its state at the separator is replaced by that layer's MLP of
    the teacher's state. Rows are of form hidden: the teacher reads them whole, the student without the chain."""

    def parameters(self, vocab_size: int, max_length: int) -> list[ParameterSpec]:
        return student_specs(self.decoder, vocab_size, max_length)

    def answer_logits(
        self,
        parameters: Parameters,
        tokens: Tensor,
        positions: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """tokens [K, B, T] with the chain, positions [K, B, A] from the second separator on -> logits [K, B, A, V]."""
        taught = self.taught(tokens, positions)
        return answer_logits(
            self.decoder, parameters, *without_chain(tokens, positions, taught.separators), taught.states
        )

    def generate(
        self, parameters: Parameters, prompts: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        raise ConfigError(
            "model: a mind-reading student answers from a teacher's states; use generate_with_states, or couple it "
            "with an emulator"
        )

    def generate_with_states(
        self, parameters: Parameters, prompts: Tensor, states: Tensor, num_tokens: int, stop_token: int | None = None
    ) -> Tensor:
        """prompts [K, B, P] that end with the separator, states [K, B, L, d] -> the next tokens [K, B, num_tokens]."""
        return generate(self.decoder, parameters, prompts, states, num_tokens, stop_token)
