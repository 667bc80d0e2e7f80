"""Edge masks trained by the engine: packs with targets of their own, resume to the bit, the command line."""

import pytest

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.experiment import ParameterGroup
from groundswell.training.trainer import PackTrainer
from models.edge_masked import EdgeMasked
from models.edge_masks import load_edges
from models.edge_objective import EdgePruning
from tests.groundswell.run_results import assert_equal_runs, curves, final_weights
from tests.models.edge_golden import gpt2_graph, write_network
from tests.models.edge_pairs import RandomPairs


@pytest.fixture(params=["reference", "fast"])
def pruning(request, tmp_path) -> Experiment:
    """Milliseconds a step."""
    return Experiment(
        task=RandomPairs(),
        model=EdgeMasked(path=str(write_network("gpt2", tmp_path / "network")), form=request.param, init_log_alpha=3.0),
        objective=EdgePruning(target=0.9, warmup_steps=12),
        optimizer=AdamW(
            lr=0.8, weight_decay=0.01, warmup_steps=2, schedule="linear",
            groups=(ParameterGroup(match="multipliers", ascent=True),),
        ),
        budget=Budget(steps=16, batch_size=4),
        metrics_every=4,
        evaluation=Evaluation(schedule=Every(every=4)),
        checkpointing=Checkpointing(schedule=Every(every=4)),
    )  # fmt: skip


def train(*folders, stop_after=None):
    """Run to the end, or leave without saving once a run is at `stop_after`."""
    trainer = PackTrainer(folders)
    while not trainer.finished:
        for report in trainer.advance():
            if stop_after is not None and report["step"] >= stop_after:
                return
    return


def test_a_whole_run(pruning, make_run):
    folder = make_run(pruning)
    train(folder)
    assert folder.status().state == "finished"
    readings = {line["step"]: line["metrics"] for line in folder.journal()}
    assert sorted(readings) == [0, 4, 8, 12, 16]
    names = {"kl", "edge_loss", "edge_sparsity", "node_sparsity", "target", "lambda_1", "lambda_2", "loss"}
    assert {f"train/{name}" for name in names} <= set(readings[4])
    assert {f"eval/test/{name}" for name in ("kl", "accuracy", "exact_match", "edge_sparsity")} <= set(readings[16])
    # the mean target of updates 0..3, 4..7, 8..11, 12..15
    targets = [readings[step]["train/target"] for step in (4, 8, 12, 16)]
    assert targets == pytest.approx([0.9 * mean / 12 for mean in (1.5, 5.5, 9.5)] + [0.9], abs=1e-5)
    assert readings[16]["train/edge_sparsity"] > readings[4]["train/edge_sparsity"]
    assert readings[16]["train/lambda_2"] > 0  # multipliers climb
    listed = load_edges(folder.checkpoint_folder(16) / "edges.json", gpt2_graph("emb"))
    assert 0 < listed.num_edges <= listed.graph.num_edges


@pytest.mark.parametrize("stop_after", [4, 12])
def test_killed_and_resumed_equals_undisturbed(pruning, make_run, stop_after):
    whole, killed = make_run(pruning, "whole"), make_run(pruning, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    assert not killed.status().is_final
    train(killed)
    assert_equal_runs(whole, killed)


AXES = [
    {"seed": 0, "objective.target": 0.5, "optimizer.lr": 0.8},
    {"seed": 0, "objective.target": 1.1, "optimizer.lr": 0.8, "objective.start": 0.1},
    {"seed": 3, "objective.target": 0.5, "optimizer.lr": 0.4, "objective.warmup_steps": 6},
]


def test_packed_runs_equal_runs_alone(pruning, make_run):
    assert len({pruning.with_overrides(axes).pack_key() for axes in AXES}) == 1
    packed = [make_run(pruning, "packed", **axes) for axes in AXES]
    train(*packed)
    for axes, mine in zip(AXES, packed, strict=True):
        alone = make_run(pruning, "alone", **axes)
        train(alone)
        for (step, found), (_, expected) in zip(curves(mine), curves(alone), strict=True):
            assert found.get("train/target") == pytest.approx(expected.get("train/target"))
            if step <= 8:  # later AdamW has made much of rounding
                assert found == pytest.approx(expected, abs=2e-3), step


def test_a_killed_pack_equals_an_undisturbed_one(pruning, make_run):
    whole = [make_run(pruning, "whole", **axes) for axes in AXES]
    killed = [make_run(pruning, "killed", **axes) for axes in AXES]
    train(*whole)
    train(*killed, stop_after=4)
    train(*killed, stop_after=12)
    train(*killed)
    for one, other in zip(whole, killed, strict=True):
        assert_equal_runs(one, other)


def test_runs_that_stay_have_their_own_targets(pruning, make_run):
    """A member that ends takes neither its target nor its noise from the others."""
    whole = [make_run(pruning, "whole", **axes) for axes in AXES]
    cut = [make_run(pruning, "cut", **axes) for axes in AXES]
    train(*whole)
    trainer = PackTrainer(cut)
    while not trainer.finished:
        for report in trainer.advance():
            if report["step"] == 8:
                trainer.prune({cut[0].run_id}, "worse than the others")
    assert cut[0].status().state == "pruned"
    assert curves(whole[1])[-1][1]["train/target"] == curves(cut[1])[-1][1]["train/target"]
    for one, other in zip(whole[1:], cut[1:], strict=True):
        for name, tensor in final_weights(one).items():
            assert (tensor - final_weights(other)[name]).abs().max() < 0.05


def test_micro_batches_sample_masks_of_their_own(pruning, make_run):
    folder = make_run(pruning.with_overrides({"scaling.micro_batch": 2}))
    train(folder)
    last = folder.journal()[-1]["metrics"]
    assert folder.status().state == "finished"
    assert last["train/loss"] == pytest.approx(last["train/kl"] + last["train/edge_loss"], abs=1e-4)
