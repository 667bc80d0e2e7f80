"""The decoder as a module equals the pure functions bit for bit: whole, recomputed, and sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from networks import LENGTH, VOCAB_SIZE, batch, filled, group_of_one, leaves, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from groundswell.protocols import Model
from models.decoder import Decoder

# models/decoder_network.py says why; pytest has filters of its own
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")

SMALL = Decoder(num_layers=2, num_heads=2, width=8)
VARIANTS = {
    "plain": {},
    "untied": {"tied_head": False},
    "no norm, relu": {"layer_norm": False, "activation": "relu", "mlp_width": 12},
    "rotary": {"position_encoding": "rotary", "rotary_dim": 4},
    "no positions": {"position_encoding": "null"},
    "looped": {"num_recurrences": 2},
    "looped, re-embedded": {"num_recurrences": 2, "re_embed": True, "re_embed_temperature": 2.0},
    "frozen embeddings": {"freeze_embeddings": True, "tied_head": False, "num_positions": 9},
    "one layer": {"num_layers": 1},
    "dropout": {"dropout": 0.2, "num_recurrences": 2},
}


@pytest.fixture(params=VARIANTS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return SMALL.with_overrides(VARIANTS[request.param])


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def reference(model: Model) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Logits and gradients of the pure functions."""
    parameters = leaves(model, weights(model))
    tokens, positions, factors = batch()
    logits = model.answer_logits(parameters, tokens[None], positions[None], [generator()])[0]
    (logits * factors).sum().backward()
    return logits.detach(), {name: p.grad if p.grad is None else p.grad[0] for name, p in parameters.items()}


def assert_same(model: Model, network: torch.nn.Module) -> None:
    """Twice, because a network that loses its place after one step would pass once."""
    expected, expected_grads = reference(model)
    tokens, positions, factors = batch()
    for _ in range(2):
        network.zero_grad()
        drawn = generator()
        logits = network(tokens, positions, drawn)
        after_forward = drawn.get_state()
        (logits * factors).sum().backward()
        assert torch.equal(logits, expected)
        assert torch.equal(drawn.get_state(), after_forward)
        grads = {name: p.grad for name, p in network.named_parameters()}
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            same = whole is None if expected_grads[name] is None else torch.equal(whole, expected_grads[name])
            assert same, name


def recompute_blocks(network: torch.nn.Module) -> None:
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def test_names_shapes_and_devices(decoder: Decoder) -> None:
    network = decoder.network(VOCAB_SIZE, LENGTH)
    specs = {spec.name: spec for spec in decoder.parameters(VOCAB_SIZE, LENGTH)}
    parameters = dict(network.named_parameters())
    assert parameters.keys() == specs.keys()
    for name, parameter in parameters.items():
        assert tuple(parameter.shape) == specs[name].shape
        assert parameter.is_meta and parameter.requires_grad == specs[name].trained
    assert len(network.blocks) == decoder.num_layers
    in_blocks = {id(p) for block in network.blocks for p in block.parameters()}
    assert {name for name, p in parameters.items() if id(p) in in_blocks} == {n for n in specs if ".h." in n}


def test_equals_the_pure_functions(decoder: Decoder) -> None:
    assert_same(decoder, filled(decoder, weights(decoder)))


def test_recomputed_blocks_draw_the_same_dropout(decoder: Decoder) -> None:
    network = filled(decoder, weights(decoder))
    recompute_blocks(network)
    assert_same(decoder, network)


def test_blocks_are_called_as_modules(decoder: Decoder) -> None:
    network = filled(decoder, weights(decoder))
    calls: list[int] = []
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    network(*batch()[:2])
    assert calls == [*range(decoder.num_layers)] * decoder.num_recurrences


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded(decoder: Decoder, recompute: bool, group: None) -> None:
    network = filled(decoder, weights(decoder))
    if recompute:
        recompute_blocks(network)
    mesh = init_device_mesh("cpu", (1,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert_same(decoder, network)
