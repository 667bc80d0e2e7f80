"""A real Ray head of a test's own, with its dashboard and job server, on this machine alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from groundswell.cluster import QUIET

START_SECONDS = 180.0  # machines that run tests are slow at times
STARTS = 3  # Ray itself gives a node no more than 30 s to start
END_SECONDS = 10.0  # of patience with SIGTERM: Ray's control process may ignore it for minutes


@dataclass
class Head:
    """`address` is what drivers join (--address of a sweep), `dashboard` what jobs are submitted to."""

    address: str
    dashboard: str
    folder: Path  # everything that Ray writes
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def add_node(self, num_cpus: int = 1) -> None:
        """Another node, whose files are in a folder of its own, as on another machine."""
        options = ["--address", self.address, "--num-cpus", str(num_cpus)]
        self._start(f"node-{len(self.processes)}", options)

    def start(self, num_cpus: int) -> None:
        dashboard_port = self.dashboard.rpartition(":")[2]
        options = ["--head", "--port", str(self.port), "--num-cpus", str(num_cpus)]
        options += ["--ray-client-server-port", str(_free_port())]
        options += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard_port]
        self._start("head", options)
        self._wait_for(lambda: _listens(int(dashboard_port)), "head")

    def _start(self, name: str, options: list[str]) -> None:
        folder = self.folder / name
        folder.mkdir()
        common = ["--block", "--node-ip-address", "127.0.0.1", "--temp-dir", str(folder), "--disable-usage-stats"]
        common += ["--object-store-memory", str(100 * 2**20)]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common],
                env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        self._wait_for(lambda: "Ray runtime started" in self._log(name), name)

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _wait_for(self, condition, name: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            assert self.processes[-1].poll() is None and time.monotonic() < end, self._log(name)
            time.sleep(0.2)

    def family(self) -> list[psutil.Process]:
        """Everything that was started here and is still there, also what has lost its parent: Ray names the folder
        in each of its commands, and a session is inherited."""
        sessions = {process.pid for process in self.processes}
        return [process for process in psutil.process_iter() if self._is_mine(process, sessions)]

    def _is_mine(self, process: psutil.Process, sessions: set[int]) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            return os.getsid(process.pid) in sessions or any(str(self.folder) in part for part in process.cmdline())
        return False

    def close(self) -> None:
        """Ask nicely, then kill each process by its own number."""
        family = self.family()
        for process in reversed(self.processes):
            process.terminate()
        psutil.wait_procs(family, timeout=END_SECONDS)
        left = {*family, *self.family()}
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=END_SECONDS)
        for process in self.processes:
            process.wait()
        assert not self.family()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def start_head(num_cpus: int = 2) -> Iterator[Head]:
    """A head on loopback with free ports and a token (RAY_AUTH_TOKEN, which tests/conftest.py sets)."""
    for attempt in reversed(range(STARTS)):
        folder = Path(tempfile.mkdtemp(prefix="gw-", dir="/tmp"))  # short: the paths of Ray's sockets end at 107 bytes
        head = Head(f"127.0.0.1:{_free_port()}", f"http://127.0.0.1:{_free_port()}", folder)
        try:
            head.start(num_cpus)
            break
        except AssertionError:
            head.close()
            if not attempt:
                raise
        except BaseException:
            head.close()
            raise
    try:
        yield head
    finally:
        head.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
