"""Flat parameter rows and their optimizer against torch's own, run by run."""

import pytest
import torch

from groundswell.experiment import AdamW
from groundswell.protocols import ParameterSpec
from groundswell.training.flat import ALIGNMENT, FlatParameters, PackedAdamW, assign_groups, initial_row, layout

SPECS = [
    ParameterSpec("weight", (3, 5), decayed=True, init_std=0.5),
    ParameterSpec("bias", (5,), decayed=False),
    ParameterSpec("embedding", (4, 3), decayed=True, init_std=0.1),
    ParameterSpec("scale", (3,), decayed=False, init_value=1.0),
]
SETTINGS = [
    AdamW(lr=1e-2, weight_decay=0.3, beta1=0.9, beta2=0.98, warmup_steps=0, clip_norm=0.5),
    AdamW(lr=3e-3, weight_decay=0.0, beta1=0.8, beta2=0.999, warmup_steps=7, clip_norm=0.0),
    AdamW(lr=1e-3, weight_decay=1.0, beta1=0.9, beta2=0.95, warmup_steps=3, clip_norm=100.0),
]


def make(dtype=torch.float64):
    rows = torch.stack([initial_row(SPECS, torch.Generator().manual_seed(seed)) for seed in range(3)]).to(dtype)
    return FlatParameters(SPECS, rows)


def test_layout_is_aligned_and_decayed_first():
    where = layout(SPECS)
    offsets, num_decayed, row_size = where.offsets, where.parts[0][0].stop, where.row_size
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert max(offsets["weight"], offsets["embedding"]) < num_decayed <= min(offsets["bias"], offsets["scale"])
    assert row_size % ALIGNMENT == 0


def test_views_share_memory_with_their_row():
    parameters = make()
    parameters.views["scale"].data[1] += 1
    offset = parameters.layout.offsets["scale"]
    assert parameters.flat[1, offset : offset + 3].tolist() == [2.0, 2.0, 2.0]
    (parameters.views["weight"] ** 2).sum().backward()
    assert torch.equal(parameters.grad[:, :15].view(3, 3, 5), 2 * parameters.views["weight"].detach())


@pytest.mark.parametrize("on_cpu", [True, False], ids=["rows", "flat"])
def test_equals_torch_adamw_and_clip_run_by_run(on_cpu):
    """Both code paths (the element-wise one is the GPU's) against torch.optim.AdamW, clip_grad_norm_ and LambdaLR."""
    parameters = make()
    optimizer = PackedAdamW(parameters, SETTINGS)
    if not on_cpu:
        optimizer = _as_on_gpu(parameters)
    expected = [
        {name: view.detach()[k].clone().requires_grad_() for name, view in parameters.views.items()} for k in range(3)
    ]
    for k, settings in enumerate(SETTINGS):
        tensors = expected[k]
        torch_optimizer = torch.optim.AdamW(
            [
                {"params": [tensors["weight"], tensors["embedding"]], "weight_decay": settings.weight_decay},
                {"params": [tensors["bias"], tensors["scale"]], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
        )
        generator = torch.Generator().manual_seed(100 + k)
        for step in range(20):
            warm = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
            for group in torch_optimizer.param_groups:
                group["lr"] = settings.lr * warm
            for tensor in tensors.values():
                tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_(tensors.values(), settings.clip_norm)
            torch_optimizer.step()
    generators = [torch.Generator().manual_seed(100 + k) for k in range(3)]
    for _ in range(20):
        for k, generator in enumerate(generators):
            for spec in SPECS:
                grad = parameters.views[spec.name].grad
                grad[k] = torch.randn(spec.shape, generator=generator, dtype=grad.dtype)
        optimizer.step()
    for k in range(3):
        for name, view in parameters.views.items():
            torch.testing.assert_close(
                view.detach()[k], expected[k][name], rtol=1e-6, atol=1e-7 if not on_cpu else 1e-12
            )


def _as_on_gpu(parameters):
    """The GPU's code path on CPU tensors."""
    optimizer = PackedAdamW(parameters, SETTINGS)
    optimizer.on_cpu = False
    optimizer._place_scalars()
    return optimizer


def test_padding_stays_zero():
    parameters = make()
    optimizer = PackedAdamW(parameters, SETTINGS)
    parameters.grad.normal_()
    used = torch.zeros_like(parameters.flat, dtype=torch.bool)
    for spec in SPECS:
        offset = parameters.layout.offsets[spec.name]
        used[:, offset : offset + torch.Size(spec.shape).numel()] = True
    parameters.grad[~used] = 0
    for _ in range(3):
        optimizer.step()
    assert parameters.flat[~used].abs().max() == 0


@pytest.mark.parametrize("on_cpu", [True, False], ids=["rows", "flat"])
def test_decay_of_everything_and_tensors_that_are_not_trained(on_cpu):
    specs = [*SPECS, ParameterSpec("fixed", (6,), decayed=True, init_std=1.0, trained=False)]
    row = initial_row(specs, torch.Generator().manual_seed(0)).double()[None]
    parameters = FlatParameters(specs, row.clone())
    assert layout(specs).num_trained == parameters.num_trained == parameters.layout.offsets["fixed"]
    assert not parameters.views["fixed"].requires_grad
    settings = AdamW(lr=1e-2, weight_decay=0.5, decay_all=True, clip_norm=0.0)
    optimizer = PackedAdamW(parameters, [settings])
    if not on_cpu:
        optimizer.on_cpu = False
        optimizer._place_scalars()
    tensors = {spec.name: parameters.views[spec.name].detach()[0].clone().requires_grad_() for spec in SPECS}
    reference = torch.optim.AdamW(tensors.values(), lr=1e-2, weight_decay=0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for name, tensor in tensors.items():
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            parameters.views[name].grad[0] = tensor.grad
        optimizer.step()
        reference.step()
    for name, tensor in tensors.items():
        torch.testing.assert_close(parameters.views[name].detach()[0], tensor.detach(), rtol=1e-6, atol=1e-7)
    offset = parameters.layout.offsets["fixed"]
    assert torch.equal(parameters.flat[0, offset : offset + 6], row[0, offset : offset + 6])
    norm = torch.sqrt(sum((tensor.grad**2).sum() for tensor in tensors.values()))
    assert optimizer.grad_norm.item() == pytest.approx(norm.item())


@pytest.mark.parametrize("on_cpu", [True, False], ids=["rows", "flat"])
@pytest.mark.parametrize("timed", [False, True], ids=["steps", "seconds"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "trapezoid"])
def test_groups_and_schedules_equal_torch(on_cpu, schedule, timed):
    """A group with a rate and decay of its own, one that climbs, one that is frozen, against torch's AdamW."""
    settings = AdamW(
        lr=1e-2, weight_decay=0.3, warmup_steps=0 if schedule == "trapezoid" else 3, clip_norm=0.5, schedule=schedule,
        final_lr=0.2, warmup_fraction=0.3, cooldown_fraction=0.4,
        groups=(
            {"match": "embedding", "lr": 3e-2, "weight_decay": 0.0},
            {"match": "bias", "ascent": True, "lr": 1e-3},
            {"match": "scale", "frozen": True},
        ),
    )  # fmt: skip
    specs = assign_groups(SPECS, settings)
    assert [spec.trained for spec in specs] == [True, True, True, False]
    row = initial_row(specs, torch.Generator().manual_seed(0)).double()[None]
    parameters = FlatParameters(specs, row)
    optimizer = PackedAdamW(parameters, [settings], total_updates=20, timed=timed)
    if not on_cpu:
        optimizer.on_cpu = False
        optimizer._place_scalars()
    tensors = {name: view.detach()[0].clone().requires_grad_() for name, view in parameters.views.items()}
    rates = {"weight": 1e-2, "embedding": 3e-2, "bias": 1e-3}
    reference = torch.optim.AdamW(
        [
            {"params": [tensors["weight"]], "weight_decay": 0.3},
            {"params": [tensors["embedding"]], "weight_decay": 0.0},
            {"params": [tensors["bias"]], "weight_decay": 0.0, "maximize": True},
        ],
        betas=(settings.beta1, settings.beta2),
    )
    generator = torch.Generator().manual_seed(1)
    for update in range(20):
        for name in rates:
            tensors[name].grad = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            parameters.views[name].grad[0] = tensors[name].grad
        torch.nn.utils.clip_grad_norm_([tensors[name] for name in rates], 0.5)
        for group, name in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rates[name] * settings.lr_factor(update, 20, update / 15 if timed else None)
        reference.step()
        if timed:
            optimizer.set_done(update / 15)  # the last ones are late
        optimizer.step()
    for name, tensor in tensors.items():
        torch.testing.assert_close(parameters.views[name].detach()[0], tensor.detach(), rtol=1e-5, atol=1e-7)
