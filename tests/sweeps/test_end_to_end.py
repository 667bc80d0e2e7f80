"""Sweeps from the command line's arguments to the report, on a real cluster that was there before them."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import assert_tracked_once, database, mlflow_runs, tables
from small_sweep import PRESETS, build

from groundswell import cli, commands, probes
from groundswell.rundir import SweepFolder
from tasks.folder import write_folder
from tasks.modular_arithmetic import ModularArithmetic

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TWO_RATES = ("--axis", "optimizer.lr=1e-3,1e-2")


@pytest.fixture
def sweep(cluster, tmp_path, monkeypatch, capsys):
    """arguments -> exit code and what was printed; in this process, results below tmp_path/results."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def start(*arguments, results="results"):
        output = tmp_path / results
        code = cli.run(
            build, PRESETS, "quick", ["--preset", "quick", "--address", cluster, "--output", str(output), *arguments]
        )
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return start


def only_sweep(tmp_path, results="results"):
    (folder,) = [path for path in (tmp_path / results).iterdir() if (path / "runs").is_dir()]
    return SweepFolder(folder)


def runs_table(tmp_path):
    return pd.read_csv(only_sweep(tmp_path).path / "tables" / "runs.csv")


def trained(folder):
    """run id -> when its journal was last written, of the runs that have one."""
    return {run.run_id: run.journal_path.stat().st_mtime_ns for run in folder.runs() if run.journal_path.exists()}


def curves_by_name(folder):
    runs, history = tables(folder)
    return history.merge(runs[["run_id", "name"]]).sort_values(["name", "step"]).reset_index(drop=True)


@pytest.mark.slow
def test_packed_sweep_equals_one_by_one(sweep, tmp_path, undisturbed):
    """Same curves, whatever a run was packed with; the diverging ones leave their pack."""
    code, printed = sweep("--pack", "6")
    assert code == 0
    assert printed.count("diverged lr=1e+20") == 2
    folder = only_sweep(tmp_path)
    assert_tracked_once(folder)
    packed, alone = (curves_by_name(each) for each in (folder, undisturbed))
    assert len(packed.groupby("name")) == 6
    losses = [column for column in alone if column.endswith("loss")]
    accuracies = [column for column in alone if column.endswith("accuracy")]
    assert losses and accuracies
    pd.testing.assert_frame_equal(packed[["name", "step"]], alone[["name", "step"]])
    pd.testing.assert_frame_equal(packed[losses], alone[losses], rtol=1e-3)
    pd.testing.assert_frame_equal(packed[accuracies], alone[accuracies], rtol=0, atol=0.03)  # one example flips


@pytest.mark.slow
def test_asha_stops_members_of_a_pack(sweep, tmp_path):
    """Runs that are behind end early with their state kept; a second start trains nothing and stops nobody else."""
    arguments = ("--scheduler", "asha", "--pack", "6", "--axis", "optimizer.lr=1e-5,1e-3,1e-2")
    code, _ = sweep(*arguments)
    assert code == 0
    folder = only_sweep(tmp_path)
    assert folder.name == "small-quick-asha"
    states = {run.run_id: run.status() for run in folder.runs()}
    pruned = {run_id for run_id, status in states.items() if status.state == "pruned"}
    assert pruned and len(pruned) < len(states) == 6
    for run_id in pruned:
        assert states[run_id].step < 120
        assert states[run_id].reason.startswith("behind its rivals at step ")
        assert folder.run(run_id).checkpoint_step() == states[run_id].step
    assert {status.state for run_id, status in states.items() if run_id not in pruned} == {"finished"}
    before = trained(folder)
    code, printed = sweep(*arguments)
    assert code == 0
    assert "starting Ray" not in printed
    assert trained(folder) == before
    assert_tracked_once(folder)


@pytest.mark.slow
def test_random_search_goes_on_with_more_samples(sweep, tmp_path):
    """Three settings, then five: the first three are among them and are not trained again."""
    assert sweep("--search", "random", "--num-samples", "1")[0] == 0
    folder = only_sweep(tmp_path)
    before = trained(folder)
    assert len(before) == 2  # one setting, two seeds
    assert sweep("--search", "random", "--num-samples", "3")[0] == 0
    after = trained(folder)
    assert len(after) == 6
    assert {run_id: after[run_id] for run_id in before} == before
    rates = runs_table(tmp_path)["optimizer.lr"]
    assert rates.nunique() == 3
    assert rates.between(1e-4, 1e-1).all()


@pytest.mark.slow
def test_broken_run_in_a_pack(sweep, tmp_path):
    """The broken one is recorded with its error; its pack goes on; the exit code tells; the next start tries again."""
    arguments = ("--pack", "6", "--axis", "seed=0,1,2", *TWO_RATES, "--task.broken-seed", "1")
    code, printed = sweep(*arguments)
    assert code == 1
    folder = only_sweep(tmp_path)
    by_seed = {run.description()["axes"]["seed"]: run.status() for run in folder.runs()}
    assert {seed: status.state for seed, status in by_seed.items()} == {0: "finished", 1: "failed", 2: "finished"}
    assert by_seed[1].error == "RuntimeError: no data for seed 1"
    assert printed.count("failed lr=") == 2  # in the summary
    assert "no data for seed 1" in printed
    assert "Traceback" not in printed
    before = trained(folder)
    assert sweep(*arguments)[0] == 1
    assert trained(folder) == before
    assert_tracked_once(folder)
    assert sorted(runs_table(tmp_path)["state"]) == ["failed"] * 2 + ["finished"] * 4


@pytest.mark.slow
def test_median_stopping(sweep, tmp_path):
    """Judges by the mean so far: never stops all, and the sweep ends."""
    code, _ = sweep("--scheduler", "median", "--axis", "optimizer.lr=1e-5,1e-3,1e-2")
    assert code == 0
    states = runs_table(tmp_path)["state"]
    assert set(states) <= {"finished", "pruned"} and "finished" in set(states)


@pytest.mark.slow
def test_data_folder_in_the_original_format(sweep, tmp_path):
    """A task is replaced by a folder of files, named from where the user is."""
    world = ModularArithmetic(modulus=13, train_fraction=0.6)
    write_folder(world.build(), tmp_path / "data")
    code, printed = sweep(
        "--task.class",
        "tasks.folder.Folder",
        "--task.path",
        os.path.relpath(tmp_path / "data"),
        "--pack",
        "2",
        *TWO_RATES,
    )
    assert code == 0, printed
    table = runs_table(tmp_path)
    assert list(table["state"]) == ["finished"] * 4
    experiment = only_sweep(tmp_path).runs()[0].experiment_dict()
    assert experiment["task"]["class"] == "tasks.folder.Folder"


@pytest.fixture(scope="module")
def smoke(cluster, tmp_path_factory):
    """The real sweep file, as a user starts it."""
    output = tmp_path_factory.mktemp("smoke") / "results"
    command = [sys.executable, str(ROOT / "sweeps" / "grok_wd_layers.py"), "--preset", "smoke"]
    command += ["--output", str(output), "--address", cluster]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return SweepFolder(output / "grok_wd_layers-smoke"), result.stdout


def test_the_grokking_sweep(smoke):
    """Table, figure, tracked artifacts."""
    folder, printed = smoke
    assert "Grokking: when train and held-out accuracy rise" in printed
    assert "0/4 runs done" in printed
    summary = pd.read_csv(folder.path / "tables" / "summary.csv")
    assert len(summary) == 4  # two depths, two weight decays
    assert list(summary.columns[:4]) == ["num_layers", "weight_decay", "runs", "step of 90% train"]
    assert pd.read_parquet(folder.path / "tables" / "runs.parquet")["state"].eq("finished").all()
    picture = (folder.path / "figures" / "grokking.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    tracked = mlflow_runs(folder)
    assert len(tracked) == 5 and set(tracked.status) == {"FINISHED"}
    artifacts = {path.name for path in folder.path.parent.glob("artifacts/**/*") if path.is_file()}
    assert {"grokking.png", "summary.csv", "summary.parquet", "runs.parquet"} <= artifacts
    assert_tracked_once(folder)
    with sqlite3.connect(database(folder)) as connection:
        query = "select value from experiment_tags where key = 'mlflow.sharedViewState.groundswell'"
        view = json.loads(connection.execute(query).fetchone()[0])
    assert "params.`model.num_layers`" in view["selectedColumns"]
    assert "metrics.`eval/test_inferred_ood/accuracy`" in view["selectedColumns"]


def test_looking_at_runs(smoke, capsys):
    folder, _ = smoke
    output = folder.path.parent
    assert commands.main(["runs", "--output", str(output), "--state", "finished", "stopped"]) == 0
    assert commands.main(["runs", "--output", str(output), "--filter", "weight_decay > 0.5"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 runs: 2 finished" in printed
    run = folder.runs()[0]
    assert commands.main(["show", run.run_id[:6], "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "tasks.composition.Composition" in printed and "step-00000150" in printed


@pytest.mark.slow
def test_the_reversal_sweep(cluster, tmp_path, capsys):
    """Four tasks, probes of their checkpoints, figures; the second start trains and asks nothing."""
    from sweeps.reversal_curse import STUDIES
    from sweeps.reversal_curse import build as build_reversal

    arguments = ["--preset", "smoke", "--address", cluster, "--output", str(tmp_path)]
    presets = {preset: study[0] for preset, study in STUDIES.items()}
    assert cli.run(build_reversal, presets, "demo", arguments) == 0
    folder = SweepFolder(tmp_path / "reversal_curse-smoke")
    printed = capsys.readouterr().out
    assert "Reversal and chains" in printed
    summary = pd.read_csv(folder.path / "tables" / "summary.csv")
    assert list(summary["task"]) == ["reverse", "reverse_icl", "chain", "chain_related"]
    names = {path.name for path in (folder.path / "figures").glob("*.png")}
    assert {"word_nll.png", "logits_reverse.png", "logits_chain.png", "cos_sim_reverse.png"} <= names
    answered = {path.parent.name for path in folder.path.glob("runs/*/probes/step-*/*/probe.json")}
    assert answered == {"logit_heat_maps", "embedding_similarity"}
    assert_tracked_once(folder)
    artifacts = {path.name for path in tmp_path.glob("artifacts/**/*") if path.is_file()}
    assert {"val_unseen.npy", "val_x1z.npy", "cos_sim.npy", "logits.png", "word_nll.png"} <= artifacts
    with sqlite3.connect(database(folder)) as connection:
        query = "select distinct key from metrics where key like 'heat_map/%' or key like 'embedding/%'"
        keys = {key for (key,) in connection.execute(query)}
    assert {"heat_map/asymmetry", "heat_map/intransitivity", "embedding/mean_abs_cosine"} <= keys
    assert cli.run(build_reversal, presets, "demo", arguments) == 0
    assert "starting Ray" not in capsys.readouterr().out
    assert commands.main(["show", "task=reverse seed=0", "--output", str(tmp_path)]) == 0
    assert "heat_map/val_seen/row_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_circuits_sweep(cluster, tmp_path, capsys):
    """Every checkpoint is read and traced, also of shared weights, and can then be evaluated and scored as text."""
    from sweeps.grok_circuits import SIZES
    from sweeps.grok_circuits import build as build_circuits

    arguments = ["--preset", "smoke", "--address", cluster, "--output", str(tmp_path)]
    assert cli.run(build_circuits, {preset: size[0] for preset, size in SIZES.items()}, "demo", arguments) == 0
    folder = SweepFolder(tmp_path / "grok_circuits-smoke")
    summary = pd.read_csv(folder.path / "tables" / "summary.csv")
    assert list(summary["task"]) == ["composition"] * 2 + ["comparison"] * 2
    assert list(summary["weights"]) == ["own", "shared"] * 2
    assert (folder.path / "figures" / "circuits.png").exists()
    for run in folder.runs():
        asked = {(step, name) for step, name in probes.answers(run)}
        assert asked == {(s, name) for s in run.checkpoint_steps() for name in ("logit_lens", "causal_tracing")}
        assert set(probes.answers_over_time(run)) == {"logit_lens", "causal_tracing"}
    assert_tracked_once(folder)
    where = ["--sweep", folder.name, "--output", str(tmp_path), "--address", cluster]
    assert commands.main(["evaluate", *where, "--steps", "last", "--items"]) == 0
    capsys.readouterr()
    assert commands.main(["score", str(folder.path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(folder.runs())


def test_dry_run_makes_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "sweeps" / "grok_wd_layers.py"), "--preset", "smoke", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "4 runs in 4 packs on" in result.stdout
    assert "num_layers=2 weight_decay=0.1 seed=0" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_experiments_of_a_sweep_are_on_disk(smoke):
    """What a run was is read back from its own folder."""
    folder, _ = smoke
    description = json.loads((folder.path / "sweep.json").read_text())
    assert description["axes"]["model.num_layers"]["values"] == [1, 2]
    for run in folder.runs():
        experiment = run.experiment()
        assert experiment.run_id == run.run_id
        assert experiment.get("model.num_layers") == run.description()["axes"]["model.num_layers"]
