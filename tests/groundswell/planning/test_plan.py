"""What a plan concludes."""

import dataclasses

import pytest
from measuring import experiment

from groundswell import Scaling
from groundswell.config import ConfigError
from groundswell.experiment import Experiment
from groundswell.planning.hardware import GPUS, custom_gpu
from groundswell.planning.plan import Machine, Plan, Planner, largest
from groundswell.planning.strategies import Extra, label
from models.bilinear import Bilinear
from models.decoder import Decoder
from models.transformers_model import TransformersModel
from tasks.reverse import Reverse
from tests.groundswell.made_examples import MadeModularArithmetic

MODEL = Decoder(num_layers=2, num_heads=4, width=256)
A100 = GPUS["a100-80"]


def subject(**fields) -> Experiment:
    return experiment(MODEL, 64, 500).with_overrides(
        {"budget.batch_size": 64, "budget.steps": 3_600, "scaling.precision": "bf16"} | fields
    )


def small_gpu(mib: float):
    """No reserve in the tests below, so this is what a run may use."""
    return custom_gpu(memory_gib=mib / 1024, tflops=1.0, bandwidth=10.0, nic=1.0)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner("test", subject())


@pytest.fixture(scope="module")
def roomy(planner: Planner) -> Plan:
    return planner.plan(Machine(A100, 8))


def row(plan: Plan, name: str):
    return next(row for row in plan.rows if label(row.scaling) == name)


def test_a_small_run_fits_everywhere_and_the_simplest_of_the_cheapest_is_marked(roomy):
    assert all(row.fits for row in roomy.rows)
    assert roomy.best is row(roomy, "ddp")
    assert roomy.best.scaling.micro_batch == 64 // 8
    assert "whole batch fits" in roomy.best.binds


def test_times_add_up(roomy):
    for one in roomy.rows:
        assert one.step_s == one.compute_s + one.update_s + one.exposed_s > 0
        assert roomy.hours(one) == pytest.approx(one.step_s)  # 3,600 updates
        assert roomy.gpu_hours(one) == pytest.approx(one.step_s * one.num_gpus)
    priced = dataclasses.replace(roomy, machine=dataclasses.replace(roomy.machine, price_per_gpu_hour=2.5))
    assert priced.cost(priced.best) == pytest.approx(2.5 * priced.gpu_hours(priced.best))
    assert roomy.cost(roomy.best) is None


def test_flops_of_a_step_do_not_depend_on_the_strategy(roomy):
    plain = [row for row in roomy.rows if not row.scaling.activation_checkpointing]
    assert all(one.flops == pytest.approx(plain[0].flops, rel=1e-6) for one in plain)
    assert row(roomy, "fsdp, checkpointing").flops > 1.2 * row(roomy, "fsdp").flops


def test_a_faster_gpu_is_faster(planner):
    slow, fast = (planner.plan(Machine(A100, 8, mfu=mfu)) for mfu in (0.1, 0.5))
    assert row(slow, "single").compute_s == pytest.approx(5 * row(fast, "single").compute_s, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mib", [40, 80, 200])
def test_the_micro_batch_is_the_largest_that_fits(planner, mib):
    plan = planner.plan(Machine(small_gpu(mib), 2, reserve_gib=0))
    for one in plan.rows:
        size = one.scaling.micro_batch
        limit = plan.machine.gpu.memory_bytes
        assert one.fits == (one.memory.gpu_total <= limit)
        if one.fits and size < 32:
            double = planner._footprint(one.scaling, min(2 * size, 32))
            grown = double.saved_bytes + double.workspace_bytes
            held = one.memory.activations + one.memory.workspace
            assert one.memory.gpu_total - held + grown > limit


@pytest.mark.slow
def test_what_does_not_fit_says_what_binds(planner):
    plan = planner.plan(Machine(small_gpu(20), 2, reserve_gib=0))
    assert not row(plan, "ddp").fits
    assert row(plan, "ddp").binds == "optimizer: shard them (fsdp, or deepspeed with a higher zero_stage)"
    given = Planner("test", subject(**{"scaling.micro_batch": 32})).plan(Machine(small_gpu(60), 2, reserve_gib=0))
    assert row(given, "fsdp").binds == "activations: lower micro_batch, or activation_checkpointing"
    nothing = planner.plan(Machine(small_gpu(5), 2, reserve_gib=0))
    assert nothing.best is None and not any(one.fits for one in nothing.rows)


def test_a_given_micro_batch_is_kept(roomy):
    plan = Planner("test", subject(**{"scaling.micro_batch": 2})).plan(Machine(A100, 8))
    assert {one.scaling.micro_batch for one in plan.rows} == {2}
    ours, theirs = row(plan, "fsdp"), row(roomy, "fsdp")
    assert ours.traffic.total == pytest.approx(4 * theirs.traffic.total)  # every micro-batch gathers
    assert ours.flops == pytest.approx(theirs.flops)


def test_slow_networks_show(planner):
    near, far = (planner.plan(Machine(A100, 16, gpus_per_node=node)) for node in (16, 1))
    assert row(far, "fsdp").exposed_s > row(near, "fsdp").exposed_s
    assert row(far, "fsdp").traffic == row(near, "fsdp").traffic


def test_weak_scaling(planner):
    slow = dataclasses.replace(A100, nic_gbps=0.01)
    plan = planner.plan(Machine(slow, 8))
    points = planner.weak_scaling(plan, [8, 16, 64])
    assert [point.batch_size for point in points] == [64, 128, 512]
    assert points[0].efficiency == 1 and points[0].step_s == pytest.approx(plan.best.step_s)
    assert 1 > points[1].efficiency > points[2].efficiency > 0  # beyond one server the network binds
    assert points[2].examples_per_s == pytest.approx(512 / points[2].step_s)


@pytest.mark.slow
def test_extras_are_counted(roomy):
    extra = Extra("masks", bytes_per_gpu=1e9, flops_per_example=1e12, trained_parameters=1_000, forwards=2)
    plan = Planner("test", subject(), lambda own, size: dataclasses.replace(extra, bytes_per_gpu=size * 1e9)).plan(
        Machine(A100, 8)
    )
    ours, theirs = row(plan, "ddp"), row(roomy, "ddp")
    assert ours.memory.extra == pytest.approx(8e9 + 16_000)
    forward = (theirs.flops / 64) / 3
    assert ours.flops == pytest.approx(theirs.flops + 64 * (1e12 + 2 * forward), rel=0.01)
    assert ours.step_s > theirs.step_s


@pytest.mark.slow
def test_storage_follows_the_schedule_and_the_keep_rule():
    every = {"checkpointing.schedule": {"class": "groundswell.schedule.Every", "every": 900}}
    storage = Planner("test", subject(**every)).plan(Machine(A100, 1)).storage
    parameters = Planner("test", subject()).sizes.total
    assert (storage.num_weights, storage.num_states) == (4, 2)  # 900, 1800, 2700, 3600
    assert storage.total_bytes == 4 * 4 * parameters + 2 * 8 * parameters
    last = every | {"checkpointing.keep": "last", "checkpointing.milestones": [100]}
    assert Planner("test", subject(**last)).plan(Machine(A100, 1)).storage.num_weights == 3


@pytest.mark.slow
def test_epochs():
    plan = Planner("test", subject(**{"budget.epochs": 10})).plan(Machine(A100, 1))
    assert plan.num_updates == 10 * 1  # 64 examples, one batch an epoch


def test_a_model_without_network_runs_on_one_gpu_only(tiny):
    planner = Planner("test", tiny.with_overrides({"model": Bilinear()}))
    plan = planner.plan(Machine(A100, 1))
    assert [label(one.scaling) for one in plan.rows] == ["single"] and plan.best.fits
    assert "Bilinear" in plan.notes[0]
    with pytest.raises(ConfigError, match="model Bilinear cannot be spread"):
        planner.plan(Machine(A100, 4))


@pytest.mark.slow
def test_dropout_costs_memory_but_where_blocks_are_recomputed(roomy):
    plan = Planner("test", subject(**{"model.dropout": 0.1})).plan(Machine(A100, 8))
    assert row(plan, "ddp").memory.activations > 1.1 * row(roomy, "ddp").memory.activations
    name = "ddp, checkpointing"
    assert row(plan, name).memory.activations == row(roomy, name).memory.activations


@pytest.mark.parametrize(("fields", "machine", "match"), [
    ({"scaling.precision": "float64"}, Machine(A100, 1), "scaling.precision: float64 is not planned for"),
    ({}, Machine(GPUS["v100-32"], 1), "scaling.precision: v100-32 has no bf16; use float32"),
    ({}, Machine(A100, 128), "--gpus 128: budget.batch_size 64 has not one example for each"),
    ({"task": {"class": "tasks.modular_arithmetic.ModularArithmetic"}, "budget.epochs": 2}, Machine(A100, 1),
     "budget.epochs: this task does not say"),
])  # fmt: skip
def test_mistakes(fields, machine, match):
    with pytest.raises(ConfigError, match=match):
        Planner("test", subject(**fields)).plan(machine)


def test_largest():
    for count in range(6):
        sizes = [1, 2, 4, 8, 16][:count]
        for limit in (0, 1, 3, 8, 100):
            expected = max((size for size in sizes if size <= limit), default=None)
            assert largest(sizes, lambda size, limit=limit: size <= limit) == expected


def test_a_custom_gpu_needs_its_numbers():
    with pytest.raises(ConfigError, match="--memory-gib and --tflops"):
        custom_gpu(80, None, None, None)
    assert custom_gpu(80, 100, 50, 10).memory_bytes == 80 * 2**30


def test_schema_and_planner_agree(planner, roomy):
    """Every planned row is a setting that an experiment takes."""
    for one in roomy.rows:
        assert planner.experiment.with_overrides({"scaling": Scaling.from_dict(one.scaling.to_dict())})


@pytest.mark.slow
def test_decoder_and_transformers_model_of_one_size_agree():
    """The same network twice; transformers writes the activation function out, so it saves more."""
    shape = {"num_layers": 3, "num_heads": 4, "width": 128}
    ours, theirs = (Planner("test", experiment(model, 64, 500)) for model in (
        Decoder(**shape), TransformersModel(architecture="gpt2", num_positions=64, **shape)
    ))  # fmt: skip
    assert ours.sizes == theirs.sizes
    one, other = (planner.plan(Machine(A100, 1)).rows[0] for planner in (ours, theirs))
    assert one.memory.weights == other.memory.weights
    assert one.memory.activations < other.memory.activations < 2.5 * one.memory.activations


@pytest.mark.slow
def test_seconds_are_no_number_of_updates():
    with pytest.raises(ConfigError, match=r"budget\.seconds: how many updates that is depends .*; set --budget\.steps"):
        Planner("test", subject(**{"budget.seconds": 60, "budget.steps": None})).plan(Machine(A100, 1))


@pytest.mark.slow
def test_examples_that_are_made_take_no_memory():
    for task, expected in ((MadeModularArithmetic(modulus=23), False), (Reverse(), True)):
        assert task.num_train
        (row,) = Planner("test", subject(task=task)).plan(Machine(A100, 1)).rows[:1]
        assert bool(row.memory.data) == expected
