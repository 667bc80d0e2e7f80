"""The recurrent decoder as a module equals the pure functions: whole, recomputed, and sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from networks import group_of_one
from recurrent_variants import LENGTH, SMALL, VARIANTS, VOCAB_SIZE, generators, rows, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from groundswell.protocols import Answer, Split
from groundswell.scaling.network import WrappedModel
from models import recurrent_fused
from models.recurrent import RecurrentDecoder
from models.recurrent_objective import ProgressiveLoss

# models/decoder_network.py says why; pytest has filters of its own
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
RECURRENCES: list[Any] = [None, ([1], [1])]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> RecurrentDecoder:
    return SMALL.with_overrides(VARIANTS[request.param])


@pytest.fixture(autouse=True)
def plain_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused version, equal up to rounding, has tests of its own."""
    monkeypatch.setattr(recurrent_fused, "can_fuse", lambda *_: False)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def network_of(model: RecurrentDecoder, values: dict[str, Tensor]) -> nn.Module:
    network = model.network(VOCAB_SIZE, LENGTH)
    for name, value in values.items():
        module, _, last = name.rpartition(".")
        network.get_submodule(module).register_parameter(last, nn.Parameter(value[0].clone()))
    return network


def recompute_layers(network: nn.Module) -> None:
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def assert_same(model: RecurrentDecoder, network: nn.Module, recurrences: Any) -> None:
    leaves = {name: value.clone().requires_grad_() for name, value in weights(model).items()}
    tokens, positions = rows()
    logits = model.answer_logits(leaves, tokens, positions, generators(), recurrences=recurrences)
    logits.square().sum().backward()
    network.zero_grad()
    found = network(tokens[0], positions[0], generators()[0], recurrences=recurrences)
    found.square().sum().backward()
    torch.testing.assert_close(found, logits[0])
    for name, parameter in network.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        expected = leaves[name].grad
        # what nothing depends on has no gradient, or zeros where it is sharded
        ours = torch.zeros_like(leaves[name][0]) if grad is None else grad
        torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected[0], msg=name)


def test_names_shapes_and_devices(model: RecurrentDecoder) -> None:
    network = model.network(VOCAB_SIZE, LENGTH)
    specs = {spec.name: spec for spec in model.parameters(VOCAB_SIZE, LENGTH)}
    parameters = dict(network.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {name: s.shape for name, s in specs.items()}
    assert all(parameter.is_meta for parameter in parameters.values())
    in_blocks = {id(p) for block in network.blocks for p in block.parameters()}
    assert {name for name, p in parameters.items() if id(p) in in_blocks} == {
        n for n in specs if n.startswith("layers")
    }


@pytest.mark.parametrize("recurrences", RECURRENCES)
def test_equals_the_pure_functions(model: RecurrentDecoder, recurrences: Any) -> None:
    assert_same(model, network_of(model, weights(model)), recurrences)


def test_recomputed_layers(model: RecurrentDecoder) -> None:
    network = network_of(model, weights(model))
    recompute_layers(network)
    assert_same(model, network, ([1], [2]))


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded(model: RecurrentDecoder, recompute: bool, group: None) -> None:
    network = network_of(model, weights(model))
    if recompute:
        recompute_layers(network)
    mesh = init_device_mesh("cpu", (1,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    assert_same(model, network, ([1], [1]))


def test_progressive_loss_of_a_wrapped_network(group: None) -> None:
    """It finds the recurrences in the model's settings, and agrees with other workers on how many to run."""
    values = weights(SMALL)
    tokens, positions = rows()
    batch = Split(tokens, positions, tokens.gather(2, positions))
    objective = ProgressiveLoss(alpha=0.5)
    wrapped: Any = WrappedModel(network_of(SMALL, values), SMALL)
    found, _ = objective.loss(wrapped, {}, batch, Answer(slice(None)), generators())
    expected, _ = objective.loss(SMALL, values, batch, Answer(slice(None)), generators())
    torch.testing.assert_close(found, expected)
