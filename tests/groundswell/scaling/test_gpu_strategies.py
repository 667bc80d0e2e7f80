"""Every strategy on GPUs: losses near those of a pack on the CPU, and runs that are cut off and go on."""

import functools

import pytest
import torch

from groundswell.training.trainer import PackTrainer
from tests.groundswell.scaling.workers import run_workers, states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCES = {"float32": 1e-4, "bf16": 0.05}
DDP = {"scaling.strategy": "ddp"}
FSDP = {"scaling.strategy": "fsdp"}
ZERO = {stage: {"scaling.strategy": "deepspeed", "scaling.zero_stage": stage} for stage in (1, 2, 3)}
BF16 = {"scaling.precision": "bf16"}
OFFLOAD_OPTIMIZER = {"scaling.offload": "optimizer"}
OFFLOAD_ALL = {"scaling.offload": "all"}
VARIANTS = {
    "ddp": DDP,
    "ddp_bf16": DDP | BF16,
    "fsdp": FSDP,
    "fsdp_bf16": FSDP | BF16,
    "fsdp_offload": FSDP | OFFLOAD_ALL,
    "fsdp_bf16_offload": FSDP | BF16 | OFFLOAD_ALL,
    "zero_1": ZERO[1],
    "zero_2": ZERO[2],
    "zero_2_bf16": ZERO[2] | BF16,
    "zero_2_offload": ZERO[2] | OFFLOAD_OPTIMIZER,
    "zero_3": ZERO[3],
    "zero_3_bf16": ZERO[3] | BF16,
    "zero_3_offload": ZERO[3] | OFFLOAD_ALL,
}
both_numbers = pytest.mark.parametrize(
    "num_workers",
    [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device"))],
)
every_variant = pytest.mark.parametrize("name", VARIANTS)


def losses(folder):
    """Of every step, training and evaluation."""
    return {
        (line["step"], name): value
        for line in folder.journal()
        for name, value in line["metrics"].items()
        if name.endswith("loss")
    }


@pytest.fixture
def make(tiny, make_run):
    """Sweep's name, overrides -> a run of 10 steps with a state after the fifth."""
    short = {"budget.steps": 10, "metrics_every": 1, "evaluation.schedule.every": 5, "checkpointing.schedule.every": 5}

    def make(name, overrides):
        return make_run(tiny.with_overrides(short | overrides), name)

    return make


@pytest.fixture
def on_cpu(make):
    """Losses of a pack on the CPU."""

    @functools.cache
    def train():
        folder = make("cpu", {"scaling.device": "cpu"})
        trainer = PackTrainer([folder])
        while not trainer.finished:
            trainer.advance()
        return losses(folder)

    return train


def on_gpu(name, num_workers):
    return VARIANTS[name] | {"scaling.device": "cuda", "scaling.num_workers": num_workers}


def tolerance(name):
    return TOLERANCES[VARIANTS[name].get("scaling.precision", "float32")]


@both_numbers
@every_variant
def test_losses_of_10_steps_are_near_the_cpu_s(make, on_cpu, name, num_workers):
    folder = make("gpu", on_gpu(name, num_workers))
    run_workers(folder, num_workers)
    assert folder.status().state == "finished"
    found = losses(folder)
    assert found == pytest.approx(on_cpu(), abs=tolerance(name))
    if "bf16" in name:
        assert found != pytest.approx(on_cpu(), abs=1e-7)  # it was not float32 after all


@both_numbers
@every_variant
def test_a_resumed_run_goes_on(make, name, num_workers):
    """From the state after step 5 it ends where the undisturbed one ends."""
    whole, cut = (make(sweep, on_gpu(name, num_workers)) for sweep in ("whole", "cut"))
    run_workers(whole, num_workers)
    run_workers(cut, num_workers, stop_after=5)
    assert [state.name for state in states(cut)] == ["step-00000005"]
    assert cut.status().state == "running"
    run_workers(cut, num_workers)
    assert cut.status().state == whole.status().state == "finished"
    assert losses(cut) == pytest.approx(losses(whole), abs=tolerance(name))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", ["fsdp_bf16", "zero_2_bf16", "zero_3_bf16", "zero_3_offload"])
def test_another_number_of_gpus_goes_on(make, name):
    from groundswell import commands

    whole, cut = (make(sweep, on_gpu(name, 2)) for sweep in ("whole", "cut"))
    run_workers(whole, 2)
    run_workers(cut, 2, stop_after=5)
    if name.startswith("zero"):
        assert commands.main(["convert", str(cut.path)]) == 0
    run_workers(cut, 1)
    assert losses(cut) == pytest.approx(losses(whole), abs=tolerance(name))


@pytest.mark.parametrize("name", ["zero_1", "zero_2_bf16", "zero_2_offload", "zero_3_bf16", "zero_3_offload"])
def test_a_converted_state_goes_on(make, name):
    from groundswell import commands

    whole, cut = (make(sweep, on_gpu(name, 1)) for sweep in ("whole", "cut"))
    run_workers(whole, 1)
    run_workers(cut, 1, stop_after=5)
    assert commands.main(["convert", str(cut.path)]) == 0
    run_workers(cut, 1)
    assert losses(cut) == pytest.approx(losses(whole), abs=tolerance(name))
