"""What is measured on shapes alone, against real steps."""

import pytest
from measuring import RealStep, cpu_peak_bytes, experiment, real_flops

from groundswell.config import ConfigError
from groundswell.experiment import ParameterGroup, Scaling
from groundswell.planning import strategies
from groundswell.planning.footprint import Meter
from groundswell.planning.plan import network_sizes
from groundswell.planning.strategies import Extra
from models.bilinear import Bilinear
from models.decoder import Decoder
from models.transformers_model import TransformersModel

MODELS = {
    "decoder": Decoder(num_layers=4, num_heads=4, width=64),
    "decoder with loops": Decoder(num_layers=3, num_recurrences=2, num_heads=4, width=64),
    "rotary": Decoder(num_layers=4, num_heads=2, width=64, position_encoding="rotary"),
    "gpt2": TransformersModel(architecture="gpt2", num_layers=4, num_heads=4, width=64),
    "llama": TransformersModel(architecture="llama", num_layers=5, num_heads=4, num_kv_heads=2, width=64),
}
CASES = [  # model, rows, tokens, vocabulary, checkpointing
    ("decoder", 8, 64, 300, False),
    ("decoder", 2, 128, 2_000, True),
    ("decoder with loops", 32, 24, 100, False),
    ("rotary", 8, 64, 300, False),
    ("gpt2", 8, 64, 300, True),
    ("gpt2", 2, 128, 2_000, False),
    ("llama", 32, 24, 100, False),
    ("llama", 8, 64, 300, True),
]


@pytest.mark.parametrize(("name", "rows", "length", "vocabulary", "checkpointing"), CASES)
def test_memory_is_that_of_a_real_step(name, rows, length, vocabulary, checkpointing):
    """Parameters, gradients, moments and all that lives in between: within 15 %; with recomputation, where tracing
    keeps some tensors a little longer, at most 20 % too much."""
    own = experiment(MODELS[name], length, vocabulary)
    footprint = Meter(own, on_gpu=False).footprint(rows, "float32", spread=True, checkpointing=checkpointing)
    sizes, _ = network_sizes(own)
    planned = strategies.memory(
        Scaling(strategy="ddp", activation_checkpointing=checkpointing), sizes, footprint, Extra("none"), 0.0, 0.0
    )
    measured = cpu_peak_bytes(RealStep(own, checkpointing), rows)
    assert 0.85 <= planned.gpu_total / measured <= (1.2 if checkpointing else 1.15)


@pytest.mark.parametrize(("name", "checkpointing"), [("decoder with loops", False), ("gpt2", False), ("llama", True)])
def test_flops_are_those_of_a_real_step(name, checkpointing):
    own = experiment(MODELS[name])
    footprint = Meter(own, on_gpu=False).footprint(4, "float32", spread=True, checkpointing=checkpointing)
    measured = real_flops(RealStep(own, checkpointing), 4)
    assert footprint.forward_flops + footprint.backward_flops == pytest.approx(measured, rel=0.001)


def test_flops_are_those_of_the_formula():
    """The decoder counts its own products; a backward pass costs twice the forward pass."""
    model = Decoder(num_layers=6, num_heads=4, width=64)
    footprint = Meter(experiment(model)).footprint(4, "float32", spread=True, checkpointing=False)
    assert footprint.forward_flops == pytest.approx(4 * model.flops_per_example(500, 64, 64), rel=0.001)
    assert footprint.backward_flops == pytest.approx(2 * footprint.forward_flops, rel=0.05)  # attention: 2.5 times
    recomputed = Meter(experiment(model)).footprint(4, "float32", spread=True, checkpointing=True)
    head = 2 * 4 * 64 * 64 * 500  # recomputed are the blocks, but for their last product
    assert recomputed.backward_flops == pytest.approx(3 * footprint.forward_flops - head, rel=0.1)


def test_layers_beyond_two_are_extrapolated_exactly():
    meter = Meter(experiment(MODELS["gpt2"]))
    found = meter.footprint(4, "float32", spread=True, checkpointing=False)
    whole, _ = meter._measure(4, "float32", True, False, None)
    assert found.forward_flops == whole.forward_flops and found.backward_flops == whole.backward_flops
    measured = whole.saved_bytes + whole.workspace_bytes
    assert found.saved_bytes + found.workspace_bytes == pytest.approx(measured, rel=0.01)


def test_a_block_saves_what_korthikanti_counts():
    """arXiv 2205.05198, equation 1, without dropout's masks (4 s b h) and attention scores: 30 s b h in half precision,
    and as much again for tanh-gelu written out by transformers."""
    own = experiment(TransformersModel(architecture="llama", num_layers=8, num_heads=4, width=128, mlp_width=512))
    found = Meter(own).footprint(8, "bf16", spread=True, checkpointing=False)
    unit = 8 * 64 * 128 * 8  # b s h L
    assert 30 <= found.saved_bytes / unit <= 60
    recomputed = Meter(own).footprint(8, "bf16", spread=True, checkpointing=True)
    assert 2 <= recomputed.saved_bytes / unit <= 3  # 2 s b h: a block's input


def test_memory_grows_with_the_micro_batch():
    meter = Meter(experiment(MODELS["decoder"]))
    one, two = (meter.footprint(rows, "float32", spread=True, checkpointing=False) for rows in (8, 16))
    assert two.saved_bytes == pytest.approx(2 * one.saved_bytes, rel=0.02)
    assert two.forward_flops == 2 * one.forward_flops


def test_bf16_weights_need_half():
    meter = Meter(experiment(MODELS["llama"]))
    whole, half = (meter.footprint(8, precision, spread=True, checkpointing=False) for precision in ("float32", "bf16"))
    assert half.saved_bytes == pytest.approx(0.5 * whole.saved_bytes, rel=0.15)


def test_gradients_through_a_frozen_network():
    frozen = experiment(MODELS["llama"]).with_overrides(
        {"optimizer.groups": [ParameterGroup(match=".", frozen=True).to_dict()]}
    )
    plain = Meter(frozen).footprint(4, "float32", spread=True, checkpointing=False)
    assert plain.backward_flops == 0
    through = Meter(frozen, gradients_pass_frozen=True).footprint(4, "float32", spread=True, checkpointing=False)
    assert through.forward_flops == plain.forward_flops
    assert 0.8 * plain.forward_flops < through.backward_flops < 1.6 * plain.forward_flops  # towards inputs only
    assert through.saved_bytes > 2 * plain.saved_bytes


def test_models_that_are_no_module_are_measured_as_functions(tiny):
    """What a pack computes is the same as what the module computes."""
    own = experiment(MODELS["decoder"])
    meter = Meter(own)
    module, functions = (meter.footprint(4, "float32", spread=spread, checkpointing=False) for spread in (True, False))
    assert functions.forward_flops == module.forward_flops
    assert functions.saved_bytes == pytest.approx(module.saved_bytes, rel=0.02)


def test_dropout_costs_memory():
    plain, dropped = (
        Meter(experiment(Decoder(num_layers=2, num_heads=4, width=64, dropout=rate))).footprint(
            8, "float32", True, False
        )
        for rate in (0.0, 0.1)
    )
    assert dropped.saved_bytes > 1.1 * plain.saved_bytes


def test_what_cannot_be_run_on_shapes_is_an_error_of_one_line():
    class Curious(Bilinear):
        def answer_logits(self, parameters, tokens, positions, generators=None):
            raise RuntimeError(f"needs values: {tokens.sum().item()}")

    own = experiment(Curious())
    with pytest.raises(ConfigError, match="model: Curious with AnswerLoss cannot be run on shapes alone") as error:
        Meter(own).footprint(1, "float32", spread=False, checkpointing=False)
    assert "\n" not in str(error.value)
