"""What is decided before Ray starts: workers, search path, environment, and addresses that cannot be right."""

import json
import os
import time
from pathlib import Path

import pytest

from groundswell import cluster
from groundswell.cluster import Resources
from groundswell.config import ConfigError


@pytest.mark.parametrize(
    ("resources", "threads", "on_gpu", "workers"),
    [
        (Resources(8, 0), 1, False, 8),
        (Resources(8, 0), 3, False, 2),
        (Resources(2, 0), 4, False, 1),  # never none
        (Resources(16, 4), 1, True, 4),
        (Resources(16, 4), 2, False, 8),
    ],
)
def test_workers(resources, threads, on_gpu, workers):
    assert resources.workers(threads, on_gpu) == workers


def test_local_resources_are_those_of_this_process():
    assert cluster.local_resources().num_cpus == len(os.sched_getaffinity(0))


def test_workers_find_what_the_driver_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    paths = cluster.python_path().split(os.pathsep)
    assert paths[-1] == "/mine"
    assert os.path.isdir(os.path.join(paths[0], "groundswell"))
    assert os.path.isdir(os.path.join(paths[1], "tasks"))


def test_workers_of_a_job_look_in_their_own_copy(monkeypatch, tmp_path):
    """Each node unpacks the project in a folder of its own."""
    root = Path(cluster.__file__).resolve().parents[2]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(root)
    assert cluster.python_path() == f"{root / 'platform'}:{root}"
    monkeypatch.setenv(cluster.JOB_CONFIG, "{}")
    assert cluster.python_path() == "platform:."
    monkeypatch.chdir(tmp_path)  # a job that did not bring the project: it is installed on the nodes
    assert cluster.python_path() == f"{root / 'platform'}:{root}"


def test_a_job_says_some_things_itself(monkeypatch):
    """Ray refuses a variable that is set by both, the job and its driver."""
    assert cluster.job_variables() == {}
    assert {"PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"} <= cluster.worker_variables().keys()
    config = {"runtime_env": {"env_vars": {"PYTHONPATH": "platform:.", "HF_HUB_OFFLINE": "0"}}}
    monkeypatch.setenv(cluster.JOB_CONFIG, json.dumps(config))
    variables = cluster.worker_variables()
    assert "OMP_NUM_THREADS" in variables
    assert not {"PYTHONPATH", "HF_HUB_OFFLINE"} & variables.keys()


def test_patience_has_an_end():
    assert cluster.within(10, lambda: 3) == 3
    with pytest.raises(KeyError, match="mine"):
        cluster.within(10, lambda: {}["mine"])
    with pytest.raises(TimeoutError):
        cluster.within(0.01, lambda: time.sleep(0.2))


def test_what_native_code_says_is_caught(capfd):
    with cluster._native_messages() as messages:
        os.write(2, b"InvalidAuthToken")
        assert messages() == b"InvalidAuthToken"
    os.write(2, b"again")
    assert capfd.readouterr().err == "again"


def test_tokens_are_found_where_ray_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert not cluster._has_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert cluster._has_token()


@pytest.mark.parametrize("address", ["nonsense", "host:port", "127.0.0.1:1"])
def test_addresses_that_nobody_answers(address):
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}: check the address"):
        cluster._join(address, {})
