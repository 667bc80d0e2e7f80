"""The recurrent decoder: its fused version, packs, recurrences, determinism, checks and initial values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recurrent_variants import LENGTH, SMALL, VARIANTS, VOCAB_SIZE, generators, rows, weights
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Task
from groundswell.training.flat import initial_row, layout
from models import recurrent, recurrent_fused
from models.recurrent import RecurrentDecoder
from tasks.modular_arithmetic import ModularArithmetic

FUSED = ["looped abacus", "standard", "skip", "looped skip", "one layer", "learned", "fire", "abacus, random fire",
         "ffn injection everywhere", "input state", "narrow embedding", "tied"]  # fmt: skip


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RecurrentDecoder:
    return SMALL.with_overrides(VARIANTS[request.param])


def run(model: RecurrentDecoder, parameters: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of a loss that weighs them at random."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    num_runs = len(next(iter(leaves.values())))
    tokens, positions = rows(num_runs=num_runs)
    logits = model.answer_logits(leaves, tokens, positions, generators(num_runs), **options)
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    (logits * factors).sum().backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_alike(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-9, rtol=1e-8)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, theirs[1][name], atol=1e-8, rtol=1e-7, msg=name)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("recurrences", [None, ([1], [1])])
def test_fused_version_equals_the_plain_one(name: str, recurrences: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SMALL.with_overrides(VARIANTS[name])
    parameters = weights(model, dtype=torch.float64)
    assert recurrent_fused.can_fuse(model, rows()[0])
    fused = run(model, parameters, recurrences=recurrences)
    monkeypatch.setattr(recurrent_fused, "can_fuse", lambda *_: False)
    assert_alike(fused, run(model, parameters, recurrences=recurrences))


@pytest.mark.parametrize("many", [1, 10**9])
def test_packs_equal_runs_alone(model: RecurrentDecoder, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recurrences of their own, as one product or one after the other."""
    monkeypatch.setattr(recurrent, "MANY_ROWS", many)
    parameters = weights(model, num_runs=3, dtype=torch.float64)
    recurrences = ([0, 2, 1], [2, 1, 1])
    tokens, positions = rows(num_runs=3)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    packed = model.answer_logits(leaves, tokens, positions, generators(3), recurrences=recurrences)
    packed.square().sum().backward()
    for index in range(3):
        alone = {name: value[index : index + 1].clone().requires_grad_() for name, value in parameters.items()}
        part = slice(index, index + 1)
        logits = model.answer_logits(
            alone, tokens[part], positions[part], generators(3)[part],
            recurrences=([recurrences[0][index]], [recurrences[1][index]]),
        )  # fmt: skip
        logits.square().sum().backward()
        torch.testing.assert_close(packed[index], logits[0], atol=1e-9, rtol=1e-8)
        for name, leaf in alone.items():
            ours = leaves[name].grad
            if leaf.grad is not None:
                assert ours is not None
                torch.testing.assert_close(ours[index], leaf.grad[0], atol=1e-8, rtol=1e-7, msg=name)


def test_evaluation_is_deterministic_and_rows_do_not_mix(model: RecurrentDecoder) -> None:
    parameters = weights(model)
    tokens, positions = rows()
    whole = model.answer_logits(parameters, tokens, positions)
    assert torch.equal(whole, model.answer_logits(parameters, tokens, positions))
    torch.testing.assert_close(model.answer_logits(parameters, tokens[:, 1:2], positions[:, 1:2]), whole[:, 1:2])


def test_later_tokens_do_not_matter(model: RecurrentDecoder) -> None:
    parameters = weights(model, dtype=torch.float64)
    tokens, _ = rows()
    changed = tokens.clone()
    changed[:, :, 5:] = 7
    ours, theirs = model.logits(parameters, tokens), model.logits(parameters, changed)
    torch.testing.assert_close(ours[:, :, :5], theirs[:, :, :5])
    assert not torch.allclose(ours[:, :, 5:], theirs[:, :, 5:])
    torch.testing.assert_close(model.logits(parameters, tokens[:, :, :5]), ours[:, :, :5])


def test_logits_at_all_positions_are_those_of_answers(model: RecurrentDecoder) -> None:
    parameters = weights(model)
    tokens, positions = rows()
    picked = model.logits(parameters, tokens).gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, VOCAB_SIZE))
    torch.testing.assert_close(model.answer_logits(parameters, tokens, positions), picked)


def test_recurrences_without_gradients_pass_none() -> None:
    """After them the embedding is reached through the injections only, and never through the first state."""
    model = SMALL.with_overrides({"initial_state": "input", "num_layers": 1, "num_recurrences": 3})
    parameters = weights(model, dtype=torch.float64)
    all_with = run(model, parameters, recurrences=([0], [3]))
    one_with = run(model, parameters, recurrences=([2], [1]))
    torch.testing.assert_close(all_with[0], one_with[0])
    name = "layers.0.mlp.up.weight"
    assert not torch.allclose(all_with[1][name], one_with[1][name])


def test_more_recurrences_in_evaluation() -> None:
    model = SMALL.with_overrides({"num_recurrences_in_eval": 4})
    parameters = weights(model)
    tokens, positions = rows()
    four = model.answer_logits(parameters, tokens, positions)
    again = SMALL.with_overrides({"num_recurrences": 4}).answer_logits(parameters, tokens, positions)
    assert torch.equal(four, again)
    assert not torch.allclose(four, SMALL.answer_logits(parameters, tokens, positions))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_recurrences": 1, "initial_state": "zero", "position_encoding": "null"}, False),
        ({"num_recurrences": 1, "initial_state": "input", "abacus_max_offset": 0}, False),
        ({"num_recurrences": 1, "initial_state": "input"}, True),
        ({"num_recurrences": 2, "initial_state": "zero", "position_encoding": "null"}, True),
        ({"num_recurrences": 1, "initial_state": "embed", "position_encoding": "null"}, True),
        ({"num_recurrences": 1, "initial_state": "zero", "position_encoding": "null",
          "attention_positions": "fire", "fire_max_length": 9}, True),
    ],
)  # fmt: skip
def test_whether_training_draws(fields: dict[str, Any], expected: bool) -> None:
    assert SMALL.with_overrides(fields).stochastic is expected


def test_initial_values() -> None:
    """Xavier with DeepNorm's gain, one for queries and keys, and 1 / sqrt(width) for tables."""
    model = RecurrentDecoder(num_layers=2, num_recurrences=8, width=64, mlp_width=128, num_positions=200)
    specs = model.parameters(500, LENGTH)
    row, where = initial_row(specs, torch.Generator().manual_seed(0)), layout(specs)
    gain = (8 * 16) ** -0.25
    expected = {
        "embedding.token.weight": 64**-0.5,
        "embedding.position.weight": 64**-0.5,
        "layers.0.attention.query.weight": math.sqrt(2 / 128),
        "layers.1.attention.key.weight": math.sqrt(2 / 128),
        "layers.0.attention.value.weight": gain * math.sqrt(2 / 128),
        "layers.1.attention.output.weight": gain * math.sqrt(2 / 128),
        "layers.0.mlp.up.weight": gain * math.sqrt(2 / 192),
        "decoder.weight": gain * math.sqrt(2 / 564),
    }
    for spec in specs:
        if spec.name in expected:
            start = where.offsets[spec.name]
            values = row[start : start + math.prod(spec.shape)]
            assert values.std().item() == pytest.approx(expected[spec.name], rel=0.05), spec.name
    plain = RecurrentDecoder(init="normal", init_std=0.03)
    assert {spec.init_std for spec in plain.parameters(19, 9) if spec.decayed} == {0.03}


def test_biases_and_norms_are_not_decayed() -> None:
    model = SMALL.with_overrides({"biases": True, "attention_positions": "fire", "norm_scheme": "sandwich"})
    for spec in model.parameters(VOCAB_SIZE, LENGTH):
        assert spec.decayed == (not spec.name.endswith(".bias") and "norm" not in spec.name), spec.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide width 8; choose one of 1, 2, 4, 8"),
        ({"num_heads": 8, "attention_positions": "rotary"}, "turns pairs; take fewer num_heads"),
        ({"mlp_width": 13}, "mlp_width: 13 must be even"),
        ({"output_adapter": False, "embedding_width": 4}, "leave embedding_width out"),
        ({"input_injection": "none"}, "set initial_state=input"),
        ({"input_injection": "none", "initial_state": "input", "inject_every_layer": True}, "needs an input_injection"),
        ({"abacus_max_offset": 24}, "abacus_max_offset: 24 leaves no digits; raise num_positions"),
    ],
)
def test_settings_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SMALL.with_overrides(fields)


class Numbers(ModularArithmetic):
    longest_number: int = 17

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def max_length(self) -> int:
        return 25


def test_tasks_that_do_not_fit() -> None:
    task: Task = Numbers(longest_number=17)
    SMALL.check(task)
    with pytest.raises(ValueError, match="num_positions 24 is too few for numbers of 18 digits .* raise it to 25"):
        SMALL.check(Numbers(longest_number=18))
    with pytest.raises(ValueError, match="num_positions 24 is less than the task's 25 tokens"):
        SMALL.with_overrides({"position_encoding": "learned"}).check(task)
    with pytest.raises(ValueError, match="first_digit_token 4: the task has 11 tokens and no digits there"):
        SMALL.check(ModularArithmetic(modulus=11))


def test_inputs_that_do_not_fit_the_tables() -> None:
    long = torch.full((1, 2, 24), 5)
    with pytest.raises(ConfigError, match="a number of 24 digits .* does not fit the 24 rows of the Abacus table"):
        SMALL.logits(weights(SMALL), long)
    long[:, :, 12] = 17
    assert SMALL.logits(weights(SMALL), long).shape == (1, 2, 24, VOCAB_SIZE)
    learned = SMALL.with_overrides({"position_encoding": "learned"})
    with pytest.raises(ConfigError, match="25 tokens do not fit the 24 learned positions"):
        learned.logits(weights(learned), torch.full((1, 2, 25), 5))


def test_published_shapes() -> None:
    model = RecurrentDecoder.published("4x4", attention_positions="fire")
    assert (model.num_layers, model.num_recurrences, model.width, model.num_heads) == (4, 4, 1024, 16)
    with pytest.raises(ConfigError, match="no published shape '3x3'; known: 16x1, 8x2"):
        RecurrentDecoder.published("3x3")


def test_flops() -> None:
    """Against the products that are computed one by one."""
    d, m, length, answers = 8, 12, LENGTH, 3
    layer = 4 * d * d + d * m + m // 2 * d  # multiplications for a token, without attention
    attention = 2 * length * d
    last = length * 2 * d * d + answers * (layer - 2 * d * d + attention)
    head = d * m + m // 2 * d + d * d + d * VOCAB_SIZE
    expected = 2 * (3 * length * (layer + attention) + last + answers * head)
    assert SMALL.flops_per_example(VOCAB_SIZE, length, answers) == expected
