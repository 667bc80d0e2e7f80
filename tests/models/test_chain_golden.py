"""Teacher, student, emulator and both coupled against runs of the published code."""

import chain_golden as golden
import pytest
import torch

from groundswell.experiment import AdamW
from groundswell.training.flat import FlatParameters, PackedAdamW, layout
from models.chain_objective import StateRegression
from models.chain_states import extract_states, state_positions
from models.chain_student import answer_logits, project
from models.objectives import AnswerLoss

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return golden.write_teacher(tmp_path_factory.mktemp("teacher") / "best")


@pytest.fixture(params=golden.CASES)
def case(request):
    return request.param


def separators(case):
    batch = golden.hidden_batch(case)
    first = (batch.tokens == golden.SEPARATOR).int().argmax(-1)
    return first, batch.positions[..., 0]


def in_order(logits, positions):
    """Logits [1, B, T, V] at all positions [1, B, T] -> [B, T, V]."""
    return logits[0].gather(1, positions[0].argsort(-1)[..., None].expand(logits.shape[1:]))


def at_answers(case, recorded):
    """Recorded logits [B, T, V] of rows without a chain -> [B, A, V], and where they are counted."""
    batch = golden.none_batch(case)
    index = batch.positions[0][..., None].expand(-1, -1, recorded.shape[-1])
    return recorded.gather(1, index), batch.targets[0] != golden.IGNORE


def loss_of(objective, model, parameters, batch):
    loss, metrics = objective.loss(model, parameters, batch, golden.ANSWER, None)
    loss.sum().backward()
    return float(loss.detach()), metrics


# ---- teacher ----


def test_teacher(case):
    recorded = golden.expected()["cases"][case]["teacher"]
    parameters, decoder = golden.parameters("teacher"), golden.decoder()
    tokens = golden.hidden_batch(case).tokens
    torch.testing.assert_close(decoder.logits(parameters, tokens)[0], golden.array(case, "teacher/logits"), **CLOSE)
    states = decoder.hidden_states(parameters, tokens)[0]
    torch.testing.assert_close(states, golden.array(case, "teacher/hidden_states"), **CLOSE)
    batch = golden.explicit_batch(case)
    assert int((batch.targets >= 0).sum()) == recorded["total_tokens"]
    assert loss_of(AnswerLoss(), decoder, parameters, batch)[0] == pytest.approx(recorded["loss"], rel=1e-4)
    assert golden.norm(parameters) == pytest.approx(recorded["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("delta", ["dynamic", 0, 1, 2, 5])
def test_states(case, delta):
    first, second = separators(case)
    tokens, teacher = golden.hidden_batch(case).tokens, golden.parameters("teacher")

    def states(subset, per_row=True):
        places = state_positions(first, second, 4, delta, subset, per_row)
        with torch.no_grad():
            return extract_states(golden.decoder(), teacher, tokens, places, subset)[0].transpose(0, 1)

    recorded = golden.array(case, f"states/diagonal_{delta}")
    torch.testing.assert_close(states("diagonal", per_row=False), recorded, **CLOSE)
    if delta == "dynamic":
        alone = golden.array(case, "states/diagonal_dynamic_one_by_one")
        torch.testing.assert_close(states("diagonal"), alone, **CLOSE)
        # the published last_column is its first_column
        torch.testing.assert_close(states("first_column"), golden.array(case, "states/first_column_dynamic"), **CLOSE)
        assert not torch.allclose(states("last_column"), golden.array(case, "states/last_column_dynamic"), atol=0.1)


# ---- student ----


@pytest.mark.parametrize("delta", ["dynamic", 2])
def test_student(case, delta, teacher):
    recorded = golden.expected()["cases"][case][f"student_{delta}"]
    model, parameters = golden.student(teacher, delta=delta, seed_compat=True), golden.parameters("student")
    batch, none = golden.hidden_batch(case), golden.none_batch(case)
    expected = golden.array(case, f"student_{delta}/logits")
    states = model.taught(batch.tokens, batch.positions).states
    if delta == "dynamic":
        projected = torch.stack(project(parameters, states))[:, 0]
        torch.testing.assert_close(projected, golden.array(case, "student_projected_dynamic"), **CLOSE)
    positions = golden.every_position(none.tokens, none.positions[..., 0])
    logits = answer_logits(model.decoder, parameters, none.tokens, positions, states)
    torch.testing.assert_close(in_order(logits, positions), expected, **CLOSE)
    answers, counted = at_answers(case, expected)
    logits = model.answer_logits(parameters, batch.tokens, batch.positions)[0]
    torch.testing.assert_close(logits[counted], answers[counted], **CLOSE)
    assert int(counted.sum()) == recorded["total_tokens"]
    assert loss_of(AnswerLoss(), model, parameters, batch)[0] == pytest.approx(recorded["loss"], rel=1e-4)
    assert golden.norm(parameters) == pytest.approx(recorded["grad_norm"], rel=1e-3)


# ---- emulator ----


@pytest.mark.parametrize("components", [1, 5])
@pytest.mark.parametrize("delta", ["dynamic", 2])
def test_emulator(case, components, delta, teacher):
    recorded = golden.expected()["cases"][case][f"emulator_k{components}_{delta}"]
    model = golden.emulator(teacher, components, delta=delta, seed_compat=True)
    parameters, batch = golden.parameters(f"emulator_k{components}"), golden.hidden_batch(case)
    for tokens in (batch.tokens, golden.none_batch(case).tokens):  # what follows the question changes nothing
        states = model.emulate(parameters, tokens, separators(case)[0]).states[0].transpose(0, 1)
        torch.testing.assert_close(states, golden.array(case, f"emulator_k{components}/states"), **CLOSE)
    loss, metrics = loss_of(StateRegression(), model, parameters, batch)
    assert loss == pytest.approx(recorded["loss"], rel=1e-4)
    assert float(metrics["state_loss"]) == pytest.approx(loss)
    layers = sum(float(metrics[f"state_mse_layer_{layer}"]) for layer in range(4))
    assert layers * 16 / 2 == pytest.approx(loss, rel=1e-5)
    assert golden.norm(parameters) == pytest.approx(recorded["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("components", [1, 5])
def test_what_no_state_depends_on_is_not_trained(components, teacher):
    specs = golden.emulator(teacher, components).parameters(122, 160)
    recorded = golden.expected()[f"emulator_params_without_grad_k{components}"]
    assert {spec.name for spec in specs if not spec.trained} == {name.removeprefix("base_model.") for name in recorded}
    assert {spec.name: spec.shape for spec in specs} == {
        name: tuple(value.shape) for name, value in golden.tensors(f"emulator_k{components}").items()
    }


# ---- coupled ----


@pytest.mark.parametrize("components", [1, 5])
def test_coupled(case, components):
    recorded = golden.expected()["cases"][case][f"coupled_k{components}"]
    model, parameters = golden.coupled(components), golden.coupled_parameters(components)
    batch = golden.none_batch(case)
    positions = golden.every_position(batch.tokens, batch.positions[..., 0])
    logits = in_order(model.answer_logits(parameters, batch.tokens, positions), positions)
    torch.testing.assert_close(logits, golden.array(case, f"coupled_k{components}/logits"), **CLOSE)
    assert loss_of(AnswerLoss(), model, parameters, batch)[0] == pytest.approx(recorded["loss"], rel=1e-4)
    for part in ("student", "emulator"):
        assert golden.norm(parameters, part) == pytest.approx(recorded[f"grad_norm_{part}"], rel=1e-3)
    assert golden.norm(parameters) == pytest.approx(recorded["grad_norm_both"], rel=1e-3)
    start = f"{case}/coupled_k{components}/grad_emulator/"
    gradients = {key.removeprefix(start): value for key, value in golden.arrays().items() if key.startswith(start)}
    assert bool(gradients) == (case == "mult4")
    for name, gradient in gradients.items():
        own = parameters[f"emulator.{name.removeprefix('base_model.')}"].grad
        torch.testing.assert_close(own[0], gradient, atol=1e-6, rtol=1e-3)


# ---- decoding ----


def decoded(case, generate):
    """Rows of one question each: what follows it up to 12 tokens, cut after a separator."""
    batch = golden.none_batch(case)
    for row in range(batch.tokens.shape[1]):
        length = int(batch.positions[0, row, 0]) + 1
        found = generate(row, batch.tokens[:, row : row + 1, :length], 12)[0, 0].tolist()
        yield batch.tokens[0, row, :length].tolist() + found[: found.index(1) + 1 if 1 in found else None]


@pytest.mark.parametrize("components", [1, 5])
def test_greedy_decoding_of_the_coupled_student(case, components):
    model, parameters = golden.coupled(components), golden.coupled_parameters(components)
    recorded = golden.expected()["cases"][case][f"generate_coupled_k{components}_beams1"]
    assert list(decoded(case, lambda _, prompt, n: model.generate(parameters, prompt, n, 1))) == recorded


def test_greedy_decoding_of_the_student(case, teacher):
    batch = golden.hidden_batch(case)
    model, parameters = golden.student(teacher, seed_compat=True), golden.parameters("student")
    states = model.taught(batch.tokens, batch.positions).states
    recorded = golden.expected()["cases"][case]["generate_student_from_teacher_states_dynamic"]

    def generate(row, prompt, num_tokens):
        return model.generate_with_states(parameters, prompt, states[:, row : row + 1], num_tokens, 1)

    assert list(decoded(case, generate)) == recorded


# ---- three steps of AdamW ----


def train(model, values, objective, batch):
    """Losses before each of three steps and after."""
    optimizer = AdamW(lr=1e-3, weight_decay=0.01, decay_all=True, clip_norm=1.0)
    specs = model.parameters(122, 160)
    parameters = FlatParameters(specs, torch.zeros(1, layout(specs).row_size))
    for name, value in values.items():
        parameters.views[name].data.copy_(value)
    stepper, losses = PackedAdamW(parameters, [optimizer]), []
    for number in range(4):
        parameters.grad.zero_()
        loss, _ = objective.loss(model, parameters.views, batch, golden.ANSWER, None)
        losses.append(float(loss.detach()))
        if number < 3:
            loss.sum().backward()
            stepper.step()
    return losses


@pytest.mark.parametrize("stage", ["teacher_eval_mode", "student", "emulator_k1", "emulator_k5", "coupled_k1"])
def test_three_steps(stage, teacher):
    network = stage.removesuffix("_eval_mode")
    values = golden.coupled_parameters(1) if stage == "coupled_k1" else golden.parameters(network)
    model, batch, objective = {
        "teacher_eval_mode": (golden.decoder(), golden.explicit_batch("mult4"), AnswerLoss()),
        "student": (golden.student(teacher), golden.hidden_batch("mult4"), AnswerLoss()),
        "emulator_k1": (golden.emulator(teacher, 1), golden.hidden_batch("mult4"), StateRegression()),
        "emulator_k5": (golden.emulator(teacher, 5), golden.hidden_batch("mult4"), StateRegression()),
        "coupled_k1": (golden.coupled(1), golden.none_batch("mult4"), AnswerLoss()),
    }[stage]
    recorded = golden.expected()["three_adamw_steps_lr1e-3_clip1_mult4"][stage]
    assert train(model, {n: v.detach() for n, v in values.items()}, objective, batch) == pytest.approx(
        recorded, rel=1e-4
    )
