"""Recurrent decoders, losses, greedy decoding and training against recordings of the published code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from groundswell import AdamW
from groundswell.protocols import IGNORE, Answer, Model, ParameterSpec, Split
from groundswell.training.flat import FlatParameters, PackedAdamW, layout
from models.objectives import AnswerLoss, token_losses
from models.recurrent import RecurrentDecoder
from models.recurrent_objective import ProgressiveLoss
from models.recurrent_original import fields_of_config, from_state_dict, our_name

GOLDEN = Path(__file__).parents[1] / "golden" / "arithmetic"
LOOPED = sorted(path.stem for path in GOLDEN.glob("rec_*.json"))
PLAIN = ["std_default_scaledsin", "std_learned", "std_rope"]
EQUALS, VOCAB_SIZE = 17, 19


class Recorded(RecurrentDecoder):
    """Takes first states and offsets from a recording instead of drawing them."""

    states: ClassVar[list[Tensor]] = []
    shifts: ClassVar[list[int]] = []

    def first_state(self, injected: Tensor, generators: Any, start: int = 0) -> Tensor:
        if self.initial_state == "input":
            return injected
        return self.states.pop(0).expand_as(injected)

    def offsets(self, generators: Any, device: torch.device) -> Tensor | None:
        return torch.tensor([self.shifts.pop(0)]) if generators else None


class RecordedLoss(ProgressiveLoss):
    pairs: ClassVar[list[list[int]]] = []

    def draw(self, total: int, most: int, generators: Any, tokens: Tensor) -> tuple[list[int], list[int]]:
        before, after = self.pairs.pop(0)
        return [before], [after]


class Case:
    """A fixture in our terms."""

    def __init__(self, name: str) -> None:
        self.facts = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.per_head = self.facts["arch"]["attention"]["type"] == "self-attention"
        self.model = Recorded.from_dict(fields_of_config(self.facts["arch"]))
        self.specs: list[ParameterSpec] = self.model.parameters(VOCAB_SIZE, 0)
        self.tokens = self.tensors["input_ids"].long()[None]

    def weights(self, prefix: str = "sd.") -> dict[str, Tensor]:
        stored = {name.removeprefix(prefix): v for name, v in self.tensors.items() if name.startswith(prefix)}
        return from_state_dict(self.model, stored, self.specs, self.per_head)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value[None].clone().requires_grad_() for name, value in self.weights().items()}

    def state(self, name: str) -> Tensor:
        found = self.tensors[name]
        return (found.transpose(0, 1) if self.per_head else found)[None]

    def batch(self, mask_before_equals: bool, ignore_padding: bool = True) -> Split:
        """Every position and its next token, as far as it counts."""
        labels = self.tokens[..., 1:].clone()
        if mask_before_equals:
            seen = (self.tokens == EQUALS).cumsum(-1)[..., :-1] > 0
            labels[~seen] = IGNORE
        if ignore_padding:
            labels[labels == 0] = IGNORE
        inputs = self.tokens[..., :-1]
        return Split(inputs, torch.arange(inputs.shape[-1]).expand_as(inputs), labels)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def gradient_norms(parameters: dict[str, Tensor], names: list[str]) -> dict[str, float]:
    """Under their names; attention's three matrices are one there."""
    norms = {}
    for theirs in names:
        ours = our_name(theirs)
        parts = [ours]
        if "in_proj" in ours:
            layer, _, kind = ours.partition(".attn.in_proj_")
            parts = [f"{layer}.attention.{part}.{kind}" for part in ("query", "key", "value")]
        grads = [parameters[part].grad for part in parts]
        norms[theirs] = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
    return norms


def assert_gradient_norms(parameters: dict[str, Tensor], recorded: dict[str, float | None]) -> None:
    wanted = {name: value for name, value in recorded.items() if value is not None}
    found = gradient_norms(parameters, list(wanted))
    for name, value in wanted.items():
        # a bias on all scores of a query changes nothing, so its gradient is rounding
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name


@pytest.fixture(scope="module", params=LOOPED)
def looped(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_parameter_count(looped: Case) -> None:
    total = sum(math.prod(spec.shape) for spec in looped.specs)
    constants = looped.model.num_layers * (looped.model.attention_positions == "fire")  # the stored threshold
    assert total + constants == looped.facts["num_params"]


def test_logits_and_evaluation_losses(looped: Case) -> None:
    for entry in looped.facts["eval"]:
        model = looped.model.with_overrides({"num_recurrences_in_eval": entry["n"]})
        parameters = {name: value[None] for name, value in looped.weights().items()}
        state = looped.tensors.get(f"{entry['id']}.init_state")
        Recorded.states = [] if state is None else [looped.state(f"{entry['id']}.init_state")]
        logits = model.logits(parameters, looped.tokens)
        close(logits[0], looped.tensors[f"{entry['id']}.logits"])
        batch = looped.batch(entry["mask_before_equals"])
        losses, _ = token_losses(logits[:, :, :-1], batch.targets)
        count = (batch.targets != IGNORE).sum() if entry["loss_reduction"] == "mean" else batch.targets.numel()
        close(losses.sum() / count, torch.tensor(entry["loss"]))


def test_training_losses_and_gradients(looped: Case) -> None:
    for entry in looped.facts["train"]:
        fields = {name: entry[name] for name in ("alpha", "throttle", "max_backprop")}
        reduction = "slots" if entry["loss_reduction"] == "none" else "mean"
        objective = RecordedLoss(reduction=reduction, **fields)
        passes = entry["n_k_per_pass"]
        RecordedLoss.pairs = [passes[-1]]
        batch = looped.batch(mask_before_equals=True)
        length = batch.tokens.shape[-1]
        Recorded.shifts = list(entry["abacus_offsets"] or [0] * len(passes))
        names = [f"{entry['id']}.init_state{index}" for index in range(len(passes))]
        Recorded.states = [looped.state(name)[:, :, :length] for name in names if name in looped.tensors]
        parameters = looped.parameters()
        generators = [torch.Generator()]
        loss, _ = objective.loss(looped.model, parameters, batch, Answer(slice(None)), generators)
        close(loss.detach(), torch.tensor([entry["loss"]]))
        loss.sum().backward()
        assert_gradient_norms(parameters, entry["grad_norms"])
        if entry["alpha"] < 1:  # the pass with all recurrences is the one that the objective works out itself
            most = objective.most_backprop(looped.model.num_recurrences)
            assert passes[0] == [looped.model.num_recurrences - most, most]


def test_last_logits_in_training(looped: Case) -> None:
    """Those of a stochastic pass, from a state without gradients on."""
    entry = looped.facts["train"][0]
    Recorded.shifts = list(entry["abacus_offsets"] or [0])
    names = [name for name in looped.tensors if name == "train0.init_state0"]
    Recorded.states = [looped.state(name) for name in names]
    positions = torch.full((1, len(looped.tokens[0]), 1), looped.tokens.shape[-1] - 1)
    (pair,) = entry["n_k_per_pass"]
    logits = looped.model.answer_logits(
        looped.parameters(), looped.tokens, positions, [torch.Generator()], recurrences=([pair[0]], [pair[1]])
    )
    close(logits[0, :, 0].detach(), looped.tensors["train0.last_token_logits"])


def test_greedy_decoding(looped: Case) -> None:
    """The published way: all tokens again for each new one, from a new first state."""
    parameters = {name: value[None] for name, value in looped.weights().items()}
    prompts = looped.tensors["prompt_ids"].long()[None]
    for entry in looped.facts["generate"]:
        model = looped.model.with_overrides({"num_recurrences_in_eval": entry["steps"]})
        names = [f"{entry['id']}.init_state{index}" for index in range(entry["token_limit"])]
        Recorded.states = [looped.state(name) for name in names if name in looped.tensors]
        found = Model.generate(model, parameters, prompts, entry["token_limit"])
        assert found[0].tolist() == entry["ids"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_decoders(name: str) -> None:
    """No masking there: padding is a target like any other."""
    case = Case(name)
    parameters = case.parameters()
    close(case.model.logits(parameters, case.tokens)[0].detach(), case.tensors["eval.logits"])
    batch = case.batch(mask_before_equals=False, ignore_padding=False)
    loss, _ = AnswerLoss().loss(case.model, parameters, batch, Answer(slice(None)), None)
    close(loss.detach(), torch.tensor([case.facts["train_loss"]]))
    close(loss.detach(), torch.tensor([case.facts["eval_loss"]]))
    loss.sum().backward()
    assert_gradient_norms(parameters, case.facts["grad_norms"])
    assert sum(math.prod(spec.shape) for spec in case.specs) == case.facts["num_params"]


def test_looped_decoder_without_output_adapter() -> None:
    case = Case("std_albert")
    parameters = {name: value[None] for name, value in case.weights().items()}
    Recorded.states = [case.state("init_state")] * 2
    logits = case.model.logits(parameters, case.tokens)
    close(logits[0, :, -1], case.tensors["last_token_logits"])
    losses, _ = token_losses(logits[:, :, :-1], case.batch(False, False).targets)
    close(losses.mean(), torch.tensor(case.facts["eval_loss"]))


def test_trajectory() -> None:
    """Six updates of two micro-batches each, in the published engine and in ours."""
    case = Case("trajectory")
    settings = case.facts["optim"]
    optimizer_settings = AdamW(
        lr=settings["lr"], beta1=settings["betas"][0], beta2=settings["betas"][1], eps=settings["eps"],
        weight_decay=settings["weight_decay"], clip_norm=settings["clip"],
    )  # fmt: skip
    row = torch.zeros(1, layout(case.specs).row_size)
    flat = FlatParameters(case.specs, row)
    for name, value in case.weights().items():
        flat.views[name].data.copy_(value[None])
    optimizer = PackedAdamW(flat, [optimizer_settings])
    objective = ProgressiveLoss(alpha=0.0)
    batch = case.batch(mask_before_equals=True)
    losses, norms = [], []
    for index in range(12):
        half = slice(4 * (index % 2), 4 * (index % 2) + 4)
        part = Split(batch.tokens[:, half], batch.positions[:, half], batch.targets[:, half])
        loss, _ = objective.loss(case.model, flat.views, part, Answer(slice(None)), None)
        (loss.sum() / 2).backward()
        losses.append(loss.item())
        if index % 2:
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
            flat.grad.zero_()
    assert losses == pytest.approx(case.facts["losses"], abs=2e-5, rel=1e-4)
    assert norms == pytest.approx(case.facts["pre_clip_grad_norms"], rel=1e-3)
    for name, value in case.weights("final.").items():
        # FIRE's biases shift all scores of a query alike (a hidden unit's where it is active for all pairs): their
        # gradients are rounding, which AdamW without an epsilon turns into whole steps that no output depends on
        if not (name.startswith("fire.") and name.endswith(".bias")):
            torch.testing.assert_close(flat.row(0)[name], value, atol=1e-4, rtol=0, msg=name)


SIZES = json.loads((GOLDEN / "param_counts.json").read_text())


@pytest.mark.parametrize("entry", SIZES, ids=lambda e: "-".join(str(v) for v in e.values()))
def test_published_parameter_counts(entry: dict[str, Any]) -> None:
    model = RecurrentDecoder.published(
        f"{entry['layers_in_recurrent_block']}x{entry['maximal_recurrence']}",
        inject_every_layer=entry["skip"],
        position_encoding="null" if entry["pos_embedding"] == "None" else entry["pos_embedding"],
        attention_positions="fire" if entry["fire"] else "null",
    )
    total = sum(math.prod(spec.shape) for spec in model.parameters(VOCAB_SIZE, 64))
    assert total + model.num_layers * entry["fire"] == entry["num_params"]  # FIRE's threshold is a constant here
