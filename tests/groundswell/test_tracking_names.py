import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_sweeps import sample_experiment

from groundswell.tracking import artifact_root, default_uri
from groundswell.tracking.location import absolute_uri, local_path
from groundswell.tracking.names import flatten, key_name, model_name, param_value, tag_value
from groundswell.tracking.provenance import environment, git_state
from groundswell.tracking.run_sync import _batches, _covering_names


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_becomes_a_name_that_mlflow_takes(text):
    from mlflow.utils.validation import _validate_metric_name

    name = key_name(text)
    _validate_metric_name(name)
    assert 0 < len(name) <= 250
    assert key_name(name) == name


@pytest.mark.parametrize(
    "name", ["train/loss", "eval/test_inferred_iid/accuracy", "model.num_layers", "perf/steps_per_s"]
)
def test_ordinary_names_stay(name):
    assert key_name(name) == name


def test_values_and_model_names_fit():
    assert param_value("x" * 7_000) == "x" * 5_997 + "..."
    assert len(tag_value(["x" * 9_000])) == 8_000
    assert (param_value(None), param_value(True), param_value(1e-4), param_value("a")) == (
        "null",
        "true",
        "0.0001",
        "a",
    )
    assert model_name("lr=0.1 a/b") == "lr=0_1 a_b"


def test_params_equal_the_experiments_own():
    experiment = sample_experiment()
    assert flatten(experiment.to_dict()) == experiment.flatten()


def test_store_is_absolute_and_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri("results") == f"sqlite:///{tmp_path}/results/mlflow.db"
    assert artifact_root(default_uri("results"), "results") == f"file://{tmp_path}/results/artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert default_uri("results") == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_uri("results") == "http://127.0.0.1:5000"
    assert artifact_root("http://127.0.0.1:5000", "results") is None
    assert artifact_root("postgresql://host/db", "results") == f"file://{tmp_path}/results/artifacts"
    assert absolute_uri("mlruns") == f"file://{tmp_path}/mlruns"
    assert local_path(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert local_path("s3://bucket/a") is None


def test_batches_end_with_a_line_and_hold_at_most_800():
    lines = [{"step": s, "time_ms": 0, "metrics": {f"m{i}": 1.0 for i in range(300)}} for s in range(1, 6)]
    batches = list(_batches(lines))
    assert [(len(readings), step) for readings, step in batches] == [(600, 2), (600, 4), (300, 5)]
    wide = [
        {"step": 1, "time_ms": 0, "metrics": {"a": 1.0}},
        {"step": 2, "time_ms": 0, "metrics": dict.fromkeys(map(str, range(1700)), 0)},
    ]
    assert [(len(readings), step) for readings, step in _batches(wide)] == [(1, 1), (800, 1), (800, 1), (100, 2)]


def test_covering_names_touch_every_line():
    lines = [{"metrics": {"a": 1.0, "b": 1.0}}, {"metrics": {"b": 1.0}}, {"metrics": {"c": 1.0}}, {"metrics": {}}]
    assert _covering_names(lines) == {"b", "c"}


def test_git_state_of_a_changed_repository(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True)

    assert git_state(tmp_path).commit is None
    git("init", "-q", "-b", "trunk")
    assert git_state(tmp_path).branch == "trunk"
    (tmp_path / "a.py").write_text("one\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert (len(clean.commit), clean.branch, clean.dirty, clean.patch) == (40, "trunk", False, b"")
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "new.py").write_text("")
    changed = git_state(tmp_path)
    assert (changed.dirty, changed.untracked) == (True, ("new.py",))
    assert b"+two" in changed.patch


def test_environment_names_packages_and_machine():
    values = environment()
    assert values["packages"]["mlflow"] and values["num_cpus"] > 0 and Path(values["executable"]).exists()
