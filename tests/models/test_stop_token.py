"""Greedy decoding that stops: rows end with the token and are filled with 0."""

import pytest
import torch

from groundswell.protocols import Model
from groundswell.training.flat import FlatParameters, initial_row
from models.decoder import Decoder

MODEL = Decoder(num_layers=2, num_heads=2, width=16, init_scale=5.0)
TOKENS = 9


@pytest.fixture(scope="module")
def parameters():
    specs = MODEL.parameters(11, 16)
    rows = [initial_row(specs, torch.Generator().manual_seed(seed)) for seed in range(2)]
    return FlatParameters(specs, torch.stack(rows)).views


@pytest.mark.parametrize("simple", [True, False], ids=["again", "cached"])
def test_rows_end_with_the_stop_token(parameters, simple):
    def generate(*arguments):
        return Model.generate(MODEL, parameters, *arguments) if simple else MODEL.generate(parameters, *arguments)

    prompts = torch.randint(11, (2, 12, 4), generator=torch.Generator().manual_seed(3))
    free = generate(prompts, TOKENS)
    assert torch.equal(free, Model.generate(MODEL, parameters, prompts, TOKENS))
    stop = int(free[free > 0].mode().values)
    expected = free.clone()
    after = (free == stop).cumsum(-1) - (free == stop).long() > 0
    expected[after] = 0
    assert after.any() and not after.all()
    assert torch.equal(generate(prompts, TOKENS, stop), expected)


@pytest.mark.parametrize("simple", [True, False], ids=["again", "cached"])
def test_all_rows_have_ended(parameters, simple):
    """The rest is not computed, and still there."""
    prompt = torch.randint(11, (1, 1, 4), generator=torch.Generator().manual_seed(3))
    one = {name: tensor[:1] for name, tensor in parameters.items()}
    first = int(MODEL.generate(one, prompt, 1))
    arguments = one, prompt, TOKENS, first
    found = Model.generate(MODEL, *arguments) if simple else MODEL.generate(*arguments)
    assert found.tolist() == [[[first] + [0] * (TOKENS - 1)]]
