"""Where packs come from: Optuna's study on disk, asked and told."""

import pytest

from groundswell import ConfigError
from groundswell.search import ListedPacks, OptunaPacks, PackSearcher
from groundswell.sweep import Axis, Sweep, make_packs

METRIC = "eval/test/accuracy"


@pytest.fixture
def sweep(tiny):
    axes = {
        "optimizer.lr": Axis(low=1e-4, high=1e-1, log=True),
        "model.num_heads": Axis(values=(1, 2)),
        "optimizer.warmup_steps": Axis(low=1, high=50, integer=True),
        "seed": Axis(values=(0, 1)),
    }
    return Sweep("toy", tiny, axes, metric=METRIC)


@pytest.fixture
def source(sweep, tmp_path):
    """num_samples, group -> a new driver's view of the one study."""

    def make(num_samples=3, group=1, sweep=sweep):
        def pack(runs):
            return make_packs(runs, 1, False, 4)

        return OptunaPacks(sweep, tmp_path / "study.db", num_samples, pack, group, seed=0)

    return make


def finish(source, run, value, state="finished"):
    values = list(value) if isinstance(value, tuple) else [value]
    source.complete(run.run_id, {"state": state, "step": 60, "values": values})


def drain(source, value=lambda run: 0.5):
    runs = []
    while (pack := source.next_pack()) is not None:
        for run in pack:
            finish(source, run, value(run))
            runs.append(run)
    return runs


def test_each_setting_is_run_once_per_replicate_and_told_the_mean(source):
    packs = source()
    pack = packs.next_pack()
    assert [run.experiment.seed for run in pack] == [0, 1]
    assert pack[0].experiment.optimizer.lr == pack[1].experiment.optimizer.lr
    finish(packs, pack[0], 0.25)
    assert packs.study.trials[0].state.name == "RUNNING"  # the other replicate is still out
    finish(packs, pack[1], 0.75)
    assert (packs.study.trials[0].state.name, packs.study.trials[0].value) == ("COMPLETE", 0.5)
    assert len(drain(packs)) == 4
    assert packs.next_pack() is None


def test_integers_stay_integers_and_ranges_are_kept(source):
    for run in drain(source(num_samples=8)):
        assert isinstance(run.experiment.optimizer.warmup_steps, int)
        assert 1 <= run.experiment.optimizer.warmup_steps <= 50
        assert 1e-4 <= run.experiment.optimizer.lr <= 1e-1
        assert run.experiment.model.num_heads in (1, 2)


def test_a_lost_driver_forgets_nothing(source):
    first = source()
    out = [first.next_pack(), first.next_pack()]
    for run in out[0]:
        finish(first, run, 0.9)
    second = source()  # a new process: only the study on disk
    again = second.next_pack()
    assert [run.run_id for run in again] == [run.run_id for run in out[1]]
    for run in again:
        finish(second, run, 0.1)
    drain(second)
    assert [trial.state.name for trial in second.study.trials] == ["COMPLETE"] * 3
    assert second.study.trials[0].value == 0.9


def test_more_samples_go_on_from_what_is_known(source):
    before = {run.run_id for run in drain(source(num_samples=2))}
    more = {run.run_id for run in drain(source(num_samples=5))}
    assert len(before) == 4 and len(more) == 6
    assert not before & more
    assert drain(source(num_samples=5)) == []


def test_groups_fill_packs(source):
    packs = source(num_samples=4, group=2)
    sizes = []
    while (pack := packs.next_pack()) is not None:
        sizes.append(len(pack))
        for run in pack:
            finish(packs, run, 0.5)
    assert sum(sizes) == 8
    assert max(sizes) > 2  # settings of one shape share a pack


@pytest.mark.parametrize(("state", "value"), [("failed", None), ("diverged", None), ("finished", float("nan"))])
def test_settings_without_a_value_are_told_as_failures(source, state, value):
    packs = source(num_samples=1)
    pack = packs.next_pack()
    finish(packs, pack[0], 0.5)
    finish(packs, pack[1], value, state)
    assert packs.study.trials[0].state.name == "FAIL"


def test_several_objectives(tiny, source):
    """Two opposed ones: each value told is a mean over the replicates, and what none beats stays in the front."""
    axes = {"optimizer.lr": Axis(low=1e-4, high=1e-1, log=True), "seed": Axis(values=(0, 1))}
    sweep = Sweep("two", tiny, axes, metric=METRIC, also={"circuit/edges": "min"})
    packs = source(num_samples=12, group=2, sweep=sweep)
    told = drain(packs, lambda run: (run.experiment.optimizer.lr + run.experiment.seed, run.experiment.optimizer.lr))
    assert len(told) == 24
    assert [d.name for d in packs.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    for trial in packs.study.trials:
        lr = trial.params["optimizer.lr"]
        assert trial.values == pytest.approx([lr + 0.5, lr])
    assert len(packs.study.best_trials) == 12  # the larger, the better in one and the worse in the other
    assert source(num_samples=12, sweep=sweep).next_pack() is None  # a new driver goes on with the same study


def test_the_search_learns(sweep, tmp_path, tiny):
    """TPE on a known bowl ends nearer to its bottom than the first draws are."""
    one = Sweep("bowl", tiny, {"optimizer.lr": Axis(low=1e-4, high=1e-1, log=True)}, metric=METRIC)
    source = OptunaPacks(one, tmp_path / "bowl.db", 40, lambda runs: make_packs(runs, 1, False, 1), 1, seed=1)
    import math

    distances = []
    while (pack := source.next_pack()) is not None:
        distance = abs(math.log10(pack[0].experiment.optimizer.lr) + 2)
        distances.append(distance)
        finish(source, pack[0], -distance)
    assert sum(distances[-10:]) < 0.5 * sum(distances[:10])


def test_a_sweep_with_nothing_to_choose(tiny, tmp_path):
    sweep = Sweep("toy", tiny, {"seed": Axis(values=(0, 1))}, metric=METRIC)
    with pytest.raises(ConfigError, match="no axis besides its replicates"):
        OptunaPacks(sweep, tmp_path / "s.db", 2, lambda runs: [list(runs)], 1, seed=0)


def test_searcher_skips_packs_without_work(sweep, tiny):
    runs = sweep.runs({"optimizer.lr": 1e-3, "model.num_heads": 1, "optimizer.warmup_steps": 2})
    source = ListedPacks([[runs[0]], [runs[1]]])
    searcher = PackSearcher(source, lambda pack: None if pack[0] is runs[0] else {"runs": [pack[0].run_id]})
    assert searcher.suggest("t1") == {"runs": [runs[1].run_id]}
    assert searcher.suggest("t2") == PackSearcher.FINISHED
