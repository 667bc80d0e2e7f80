"""The experiment's own rules: strategies that go together, identity, learning-rate schedules, parameter groups."""

import math

import pytest
import torch

from groundswell import AdamW, ConfigError, Experiment, Scaling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_workers": 2}, "scaling.num_workers: 2 needs strategy ddp, fsdp or deepspeed"),
        (
            {"activation_checkpointing": True},
            "scaling.strategy: single has no offload and no activation_checkpointing; use fsdp",
        ),
        ({"strategy": "ddp", "compile": True}, "scaling.strategy: ddp does not go with compile or cuda_graph"),
        ({"strategy": "fsdp", "precision": "float64"}, "scaling.precision: float64 does not go with strategy fsdp"),
        ({"strategy": "ddp", "offload": "all"}, "scaling.offload: does not go with ddp"),
        (
            {"strategy": "fsdp", "offload": "optimizer"},
            "scaling.offload: optimizer alone is DeepSpeed's; fsdp offloads all",
        ),
        ({"strategy": "deepspeed", "offload": "all"}, "scaling.offload: all needs zero_stage 3"),
        ({"strategy": "deepspeed", "zero_stage": 4}, "scaling.zero_stage: Input should be 1, 2 or 3"),
        ({"strategy": "tensor"}, "scaling.strategy: Input should be 'single', 'ddp', 'fsdp' or 'deepspeed'"),
    ],
)
def test_strategies_that_do_not_go_together(tiny, fields, message):
    with pytest.raises(ConfigError) as caught:
        tiny.with_overrides({f"scaling.{name}": value for name, value in fields.items()})
    assert message in str(caught.value)
    assert str(caught.value).startswith("scaling")


def test_the_number_of_workers_is_no_part_of_the_identity(tiny):
    fsdp = tiny.with_overrides({"scaling.strategy": "fsdp"})
    more = fsdp.with_overrides({"scaling.num_workers": 8, "scaling.cpus_per_worker": 0.5, "scaling.timeout_s": 10})
    assert more.run_id == fsdp.run_id != tiny.run_id
    assert Experiment.from_text(more.to_json()) == more != fsdp
    for field, value in {"strategy": "ddp", "micro_batch": 8, "precision": "float64"}.items():
        assert tiny.with_overrides({f"scaling.{field}": value}).run_id != tiny.run_id


def test_reserved_cpus():
    assert Scaling(num_threads=4).reserved_cpus == 4
    assert Scaling(num_threads=4, cpus_per_worker=0.5).reserved_cpus == 0.5


def test_schedules_of_the_learning_rate():
    constant = AdamW(warmup_steps=4)
    assert [constant.lr_factor(update, 100) for update in (0, 1, 4, 99)] == [0.0, 0.25, 1.0, 1.0]
    linear = AdamW(warmup_steps=4, schedule="linear", final_lr=0.1)
    assert [linear.lr_factor(update, 104) for update in (2, 4, 54, 104)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    cosine = AdamW(schedule="cosine")
    assert [cosine.lr_factor(update, 100) for update in (0, 25, 50, 100)] == pytest.approx(
        [1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.0]
    )


def test_cosine_equals_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=7, num_training_steps=50)
    ours = AdamW(warmup_steps=7, schedule="cosine")
    for update in range(50):
        assert ours.lr_factor(update, 50) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_groups_of_tensors():
    optimizer = AdamW(
        lr=1e-3,
        weight_decay=0.1,
        groups=(
            {"match": "mask", "lr": 0.8, "weight_decay": 0.0},
            {"match": r"^lambda", "lr": 0.4, "ascent": True},
            {"match": "h\\.0", "frozen": True},
        ),
    )
    names = ["transformer.h.0.mask", "lambda_1", "transformer.h.0.weight", "transformer.h.1.lambda"]
    assert [optimizer.group_of(name) for name in names] == [0, 1, 2, 3]  # the first that matches
    settings = optimizer.group_settings()
    assert [(s.lr, s.weight_decay) for s in settings] == [(0.8, 0.0), (0.4, 0.1), (1e-3, 0.1), (1e-3, 0.1)]
    assert [s.ascent for s in settings] == [False, True, False, False]


def test_a_group_that_is_no_regular_expression(tiny):
    with pytest.raises(ConfigError, match=r"optimizer.groups.0.match: '\(' is not a regular expression"):
        tiny.with_overrides({"optimizer.groups": [{"match": "("}]})


def test_which_checkpoints_are_due_and_which_stay(tiny):
    plan = tiny.with_overrides({"checkpointing.milestones": [7]})
    assert [step for step in range(61) if plan.saves(step)] == [7, 20, 40, 60]
    assert [step for step in range(1, 61) if plan.stays(step)] == [7, 20, 40, 60]
    last = plan.with_overrides({"checkpointing.keep": "last"})
    assert [step for step in range(1, 61) if last.stays(step)] == [7, 60]


def test_a_model_that_cannot_be_spread(tiny):
    from models.bilinear import Bilinear

    message = "scaling.strategy fsdp: Bilinear cannot be spread over workers; use single"
    with pytest.raises(ConfigError, match=message):
        tiny.with_overrides({"model": Bilinear(), "scaling.strategy": "fsdp"})
    assert tiny.with_overrides({"model": Bilinear()}).model == Bilinear()
