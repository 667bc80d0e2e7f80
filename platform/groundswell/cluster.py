"""The one place that starts Ray, or joins a cluster, and leaves again."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundswell.config import ConfigError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 30.0
START_ATTEMPTS = 3
TOKEN_ADVICE = (
    "put the cluster's token (`ray get-auth-token` on its head) into ~/.ray/auth_token, "
    "or name its file in RAY_AUTH_TOKEN_PATH"
)
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray tells the driver of a submitted job what it was submitted with
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",  # nobody reads them, and the exporter's thread can bring a worker down
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # of no use on one machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a worker that saves a state waits for the next of these moments
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in an experiment are the user's
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class Resources:
    num_cpus: int
    num_gpus: int

    def workers(self, threads: int, on_gpu: bool) -> int:
        """How many packs train side by side."""
        return max(1, self.num_gpus if on_gpu else self.num_cpus // threads)


def local_resources() -> Resources:
    """What this machine has, without starting anything."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Resources(cpus, torch.cuda.device_count())


def python_path() -> str:
    """Where workers find groundswell, models and tasks, wherever the driver found them.

    Each node unpacks a submitted project in a place of its own, in which its workers start: there the paths are
    relative ones.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package, package.parent]
    if JOB_CONFIG in os.environ and package.is_relative_to(Path.cwd().resolve()):
        places = [place.relative_to(Path.cwd().resolve()) for place in places]
    return os.pathsep.join([*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])])


def job_variables() -> dict[str, str]:
    """The environment that a submitted job was given; empty when this process is not the driver of one."""
    return json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env", {}).get("env_vars", {})


def worker_variables() -> dict[str, str]:
    """The environment of workers, except for what they have from their job: Ray refuses to be told twice."""
    variables = {
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        **{k: os.environ.get(k, v) for k, v in QUIET.items()},
    }
    return {name: value for name, value in variables.items() if name not in job_variables()}


def prepare_environment(joining: bool) -> None:
    """What Ray reads when it is imported. A token that this user has is used for a cluster that is there already."""
    if joining:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if joining and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def connect(address: str | None, num_cpus: int | None = None) -> Iterator[Resources]:
    """A local cluster of its own, or a connection to `address`; either is left again at the end.

    Raises ConfigError when nothing answers at the address within 30 seconds.
    """
    prepare_environment(joining=address is not None)
    import ray

    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    options["runtime_env"] = {"env_vars": worker_variables()}
    if address is None:
        _start(num_cpus or local_resources().num_cpus, options)
    else:
        _join(address, options)
    try:
        total = ray.cluster_resources()
        yield Resources(int(total.get("CPU", 1)), int(total.get("GPU", 0)))
    finally:
        _leave()


def _start(num_cpus: int, options: dict[str, Any]) -> None:
    """A cluster on this machine. Ray gives its own processes half a minute, which a busy machine may exceed."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",  # never someone else's by accident; Ray gives it a token, as it listens everywhere
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=200 * 2**20,  # only small messages travel through it
                **options,
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out" not in str(error):
                raise
            log.warning("Ray did not start (attempt %d of %d): %s", attempt + 1, START_ATTEMPTS, error)
    raise ConfigError(
        "Ray did not start on this machine in time, which is very busy; the same command tries it again, or give "
        "--address of a cluster"
    )


def _leave() -> None:
    """Ray ends the whole process when one of its handles is freed during its shutdown, for instance by a garbage
    collection in another thread: collect before, and not meanwhile."""
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def _has_token() -> bool:
    """Does this user have a token for Ray clusters? `ray start` uses it unasked; a driver with an address does not."""
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(os.environ.get(name) for name in variables) or (Path.home() / ".ray" / "auth_token").exists()


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    end = time.monotonic() + CONNECT_SECONDS
    nobody = f"no Ray cluster answers at {address}: check the address (--address or RAY_ADDRESS)"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS / 3).close()
        except (OSError, ValueError):
            raise ConfigError(f"{nobody} and that `ray start --head` runs there") from None
    with _native_messages() as messages:
        try:
            # ray.init retries a dead address for more than ten minutes.
            within(end - time.monotonic(), lambda: ray.init(address=address, **options))
        except Exception as error:
            if b"InvalidAuthToken" in messages():
                raise ConfigError(f"the Ray cluster at {address} refuses this user: {TOKEN_ADVICE}") from None
            raise ConfigError(" ".join(f"{nobody} and what runs there ({error})".split())) from None


@contextlib.contextmanager
def _native_messages() -> Iterator[Callable[[], bytes]]:
    """Gives what is written to stderr past Python: Ray's C++ part repeats each second why it cannot connect, and the
    exception does not know."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 2**20, 0)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises; TimeoutError when it takes longer, and then it is left to itself."""
    results: list[Any] = []
    failures: list[BaseException] = []

    def target() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]
