"""Finding what an earlier sweep has trained."""

import pytest

from groundswell.config import ConfigError
from groundswell.trained import trained_networks, trained_run


def test_the_finished_run_that_ended_last(tiny, make_run):
    runs = [make_run(tiny, "sweep", **{"seed": 1, "optimizer.lr": lr}) for lr in (1e-3, 2e-3, 3e-3)]
    for ended, (run, state) in enumerate(zip(runs, ("finished", "finished", "failed"), strict=True)):
        run.update_status(state=state, ended_ms=ended)
        run.checkpoint_folder(20).mkdir(parents=True)
        run.checkpoint_folder(60).mkdir()
    sweep = runs[0].path.parents[1]
    assert trained_run(sweep, "make it").run_id == runs[1].run_id
    assert trained_run(sweep, "make it", **{"optimizer.lr": 1e-3}).run_id == runs[0].run_id
    newest = {lr: str(run.checkpoint_folder(60)) for lr, run in zip((1e-3, 2e-3), runs, strict=False)}
    assert trained_networks(sweep, "make it", "optimizer.lr") == newest  # the failed one is none


def test_without_one_the_command_is_named(tmp_path):
    with pytest.raises(ConfigError, match="sweep: no finished run with task=ioi; train it first: python it"):
        trained_run(tmp_path / "sweep", "python it", task="ioi")
    with pytest.raises(ConfigError, match="sweep: no finished run; train it first: python it"):
        trained_networks(tmp_path / "sweep", "python it", "task")
