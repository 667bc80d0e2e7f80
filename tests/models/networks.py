"""Shared by tests of networks as modules: weights, filling a network that is on the meta device, a group of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundswell.protocols import Model

VOCAB_SIZE, LENGTH = 19, 6


def weights(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    specs = model.parameters(VOCAB_SIZE, LENGTH)
    return {s.name: (s.init_value + 0.1 * torch.randn(s.shape, generator=generator)).to(dtype) for s in specs}


def batch(batch_size: int = 3, num_answers: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, T], positions [B, A] (in no order), factors [B, A, V] for a loss."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB_SIZE, (batch_size, LENGTH), generator=generator)
    positions = torch.stack([torch.randperm(LENGTH, generator=generator)[:num_answers] for _ in range(batch_size)])
    return tokens, positions, torch.randn(batch_size, num_answers, VOCAB_SIZE, generator=generator)


def filled(model: Model, values: dict[str, Tensor]) -> nn.Module:
    """The model's network with these weights; what was tied stays tied."""
    network = model.network(VOCAB_SIZE, LENGTH)
    assert isinstance(network, nn.Module)
    new: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(network.named_parameters(remove_duplicate=False)):
        if old not in new:
            new[old] = nn.Parameter(values[name].clone(), requires_grad=old.requires_grad)
        module, _, last = name.rpartition(".")
        network.get_submodule(module).register_parameter(last, new[old])
    return network


def leaves(model: Model, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a pack of one has them: [1, *shape]."""
    trained = {spec.name: spec.trained for spec in model.parameters(VOCAB_SIZE, LENGTH)}
    return {name: value.unsqueeze(0).clone().requires_grad_(trained[name]) for name, value in values.items()}


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
