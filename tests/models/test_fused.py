"""The written-out block against the plain one: values, gradients, and the random numbers they take."""

from __future__ import annotations

import pytest
import torch
from test_decoder import random_parameters

from models import attention
from models.decoder import Decoder

DECODER = Decoder(num_layers=2, num_heads=2, width=16)


def outcome(
    decoder: Decoder, num_runs: int, batch: int, length: int, pruned: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """-> logits, gradients of every parameter, states of the dropout generators."""
    seeds = list(range(num_runs))
    parameters = random_parameters(decoder.parameters(11, length), seeds)
    leaves = {name: x.clone().requires_grad_(True) for name, x in parameters.items()}
    source = torch.Generator().manual_seed(9)
    tokens = torch.randint(11, (num_runs, batch, length), generator=source)
    positions = torch.arange(length).expand(num_runs, batch, length)
    if pruned:  # one of them twice, as rows with fewer answers have it
        positions = torch.randint(length, (num_runs, batch, 3), generator=source)
    generators = [torch.Generator().manual_seed(100 + seed) for seed in seeds]
    logits = decoder.answer_logits(leaves, tokens, positions, generators)
    weights = torch.randn(logits.shape, generator=source, dtype=logits.dtype)
    (logits * weights).sum().backward()
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return logits.detach(), gradients, [generator.get_state() for generator in generators]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 5, 3), (3, 4, 2), (3, 5, 6), (2, 3, 16)])
@pytest.mark.parametrize("simplest", [False, True], ids=["grouped attention", "plain attention"])
def test_equals_the_plain_block(
    shape: tuple[int, int, int], pruned: bool, dropout: float, simplest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = DECODER.with_overrides({"dropout": dropout})
    logits, gradients, states = outcome(decoder, *shape, pruned)
    monkeypatch.setattr(Decoder, "_can_fuse", lambda self, x: False)
    if simplest:
        monkeypatch.setattr(attention, "SHORT", 0)
    expected, reference, others = outcome(decoder, *shape, pruned)
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=1e-11)
    assert gradients.keys() == reference.keys() and len(gradients) == len(decoder.parameters(11, shape[2]))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-9, rtol=1e-9, msg=name)
    assert all(torch.equal(mine, other) for mine, other in zip(states, others, strict=True))


def test_only_plain_gpt2s_are_fused() -> None:
    x = torch.zeros(1, 2, 4, 16)
    assert DECODER._can_fuse(x)
    for change in ({"layer_norm": False}, {"activation": "relu"}, {"position_encoding": "rotary", "rotary_dim": 8}):
        assert not DECODER.with_overrides(change)._can_fuse(x)
    assert not DECODER._can_fuse(torch.zeros(1, 2, 40, 16))
