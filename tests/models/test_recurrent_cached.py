"""Greedy decoding with a cache equals computing everything again, for all variants; rows that end leave the batch."""

from __future__ import annotations

import pytest
import torch
from recurrent_variants import SMALL, VARIANTS, rows, weights
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Model
from models import recurrent_cached
from models.recurrent import RecurrentDecoder

TOKENS = 7


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RecurrentDecoder:
    return SMALL.with_overrides(VARIANTS[request.param])


@pytest.mark.parametrize("num_runs", [1, 2])
def test_equals_full_recomputation(model: RecurrentDecoder, num_runs: int) -> None:
    parameters = weights(model, num_runs)
    prompts = rows(5, num_runs)[0][:, :, :5]
    found = model.generate(parameters, prompts, TOKENS)
    assert torch.equal(found, Model.generate(model, parameters, prompts, TOKENS))
    assert len(found.unique()) > 1  # no constant answer, which anything would equal


def test_every_step_computes_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    original = RecurrentDecoder.query_key_value

    def counted(self: RecurrentDecoder, parameters: dict, layer: int, x: Tensor, *args: object, **options: object):
        lengths.append(x.shape[2])
        return original(self, parameters, layer, x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RecurrentDecoder, "query_key_value", counted)
    SMALL.generate(weights(SMALL), rows(5)[0][:, :, :5], 3)
    assert lengths == [5] * 4 + [1] * 8


@pytest.mark.parametrize("num_runs", [1, 2])
def test_rows_end_with_the_stop_token(model: RecurrentDecoder, num_runs: int) -> None:
    parameters = weights(model, num_runs)
    prompts = rows(6, num_runs)[0][:, :, :5]
    free = model.generate(parameters, prompts, TOKENS)
    stop = int(free[0, 0, 2])
    found = model.generate(parameters, prompts, TOKENS, stop)
    after = (free == stop).cumsum(-1) - (free == stop).int() > 0
    assert torch.equal(found, free.masked_fill(after, 0))
    assert after.any()


def test_rows_that_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = weights(SMALL)
    prompts = rows(6)[0][:, :, :5]
    free = SMALL.generate(parameters, prompts, TOKENS)
    stop = int(free[0, 0, 1])
    open_rows = [int(((free[0, :, :step] == stop).sum(-1) == 0).sum()) for step in range(TOKENS)]
    sizes = []
    original = RecurrentDecoder.embed

    def counted(self: RecurrentDecoder, parameters: dict, tokens: Tensor, *args: object, **options: object) -> Tensor:
        sizes.append(tokens.shape[1])
        return original(self, parameters, tokens, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RecurrentDecoder, "embed", counted)
    SMALL.generate(parameters, prompts, TOKENS, stop)
    assert sizes == [size for size in open_rows if size]
    assert sizes[-1] < 6


def test_prompts_of_different_lengths(model: RecurrentDecoder) -> None:
    parameters = weights(model)
    prompts = rows(6)[0]
    lengths = torch.tensor([3, 5, 3, 9, 5, 4])
    found = recurrent_cached.generate_by_length(model, parameters, prompts, lengths, 4, stop_token=3)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(parameters, prompts[:, row : row + 1, :length], 4, 3)
        assert torch.equal(found[:, row], alone[:, 0])


def test_nothing_to_do_and_too_much() -> None:
    parameters = weights(SMALL)
    prompts = rows(2)[0]
    assert SMALL.generate(parameters, prompts, 0).shape == (1, 2, 0)
    assert SMALL.generate(parameters, prompts[:, :0], 3).shape == (1, 0, 3)
    learned = SMALL.with_overrides({"position_encoding": "learned"})
    with pytest.raises(ConfigError, match="do not fit the 24 learned positions"):
        learned.generate(weights(learned), prompts, 17)
