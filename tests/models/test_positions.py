"""FIRE, rotations and sinusoids against recordings of the published code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.layers import rotate
from models.positions import FireWeights, fire_bias, fixed_normal, random_positions, rotate_halves, sinusoids
from models.recurrent_layers import causal

GOLDEN = Path(__file__).parents[1] / "golden" / "arithmetic"
FIRE = json.loads((GOLDEN / "fire.json").read_text())
ARRAYS = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "fire.npz").items()}
ROPE = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "rope.npz").items()}
ABSOLUTE = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "abs_positions.npz").items()}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def fire_weights(case: str) -> tuple[FireWeights, float]:
    """Ours, and the threshold before its multiplier."""
    get = {name.removeprefix(f"{case}.sd."): value for name, value in ARRAYS.items() if name.startswith(f"{case}.sd.")}
    weights = FireWeights(
        get["c"].view(1, 1),
        get["L_multiplier"].view(1, 1),
        get["mlp.0.weight"].t()[None],
        get["mlp.0.bias"][None],
        get["mlp.2.weight"].t()[None],
        get["mlp.2.bias"][None],
    )
    return weights, float(get["init_L"])


@pytest.mark.parametrize("entry", FIRE, ids=lambda e: e["case"])
def test_published_fire_biases(entry: dict) -> None:
    case, length = entry["case"], entry["seq_len"]
    weights, threshold = fire_weights(case)
    in_order = torch.arange(length, dtype=torch.float32)[None]
    found = fire_bias(weights, in_order, in_order, threshold)
    close(found, ARRAYS[f"{case}.bias" if case.startswith("c") else f"{case}.bias_eval"])
    if case.startswith("r"):
        drawn = ARRAYS[f"{case}.positions"][None]
        close(fire_bias(weights, drawn, drawn, threshold), ARRAYS[f"{case}.bias_train"])


def test_fire_of_a_pack_and_of_some_queries() -> None:
    """Runs with parameters and positions of their own; rows of the bias are those of single queries."""
    both = [fire_weights("r0")[0], fire_weights("r1")[0]]
    pack = FireWeights(*(torch.cat(pair) for pair in zip(*both, strict=True)))
    drawn = torch.tensor([[0.0, 3, 4, 9, 11], [1, 2, 6, 7, 15]])
    whole = fire_bias(pack, drawn, drawn, 6.0)
    assert whole.shape == (2, 2, 5, 5)
    for run in range(2):
        close(whole[run], fire_bias(both[run], drawn[run : run + 1], drawn[run : run + 1], 6.0)[0])
    close(fire_bias(pack, drawn[:, 3:], drawn, 6.0), whole[:, :, 3:])


def test_causal_biases() -> None:
    bias = torch.arange(18.0).view(1, 2, 3, 3)
    whole = causal(bias, None)
    assert whole.shape == (1, 1, 2, 3, 3)
    assert torch.isinf(whole[0, 0]).equal(torch.ones(2, 3, 3).triu(1).bool())
    some = causal(bias, torch.tensor([[[2, 0], [1, 1]]]))
    assert torch.equal(some[0, 0], whole[0, 0][:, [2, 0]]) and torch.equal(some[0, 1], whole[0, 0][:, [1, 1]])


def test_random_positions() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    drawn = random_positions(5, 40, generators, torch.device("cpu"))
    assert drawn.shape == (2, 5) and not torch.equal(drawn[0], drawn[1])
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() >= 0 and drawn.max() < 40
    alone = random_positions(5, 40, [torch.Generator().manual_seed(1)], torch.device("cpu"))
    assert torch.equal(alone[0], drawn[1])
    assert random_positions(4, 4, generators, torch.device("cpu")).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_published_rotations(case: str) -> None:
    """Recorded as [T, B, H, h]."""
    for name in ("q", "k"):
        x = ROPE[f"{case}.{name}"]
        length, _, heads, head = x.shape
        ours = x.transpose(0, 1).flatten(2)[None]
        for turned, recorded in (
            (rotate_halves(ours, None, length, heads), f"{case}.{name}_out"),
            (rotate(ours, None, length, heads, head), f"{case}.llama_{name}_out"),
        ):
            close(turned[0].unflatten(-1, (heads, head)).transpose(0, 1), ROPE[recorded])


def test_rotation_of_single_positions() -> None:
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = rotate_halves(x, None, 6, 2)
    places = torch.tensor([4, 1]).expand(2, 3, 2)
    assert torch.equal(rotate_halves(x[:, :, [4, 1]], places, 6, 2), whole[:, :, [4, 1]])


def test_published_sinusoids() -> None:
    waves = sinusoids(11, 8, torch.float32, torch.device("cpu"))
    close(waves[None], ABSOLUTE["sin.out"])
    close(waves[None] * ABSOLUTE["scaled_sin.scale"], ABSOLUTE["scaled_sin.out"])
    assert sinusoids(11, 7, torch.float32, torch.device("cpu")).shape == (11, 7)


def test_fixed_noise_is_of_a_position() -> None:
    cpu = torch.device("cpu")
    long, short = (fixed_normal(length, 5, torch.float32, cpu) for length in (600, 7))
    assert long.shape == (600, 5) and torch.equal(long[:7], short)
    assert not torch.equal(long[:256], long[256:512])  # chunks differ
    assert abs(float(long.mean())) < 0.1 and abs(float(long.std()) - 1) < 0.1
