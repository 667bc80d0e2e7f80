"""A pack is its members, each as if alone."""

import pytest
import torch

from groundswell import AdamW, ConfigError
from groundswell.training.pack import Member, Pack

CPU = torch.device("cpu")
VARIANTS = [
    {"seed": 0},
    {
        "seed": 1,
        "task.seed": 1,
        "optimizer": AdamW(lr=1e-3, weight_decay=1.0, beta1=0.8, beta2=0.95, warmup_steps=9, clip_norm=0.3),
    },
    {"seed": 2, "task.seed": 2, "model.init_scale": 1.0, "optimizer.clip_norm": 0.0},
    {"seed": 3, "optimizer.lr": 1e-2},
]


def make(experiments):
    return Pack([Member.create(e, CPU) for e in experiments])


def losses(pack, steps):
    table = []
    for _ in range(steps):
        pack.train(1)
        table.append([m["train/loss"] for m in pack.read_metrics()])
    return torch.tensor(table, dtype=torch.float64).T


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_packed_equals_alone(tiny, precision, tolerance, dropout):
    """Different lr, decay, betas, warm-up, clip, init scale, seed and data in one program (30 steps)."""
    common = {"scaling.precision": precision, "model.dropout": dropout, "model.num_layers": 2}
    experiments = [tiny.with_overrides(common | variant) for variant in VARIANTS]
    together = losses(make(experiments), 30)
    for row, experiment in zip(together, experiments, strict=True):
        torch.testing.assert_close(row, losses(make([experiment]), 30)[0], rtol=0, atol=tolerance)


def test_pack_key_separates_shapes_only(tiny):
    assert len({tiny.with_overrides(variant).pack_key() for variant in VARIANTS}) == 1
    for change in (
        {"model.width": 32},
        {"task.modulus": 11},
        {"budget.batch_size": 16},
        {"evaluation.max_examples": 9},
    ):
        assert tiny.with_overrides(change).pack_key() != tiny.pack_key()


def test_survivors_go_on_unchanged_when_the_pack_shrinks(tiny):
    experiments = [tiny.with_overrides(variant) for variant in VARIANTS]
    whole, shrinking = make(experiments), make(experiments)
    whole.train(20)
    shrinking.train(10)
    shrinking = shrinking.subset([0, 2, 3])
    shrinking.train(10)
    for k, row in enumerate([0, 2, 3]):
        assert torch.equal(shrinking.parameters.flat[k], whole.parameters.flat[row])


def test_a_member_that_diverges_leaves_its_siblings_alone(tiny):
    experiments = [
        tiny,
        tiny.with_overrides({"seed": 1, "optimizer.lr": 1e18, "optimizer.clip_norm": 0.0}),
        tiny.with_overrides({"seed": 2}),
    ]
    sick, healthy = make(experiments), make([experiments[0], experiments[0], experiments[2]])
    sick.train(30)
    healthy.train(30)
    assert not torch.isfinite(sick.parameters.flat[1]).all()
    assert torch.equal(sick.parameters.flat[[0, 2]], healthy.parameters.flat[[0, 2]])


def test_state_round_trip_is_bit_exact(tiny):
    experiments = [tiny.with_overrides({**variant, "model.dropout": 0.1}) for variant in VARIANTS]
    through = make(experiments)
    through.train(12)
    saved = [(through.parameters.row(k), through.member_state(k)) for k in range(4)]
    saved = [
        ({n: t.clone() for n, t in weights.items()}, {n: t.clone() for n, t in state.items()})
        for weights, state in saved
    ]
    through.train(12)
    resumed = make([e.with_overrides({}) for e in experiments])
    resumed.train(3)  # anything but a fresh state
    for k, (weights, state) in enumerate(saved):
        resumed.load_member_state(k, weights, state)
    resumed.optimizer.set_step(12)
    resumed.train(12)
    assert torch.equal(resumed.parameters.flat, through.parameters.flat)


def test_evaluation_of_members_with_different_data(tiny):
    experiments = [tiny.with_overrides({"task.seed": seed, "seed": seed}) for seed in (0, 1, 0)]
    together = make(experiments).evaluate()
    for metrics, experiment in zip(together, experiments, strict=True):
        alone = make([experiment]).evaluate()[0]
        assert metrics == pytest.approx(alone, abs=1e-6)
        assert {"eval/train/accuracy", "eval/test/accuracy", "eval/test/answer_loss"} <= set(metrics)


def test_untrained_loss_is_that_of_a_uniform_guess(tiny):
    metrics = make([tiny.with_overrides({"model.init_scale": 0.01})]).evaluate()[0]
    size = tiny.task.vocab_size
    assert metrics["eval/test/answer_loss"] == pytest.approx(torch.tensor(float(size)).log().item(), abs=1e-3)


def test_cuda_without_a_gpu_is_one_clear_line(tiny):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    experiment = tiny.with_overrides({"scaling.device": "cuda"})
    with pytest.raises(ConfigError, match="scaling.device: no CUDA device here"):
        make([experiment])


def test_accumulated_micro_batches_equal_the_whole_batch(tiny):
    """Also where the pieces are uneven (32 = 4 x 7 + 4) and in a pack."""
    experiments = [tiny.with_overrides({"seed": seed, "scaling.precision": "float64"}) for seed in (0, 1)]
    whole = Pack([Member.create(e, CPU) for e in experiments])
    pieces = [e.with_overrides({"scaling.micro_batch": 7}) for e in experiments]
    accumulated = Pack([Member.create(e, CPU) for e in pieces])
    for pack in (whole, accumulated):
        pack.train(5)
    for mine, others in zip(accumulated.read_metrics(), whole.read_metrics(), strict=True):
        assert mine == pytest.approx(others, abs=1e-12)
    torch.testing.assert_close(accumulated.parameters.flat, whole.parameters.flat, rtol=1e-9, atol=1e-12)
