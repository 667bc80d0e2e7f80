"""What is decided before Ray starts: workers, search path, environment, and addresses that cannot be right."""

import logging
import os
import sys

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


@pytest.fixture
def environment(monkeypatch):
    """An environment without our variables; restored afterwards."""
    for name in (*cluster.QUIET, *cluster.AUTH):
        monkeypatch.setenv(name, "for the restoring")
        monkeypatch.delenv(name)
    return monkeypatch


def test_daemons_get_a_token_when_ray_is_not_there_yet(environment):
    environment.delitem(sys.modules, "ray", raising=False)
    environment.setenv("RAY_DEDUP_LOGS", "1")  # what a user has set stays
    cluster._prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_DEDUP_LOGS"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_early_import_of_ray_is_not_contradicted(environment, caplog):
    """Ray read its settings when it was imported; to change them now would lock the driver out."""
    environment.setitem(sys.modules, "ray", object())
    with caplog.at_level(logging.WARNING):
        cluster._prepare_environment()
    assert "RAY_AUTH_MODE" not in os.environ
    assert "without a token" in caplog.text


@pytest.mark.parametrize("address", ["nonsense", "host:port", "127.0.0.1:1"])
def test_addresses_that_nobody_answers(address):
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}: check the address"):
        cluster._join(address, {})
