"""Training against run folders: journal, checkpoints, early stops, and resume that is exact to the bit."""

import json
import logging
import math
import multiprocessing
import os
import signal
from typing import ClassVar

import pytest

from groundswell import Every, NeverReached, Reached
from groundswell.training import checkpoint
from groundswell.training.trainer import PackTrainer
from tasks.modular_arithmetic import ModularArithmetic
from tests.groundswell.run_results import assert_equal_runs, curves


def train(*folders, stop_after=None):
    """Run to the end, or leave (as a killed process does: no saving) once a run is at `stop_after`."""
    trainer = PackTrainer(folders)
    while not trainer.finished:
        for report in trainer.advance():
            if stop_after is not None and report["step"] >= stop_after:
                return trainer
    return trainer


def assert_nearly_equal_curves(packed, alone):
    """Float32 sums in another order: a packed run equals the run alone to rounding."""
    for (step, mine), (other_step, others) in zip(curves(packed), curves(alone), strict=True):
        assert step == other_step
        assert mine == pytest.approx(others, abs=1e-4)


def test_a_whole_run(tiny, make_run):
    folder = make_run(tiny)
    train(folder)
    status = folder.status()
    assert (status.state, status.step) == ("finished", 60)
    assert status.started_ms <= status.ended_ms
    steps = [line["step"] for line in folder.journal()]
    assert steps == [0, 10, 20, 30, 40, 50, 60]
    evaluated = [line["step"] for line in folder.journal() if "eval/test/accuracy" in line["metrics"]]
    assert evaluated == [0, 20, 40, 60]
    assert folder.checkpoint_steps() == [20, 40, 60]
    first, last = folder.journal()[1]["metrics"]["train/loss"], folder.journal()[-1]["metrics"]["train/loss"]
    assert last < first
    with_state = [
        step
        for step in folder.checkpoint_steps()
        if (folder.checkpoint_folder(step) / checkpoint.TRAINING_STATE).exists()
    ]
    assert with_state == [40, 60]  # older ones keep their weights only


@pytest.mark.parametrize("stop_after", [10, 30, 40, 50])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_killed_and_resumed_equals_undisturbed(tiny, make_run, stop_after, dropout):
    tiny = tiny.with_overrides({"model.dropout": dropout})
    whole, killed = make_run(tiny, "whole"), make_run(tiny, "killed")
    train(whole)
    train(killed, stop_after=stop_after)
    assert not killed.status().is_final
    train(killed)
    assert_equal_runs(whole, killed)


def test_killed_pack_equals_undisturbed_pack(tiny, make_run):
    axes = [{"seed": seed, "task.seed": seed, "optimizer.lr": 1e-3 * (seed + 1)} for seed in range(3)]
    whole = [make_run(tiny, "whole", **a) for a in axes]
    killed = [make_run(tiny, "killed", **a) for a in axes]
    train(*whole)
    train(*killed, stop_after=30)
    train(*killed, stop_after=50)
    train(*killed)
    for one, other in zip(whole, killed, strict=True):
        assert_equal_runs(one, other)


def test_truncated_checkpoint_falls_back_with_a_warning(tiny, make_run, caplog):
    whole, damaged = make_run(tiny, "whole"), make_run(tiny, "damaged")
    train(whole)
    train(damaged, stop_after=50)
    file = damaged.checkpoint_folder(40) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        resumed = PackTrainer([damaged])
    assert resumed.pack.step_count == 20
    assert "step-00000040 is damaged" in caplog.text
    train(damaged)
    assert_equal_runs(whole, damaged)


@pytest.mark.parametrize("victim", ["training_state.safetensors", "state.json", "config.json"])
def test_any_damaged_file_is_noticed(tiny, make_run, victim):
    folder = make_run(tiny)
    train(folder, stop_after=50)
    path = folder.checkpoint_folder(40) / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    assert checkpoint.resumable_steps(folder.checkpoints, tiny) == [20]


def test_killed_during_a_checkpoint_write_uses_the_previous_one(tiny, make_run):
    """A process that is killed (-9) with half of step 40's training state written: step 20 is still whole."""
    whole, killed = make_run(tiny, "whole"), make_run(tiny, "killed")
    train(whole)

    def train_and_die():
        save_file = checkpoint.save_file

        def dies(tensors, path):
            save_file(tensors, path)
            if "step-00000040" in str(path):
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save_file = dies
        train(killed)

    process = multiprocessing.get_context("fork").Process(target=train_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert killed.checkpoint_steps() == [20]
    (left,) = killed.checkpoints.glob(".step-00000040.tmp-*")
    train(killed)
    assert not left.exists()
    assert_equal_runs(whole, killed)


def test_early_stop_of_one_member(tiny, make_run):
    """The easy member reaches the value and leaves; the other goes on as if it were alone from then on."""
    rule = Reached(metric="eval/train/accuracy", value=0.9, evaluations=2)
    base = tiny.with_overrides({"budget.steps": 400, "evaluation.stop": [rule.to_dict()], "optimizer.lr": 1e-2})
    quick, slow = make_run(base, seed=0), make_run(base, seed=1, **{"optimizer.lr": 1e-5})
    train(quick, slow)
    assert quick.status().state == "stopped"
    assert "eval/train/accuracy reached 0.9 in 2 evaluations" in quick.status().reason
    last_two = [
        line["metrics"]["eval/train/accuracy"] for line in quick.journal() if "eval/train/accuracy" in line["metrics"]
    ][-2:]
    assert min(last_two) >= 0.9
    assert quick.checkpoint_step() == quick.status().step < 400
    assert (slow.status().state, slow.status().step) == ("finished", 400)


def test_never_reached(tiny, make_run):
    rule = NeverReached(metric="eval/train/accuracy", value=0.99, by_step=40)
    folder = make_run(tiny.with_overrides({"evaluation.stop": [rule.to_dict()], "optimizer.lr": 1e-6}))
    train(folder)
    assert (folder.status().state, folder.status().step) == ("stopped", 40)


def test_divergence_is_recorded_and_spares_the_sibling(tiny, make_run):
    sick = make_run(tiny, seed=1, **{"optimizer.lr": 1e20, "optimizer.clip_norm": 0.0})
    healthy, alone = make_run(tiny, seed=0), make_run(tiny, "alone", seed=0)
    train(sick, healthy)
    assert sick.status().state == "diverged"
    assert "not finite" in sick.status().reason
    assert all(math.isfinite(v) for line in sick.journal() for v in line["metrics"].values())
    assert healthy.status().state == "finished"
    train(alone)
    assert_nearly_equal_curves(healthy, alone)


def test_prune_keeps_state(tiny, make_run):
    folder = make_run(tiny)
    trainer = train(folder, stop_after=30)
    trainer.prune({folder.run_id}, "behind its rivals")
    assert (folder.status().state, folder.status().step) == ("pruned", 30)
    assert folder.checkpoint_step() == 30
    assert trainer.finished


def test_save_all_then_resume_from_between_schedules(tiny, make_run):
    whole, stopped = make_run(tiny, "whole"), make_run(tiny, "stopped")
    train(whole)
    train(stopped, stop_after=30).save_all()
    assert stopped.checkpoint_steps() == [20, 30]
    assert PackTrainer([stopped]).pack.step_count == 30
    train(stopped)
    assert stopped.checkpoint_steps() == [20, 40, 60]  # the unscheduled one has gone
    assert_equal_runs(whole, stopped)


def test_left_before_the_first_step(tiny, make_run):
    """Nothing is saved, so that the untrained model is still evaluated by who goes on."""
    whole, left = make_run(tiny), make_run(tiny, sweep="left")
    PackTrainer([left]).save_all()
    assert left.checkpoint_steps() == []
    train(left)
    train(whole)
    assert_equal_runs(left, whole)


def test_clock_checkpoints(tiny, make_run):
    folder = make_run(tiny.with_overrides({"checkpointing.every_s": 1e-9}))
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    assert folder.checkpoint_steps()[-1] == 60
    state = json.loads((folder.checkpoint_folder(60) / "state.json").read_text())
    assert state["step"] == 60


def test_keep_last_with_milestones_and_the_best(tiny, make_run):
    fields = {"checkpointing.schedule": Every(every=10), "checkpointing.keep": "last", "checkpointing.milestones": [25]}
    folder = make_run(tiny.with_overrides(fields | {"evaluation.schedule": Every(every=10)}), "worst")
    train(folder)
    assert folder.checkpoint_steps() == [25, 50, 60]
    losses = {line["step"]: line["metrics"].get("eval/train/answer_loss") for line in folder.journal()}
    worst = max((step for step in losses if step % 10 == 0 and step), key=lambda step: losses[step] or 0.0)
    best = {"checkpointing.best_metric": "eval/train/answer_loss", "checkpointing.best_mode": "max"}
    folder = make_run(tiny.with_overrides(fields | best | {"evaluation.schedule": Every(every=10)}), "best")
    train(folder)
    assert folder.checkpoint_steps() == sorted({25, 50, 60, worst})


def test_keep_last(tiny, make_run):
    folder = make_run(tiny.with_overrides({"checkpointing.keep": "last"}))
    train(folder)
    assert folder.checkpoint_steps() == [40, 60]


class NoDataForSeedOne(ModularArithmetic):
    packable: ClassVar[frozenset[str]] = frozenset({"seed"})

    def build(self):
        if self.seed == 1:
            raise RuntimeError("no data\n(for this seed)")
        return super().build()


def test_a_run_that_cannot_start_fails_alone(tiny, make_run):
    broken = tiny.with_overrides({"task": NoDataForSeedOne(modulus=13, train_fraction=0.6)})
    folders = [make_run(broken, "pack", **{"task.seed": seed}) for seed in (0, 1, 2)]
    trainer = PackTrainer(folders)
    first = {report["run_id"]: report["state"] for report in trainer.advance()}
    assert first == {folders[0].run_id: "running", folders[1].run_id: "failed", folders[2].run_id: "running"}
    while not trainer.finished:
        trainer.advance()
    assert [folder.status().state for folder in folders] == ["finished", "failed", "finished"]
    assert folders[1].status().error == "RuntimeError: no data"
    assert "(for this seed)" in (folders[1].path / "error.txt").read_text()
    assert "Traceback" in (folders[1].path / "error.txt").read_text()
    alone = make_run(broken, "alone", **{"task.seed": 2})
    train(alone)
    assert_nearly_equal_curves(folders[2], alone)


def test_a_pack_in_which_no_run_can_start(tiny, make_run):
    broken = tiny.with_overrides({"task": NoDataForSeedOne(modulus=13, train_fraction=0.6), "task.seed": 1})
    trainer = PackTrainer([make_run(broken)])
    assert trainer.finished
    assert [report["state"] for report in trainer.advance()] == ["failed"]
