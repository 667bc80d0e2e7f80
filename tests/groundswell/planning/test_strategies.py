"""Memory and traffic against the published formulas."""

import pytest

from groundswell.experiment import Scaling
from groundswell.planning.strategies import Extra, Footprint, Sizes, candidates, label, memory, traffic

NOTHING = Footprint(0.0, 0.0, 0.0, 0.0)
NO_EXTRA = Extra("none")


def scaling(strategy: str, workers: int = 64, precision: str = "bf16", **fields) -> Scaling:
    return Scaling.from_dict({"strategy": strategy, "num_workers": workers, "precision": precision} | fields)


def sizes(total: float, trained: float | None = None) -> Sizes:
    total, trained = int(total), int(total if trained is None else trained)
    return Sizes(total, trained, total // 10, trained // 10, 0, 0)


def state(own: Scaling, of: Sizes) -> float:
    found = memory(own, of, NOTHING, NO_EXTRA, 0.0, 0.0)
    return (found.weights + found.gradients + found.optimizer) / 1e9


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_zero_states_of_the_paper(stage, gigabytes):
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs."""
    assert state(scaling("deepspeed", zero_stage=stage), sizes(7.5e9)) == pytest.approx(gigabytes, rel=0.005)


def test_states_of_the_others():
    """float32 weights, gradients and two moments: 16 bytes, a copy each or spread."""
    assert state(scaling("ddp"), sizes(1e9)) == pytest.approx(16)
    assert state(scaling("fsdp"), sizes(1e9)) == pytest.approx(16 / 64)
    assert state(Scaling(), sizes(1e9)) == pytest.approx(16)


def test_frozen_tensors_have_no_gradients_and_no_moments():
    assert state(scaling("ddp"), sizes(1e9, 1e8)) == pytest.approx(4 + 1.2)
    assert state(scaling("fsdp", 2), sizes(1e9, 0)) == pytest.approx(2)


def test_offload_moves_state_to_the_host():
    for own in (scaling("fsdp", offload="all"), scaling("deepspeed", zero_stage=3, offload="all")):
        found = memory(own, sizes(1e9), NOTHING, NO_EXTRA, 0.0, 0.0)
        assert (found.weights, found.gradients, found.optimizer) == (0, 0, 0)
        assert found.host >= 16e9 / 64
        assert found.communication > 0  # whole blocks come to the GPU all the same


@pytest.mark.parametrize(("own", "times"), [
    (scaling("ddp"), 2 * 2),  # float32 gradients
    (scaling("deepspeed", zero_stage=1), 2),
    (scaling("deepspeed", zero_stage=2), 2),
    (scaling("deepspeed", zero_stage=3), 3),
])  # fmt: skip
def test_traffic_of_the_paper(own, times):
    """arXiv 1910.02054, section 7: 2 and 3 times the parameters, here of two bytes each."""
    found = traffic(own, sizes(1e9), micro_steps=1, extra=NO_EXTRA, passes_backward=True)
    assert found.total == pytest.approx(times * 2e9 * 63 / 64)


def test_traffic_of_accumulation():
    """Copies send once a step, shards with every micro-batch."""

    def sent(own):
        return traffic(own, sizes(1e9), 4, NO_EXTRA, True).total / traffic(own, sizes(1e9), 1, NO_EXTRA, True).total

    assert sent(scaling("ddp")) == 1
    assert sent(scaling("deepspeed", zero_stage=2)) == (4 + 1) / 2
    assert sent(scaling("fsdp")) == 4


def test_frozen_passes_gather_more_and_reduce_less():
    frozen = traffic(scaling("fsdp"), sizes(1e9, 0), 1, Extra("references", forwards=2), True)
    assert frozen.total == pytest.approx(4 * 2e9 * 63 / 64)
    assert traffic(scaling("fsdp"), sizes(1e9, 0), 1, NO_EXTRA, False).total == pytest.approx(2e9 * 63 / 64)


def test_update_uses_what_activations_have_left():
    small = memory(Scaling(), sizes(1e9), Footprint(1e9, 1e9, 0, 0), NO_EXTRA, 0.0, 0.0)
    assert small.activations + small.workspace == 12e9
    large = memory(Scaling(), sizes(1e9), Footprint(2e10, 1e9, 0, 0), NO_EXTRA, 0.0, 0.0)
    assert large.activations + large.workspace == 2.1e10


def test_all_that_the_schema_allows(tiny):
    names = [label(own) for own in candidates(tiny, 4)]
    assert len(set(names)) == len(names) == 1 + 2 * (1 + 2 + 2 + 2 + 3)
    assert names[:3] == ["single", "ddp", "ddp, checkpointing"]
    assert "deepspeed 3, offload all, checkpointing" in names
