"""The one place that starts Ray, or joins a cluster, and leaves again."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundswell.config import ConfigError

CONNECT_SECONDS = 30.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",  # nobody reads them, and the exporter's thread can bring a worker down
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
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
    """Where workers find groundswell, models and tasks, wherever the driver found them."""
    package = Path(__file__).resolve().parents[1]
    return os.pathsep.join([str(package), str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def connect(address: str | None, num_cpus: int | None = None) -> Iterator[Resources]:
    """A local cluster of its own, or a connection to `address`; either is left again at the end.

    Raises ConfigError when nothing answers at the address within 30 seconds.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if address is not None and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    import ray

    variables = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **{k: os.environ[k] for k in QUIET}}
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    if address is None:
        ray.init(
            address="local",  # never someone else's cluster by accident; Ray gives it a token, as it listens everywhere
            num_cpus=num_cpus or local_resources().num_cpus,
            include_dashboard=False,
            object_store_memory=200 * 2**20,  # only small messages travel through it
            **options,
        )
    else:
        _join(address, options)
    try:
        total = ray.cluster_resources()
        yield Resources(int(total.get("CPU", 1)), int(total.get("GPU", 0)))
    finally:
        _leave()


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

    advice = (
        f"no Ray cluster answers at {address}: check the address (--address or RAY_ADDRESS) "
        "and that `ray start --head` runs there"
    )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS / 3).close()
        except (OSError, ValueError):
            raise ConfigError(advice) from None
    failure: list[BaseException] = []

    def target() -> None:
        try:
            ray.init(address=address, **options)
        except BaseException as error:
            failure.append(error)

    # ray.init retries a dead address for more than ten minutes.
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if thread.is_alive() or failure:
        detail = f" ({failure[0]})" if failure else ""
        raise ConfigError(" ".join(f"{advice}{detail}".split()))
