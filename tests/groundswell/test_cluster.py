"""What is decided before Ray starts: workers, search path, environment, and addresses that cannot be right."""

import os

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
