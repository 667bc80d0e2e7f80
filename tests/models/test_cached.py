"""Passes that keep what they computed, against the plain ones."""

import pytest
import torch

from groundswell.protocols import Model
from models import cached
from models.decoder import Decoder

VARIANTS = {
    "plain": Decoder(num_layers=3, num_heads=2, width=16),
    "shared": Decoder(num_layers=2, num_heads=2, width=16, num_recurrences=2),
    "re_embed": Decoder(num_layers=2, num_heads=2, width=16, num_recurrences=2, re_embed=True),
    "rotary": Decoder(num_layers=2, num_heads=2, width=16, position_encoding="rotary", rotary_dim=4),
    "no positions": Decoder(num_layers=2, num_heads=4, width=16, position_encoding="null", tied_head=False),
    "no norm": Decoder(num_layers=2, num_heads=2, width=16, layer_norm=False, activation="relu"),
}
NUM_TOKENS = 23


def random_parameters(model: Decoder, length: int, num_runs: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(num_runs, *spec.shape, generator=generator, dtype=torch.float64) * 0.4
        for spec in model.parameters(NUM_TOKENS, length)
    }


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(NUM_TOKENS, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [5, 19])
@pytest.mark.parametrize("name", VARIANTS)
def test_forward_goes_through_the_states_of_the_plain_pass(name: str, length: int) -> None:
    model = VARIANTS[name]
    parameters, tokens = random_parameters(model, length, 2), random_tokens(2, 3, length)
    found = cached.forward(model, parameters, tokens)
    states = [*found.states[:-1], model.final_norm(parameters, found.states[-1])]
    torch.testing.assert_close(torch.stack(states, 1), model.hidden_states(parameters, tokens), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", [1, 3])
def test_tokens_after_a_past_are_those_of_the_whole(name: str, split: int) -> None:
    model = VARIANTS[name]
    parameters, tokens = random_parameters(model, 6, 1), random_tokens(1, 4, 6)
    whole = cached.forward(model, parameters, tokens)
    for layer in range(model.num_effective_layers):
        past, x = whole.key_values[layer][:, :, :split], whole.states[layer][:, :, split:]
        out, own, mixed = cached.extend(model, parameters, layer, x, past)
        torch.testing.assert_close(own, whole.key_values[layer][:, :, split:])
        torch.testing.assert_close(mixed, whole.mixed[layer][:, :, split:])
        after = model.before_block(parameters, layer + 1, out) if layer + 1 < model.num_effective_layers else out
        torch.testing.assert_close(after, whole.states[layer + 1][:, :, split:])
        last, _, _ = cached.extend(model, parameters, layer, x, past, num_queries=1)
        torch.testing.assert_close(last, out[:, :, -1:])


@pytest.mark.parametrize("name", VARIANTS)
def test_known_tokens_are_not_computed_again(name: str) -> None:
    model = VARIANTS[name]
    parameters, tokens = random_parameters(model, 6, 1), random_tokens(1, 4, 6)
    known, whole = cached.forward(model, parameters, tokens), tokens.clone()
    whole[:, :, 2:] = random_tokens(1, 4, 6)[:, :, :4]
    found, plain = cached.forward(model, parameters, whole, known, 2), cached.forward(model, parameters, whole)
    for mine, theirs in zip((found.states, found.key_values, found.mixed),
                            (plain.states, plain.key_values, plain.mixed), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_a_cache_finds_what_decoding_without_finds(name: str) -> None:
    model = VARIANTS[name]
    parameters, prompts = random_parameters(model, 9, 2), random_tokens(2, 40, 4)
    found = model.generate(parameters, prompts, 6)
    assert torch.equal(found, Model.generate(model, parameters, prompts, 6))
    assert found.shape == (2, 40, 6) and len(found.unique()) > 1
    assert torch.equal(model.generate(parameters, prompts, 1), found[:, :, :1])


def test_decoding_beyond_the_positions_is_refused() -> None:
    model = VARIANTS["plain"]
    parameters = random_parameters(model, 6, 1)
    assert model.generate(parameters, random_tokens(1, 2, 4), 3).shape == (1, 2, 3)
    with pytest.raises(ValueError, match="4 \\+ 4 tokens do not fit the 6 positions"):
        model.generate(parameters, random_tokens(1, 2, 4), 4)
