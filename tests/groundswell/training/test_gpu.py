"""The same training on a GPU: eager, as a CUDA graph, compiled; equal to the CPU's to rounding; resumed from a file."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from groundswell.training import stopwatch
from groundswell.training.pack import Member, Pack
from groundswell.training.trainer import PackTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 30


def losses(experiments, steps=STEPS):
    device = torch.device(experiments[0].scaling.device)
    pack = Pack([Member.create(experiment, device) for experiment in experiments])
    table = []
    for _ in range(steps):
        pack.train(1)
        table.append([metrics["train/loss"] for metrics in pack.read_metrics()])
    return torch.tensor(table, dtype=torch.float64).T


def on(experiment, device, **scaling):
    changes = {"scaling.device": device, "model.num_layers": 2}
    return experiment.with_overrides(changes | {f"scaling.{name}": value for name, value in scaling.items()})


@pytest.fixture
def variants(tiny):
    def make(device, **scaling):
        axes = [{"seed": n, "task.seed": n, "optimizer.lr": 1e-3 * (n + 1)} for n in range(3)]
        return [on(tiny.with_overrides(a), device, **scaling) for a in axes]

    return make


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_gpu_equals_cpu(variants, precision, tolerance):
    cpu, gpu = (losses(variants(device, precision=precision)) for device in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_is_near(variants, precision):
    exact, low = losses(variants("cuda")), losses(variants("cuda", precision=precision))
    torch.testing.assert_close(low, exact, rtol=0, atol=0.05)
    assert not torch.equal(low, exact)


@pytest.mark.parametrize("option", ["cuda_graph", "compile"])
def test_graph_and_compiled_equal_eager(variants, option):
    eager, other = losses(variants("cuda")), losses(variants("cuda", **{option: True}))
    torch.testing.assert_close(other, eager, rtol=0, atol=1e-4)


def test_a_graph_follows_the_clock(variants, monkeypatch):
    """Rates that depend on the seconds reach a captured step."""
    ticks: list[Iterator[int]] = []

    def timed(**scaling):
        ticks[:] = [itertools.count()]
        changes = {"budget.seconds": 60.0, "optimizer.schedule": "trapezoid", "optimizer.warmup_steps": 0}
        return [e.with_overrides(changes) for e in variants("cuda", **scaling)]

    monkeypatch.setattr(stopwatch, "clock", lambda: float(next(ticks[0])))
    torch.testing.assert_close(losses(timed(cuda_graph=True)), losses(timed()), rtol=0, atol=1e-4)


def test_packed_equals_alone(variants):
    experiments = variants("cuda", precision="float64")
    together = losses(experiments)
    for row, experiment in zip(together, experiments, strict=True):
        torch.testing.assert_close(row, losses([experiment])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [False, True])
def test_resumed_run_goes_on(tiny, make_run, graph):
    """Killed at step 40, it ends where the undisturbed one ends, to the rounding of kernels that add in any order."""
    experiment = on(tiny, "cuda", cuda_graph=graph)
    whole, killed = make_run(experiment, "whole"), make_run(experiment, "killed")
    for folder, stop_after in ((whole, None), (killed, 40), (killed, None)):
        trainer = PackTrainer([folder])
        while not trainer.finished:
            reports = trainer.advance()
            if stop_after and reports[0]["step"] >= stop_after:
                break
    one, other = whole.journal()[-1], killed.journal()[-1]
    assert one["step"] == other["step"] == 60
    assert other["metrics"]["train/loss"] == pytest.approx(one["metrics"]["train/loss"], abs=1e-4)
