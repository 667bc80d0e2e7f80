"""Planned bytes of weights, gradients and moments against two real workers."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import experiment
from torch.distributed.tensor import DTensor

from groundswell import Scaling
from groundswell.planning import strategies
from groundswell.planning.plan import network_sizes
from groundswell.planning.strategies import Extra, Footprint
from groundswell.protocols import Answer
from groundswell.scaling.engines import engine_class
from models.decoder import Decoder
from models.transformers_model import TransformersModel

WORKERS = 2


def _subject(strategy: str, architecture: str):
    shape = {"num_layers": 3, "num_heads": 4, "width": 64}
    model = Decoder(**shape) if architecture == "decoder" else TransformersModel(architecture=architecture, **shape)
    own = experiment(model, 32, 500)
    return own.model_copy(update={"scaling": Scaling(strategy=strategy, num_workers=WORKERS, device="cpu")})


def _work(rank: int, store: str, strategy: str, architecture: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    try:
        own = _subject(strategy, architecture)
        engine = engine_class(strategy)(own, Answer(slice(-1, None)), torch.device("cpu"), 1)
        train = own.task.build().train.select(slice(4 * rank, 4 * rank + 4))
        batch = type(train)(train.tokens[None], train.positions[None], train.targets[None])
        engine.update([(batch, torch.tensor(1 / WORKERS))], 1.0, None)

        def local(tensors) -> int:
            return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

        parameters = list(engine.network.parameters())
        moments = [m for state in engine.optimizer.state.values() for m in state.values() if m.dim()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        results.put((rank, local(parameters), local(gradients), local(moments)))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["decoder", "gpt2", "llama"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_state_of_real_workers(strategy, architecture, tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "store"), strategy, architecture, results)
    mp.spawn(_work, arguments, nprocs=WORKERS)
    own = _subject(strategy, architecture)
    sizes, _ = network_sizes(own)
    planned = strategies.memory(own.scaling, sizes, Footprint(0, 0, 0, 0), Extra("none"), 0.0, 0.0)
    for _ in range(WORKERS):
        _, weights, gradients, moments = results.get(timeout=60)
        assert planned.weights == pytest.approx(weights, rel=0.02)
        assert planned.gradients == pytest.approx(gradients, rel=0.02)
        assert planned.optimizer == pytest.approx(moments, rel=0.02)
