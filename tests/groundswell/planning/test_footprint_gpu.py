"""Planned memory against torch's own count on a GPU."""

import pytest
import torch
from measuring import RealStep, experiment

from groundswell import Scaling
from groundswell.planning import strategies
from groundswell.planning.footprint import Meter
from groundswell.planning.plan import network_sizes
from groundswell.planning.strategies import Extra
from models.decoder import Decoder
from models.transformers_model import TransformersModel

pytestmark = pytest.mark.gpu

MODELS = {
    "decoder": Decoder(num_layers=6, num_heads=8, width=512),
    "gpt2": TransformersModel(architecture="gpt2", num_layers=6, num_heads=8, width=512),
    "llama": TransformersModel(architecture="llama", num_layers=6, num_heads=8, width=512),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("shape", [(8, 256, 8_000), (32, 64, 32_000)])
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_that_of_a_real_step(name, shape, precision, checkpointing):
    rows, length, vocabulary = shape
    own = experiment(MODELS[name], length, vocabulary)
    scaling = Scaling(strategy="ddp", precision=precision, activation_checkpointing=checkpointing)
    footprint = Meter(own).footprint(rows, strategies.arithmetic(scaling), spread=True, checkpointing=checkpointing)
    planned = strategies.memory(scaling, network_sizes(own)[0], footprint, Extra("none"), 0.0, 0.0)
    step = RealStep(own, checkpointing, "cuda")
    batch = step.batch(rows)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            step.run(batch)
    torch.cuda.synchronize()
    assert planned.gpu_total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
