"""MLflow's web pages over a store, for as long as somebody looks at them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from groundswell.config import ConfigError
from groundswell.tracking.location import artifact_root
from groundswell.tracking.store import QUIET

START_SECONDS = 120.0  # measured: 26 s on a busy core
STOP_SECONDS = 10.0
# Jobs are for language-model evaluation; their queue would stay behind in /dev/shm.
ENVIRONMENT = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextlib.contextmanager
def serve(uri: str, output: Path, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers when the block begins and is gone when it ends. Raises ConfigError if it does not start."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port: cannot listen on {host}:{port} ({error.strerror}); choose another with --port"
            ) from None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    if root := artifact_root(uri, output):
        command += ["--default-artifact-root", root]
    log_path = output / "mlflow-ui.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(process, f"http://{host}:{port}/health", log_path)
        yield process
    finally:
        _stop(process)


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log_path.read_text(errors="replace").strip().splitlines()
            raise ConfigError(
                f"the MLflow server has ended at once ({lines[-1] if lines else 'no output'}); see {log_path}"
            )
        with contextlib.suppress(OSError, urllib.error.URLError), opener.open(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise ConfigError(f"the MLflow server does not answer after {START_SECONDS:.0f} s; see {log_path}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In order first (it stops its own workers), then its whole process group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
